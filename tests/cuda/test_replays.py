"""Renders from CUDA graphs on a pretended card: nothing in a graph waits, copies or depends on data."""

import loose
import pytest
from counted import Card
from pretended import needs_pretended, pretend
from test_matrix import files  # noqa: F401 - a fixture

import zimage

pytestmark = [pytest.mark.cuda, needs_pretended]


def rendered(**load) -> Card:
    with pretend() as card:
        pipe = zimage.ZImage.load(cuda_graphs=True, **load)
        pipe.generate("a cat", seed=1, steps=2, width=32, height=32, guidance=2.0, negative="a dog")
    return card


@pytest.mark.parametrize(
    "load", [{}, {"dtype": "fp32"}, {"dtype": "fp16"}, {"precision": "int8"}, {"precision": "fp8"}], ids=str
)
def test_every_precision(caplog, load):
    """One graph for guidance and steps."""
    (count,) = rendered(**load).captures
    assert count.launches
    assert not [message for message in caplog.messages if "graph" in message]


@pytest.mark.parametrize("kind", ["fp8 without scales", "Q4_K", "Q5_1", pytest.param("nvfp4", marks=loose.COMFY)])
def test_packed_files(caplog, files, kind):  # noqa: F811
    card = rendered(path=files["plain"], dit=files[kind])
    said = [message for message in caplog.messages if "graph" in message]
    assert len(card.captures) == 1
    assert not said
