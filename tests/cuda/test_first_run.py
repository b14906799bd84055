"""A first run on a machine where something is missing: the render goes on, on what is left, and says so once."""

import logging

import pytest
import torch
from pretended import needs_pretended, pretend
from triton.runtime.errors import PTXASError

import zimage
from zimage.kernels import backend, norm
from zimage.nn import attention

pytestmark = [pytest.mark.cuda, needs_pretended]
SMALL = {"width": 32, "height": 32, "steps": 1, "seed": 1}
TWO = {"prompt": ["a cat", "a red apple and a dog"], "batch_size": 2, "guidance": 2.0}
FALL_BACK = backend._launched_or_computed  # which the pretended card does without, lest it hide a mistake


@pytest.fixture
def caught(caplog):
    caplog.set_level(logging.WARNING)
    return caplog


def kernels(card) -> set[str]:
    return {launch.name for launch in card.total.launches if launch.name.endswith(("kernel", "rope"))}


def failing(kernel, *_, **__):
    raise backend.KernelError("PTXASError: `ptxas` failed") from PTXASError("`ptxas` failed\nand more")


def test_without_a_compiler_pytorchs_own_operations_run(tiny_folder, monkeypatch, caught):
    with torch.no_grad(), pretend() as card:
        monkeypatch.setattr(backend, "enqueue", failing)
        result = zimage.ZImage.load(tiny_folder).generate("a cat", **SMALL)
    assert result.images
    assert not kernels(card)
    (line,) = caught.messages
    assert line.startswith("the fused kernels are off, since Triton cannot run here (PTXASError: ")
    assert "\n" not in line


def test_where_one_kernel_cannot_be_built_the_others_run(tiny_folder, monkeypatch, caught):
    monkeypatch.setattr(backend, "FAILED", set())
    with torch.no_grad(), pretend() as card:
        monkeypatch.setattr(backend, "_launched_or_computed", FALL_BACK)
        monkeypatch.setattr(norm, "enqueue", failing)
        result = zimage.ZImage.load(tiny_folder).generate("a cat", **SMALL)
    assert result.images
    assert kernels(card)
    assert not any(name.startswith("norm.") for name in kernels(card))
    (line,) = caught.messages
    assert line.startswith("the fused kernel of norm.launch is off, since it cannot run here (PTXASError: ")


def test_a_card_without_code_in_this_pytorch_leaves_it_to_the_cpu(tiny_folder, caught):
    with pretend(capability=(6, 1)) as card:
        pipe = zimage.ZImage.load(tiny_folder)
        assert {place.device.type for place in pipe.places.values()} == {"cpu"}
        pipe.generate("a cat", **SMALL)
    assert not card.total.launches
    assert [line for line in caught.messages if "compute capability 6.1" in line]


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math"])
def test_pytorchs_own_attentions(tiny_folder, name):
    """On a second card, and with unequal captions: nothing they make lies elsewhere."""
    with torch.no_grad(), pretend(devices=2):
        pipe = zimage.ZImage.load(tiny_folder, attention=name, device="cuda:1")
        assert pipe.residency.attention == name
        assert len(pipe.generate(**{**SMALL, **TWO}).images) == 2


class Bias:
    """xformers' bias, whose mask must lie where the tensors are."""

    def __init__(self, device):
        self.device = torch.device(device)

    @classmethod
    def from_seqlens(cls, lengths, device=None):
        return cls(device or "cuda")


class Xformers:
    class fmha:
        class attn_bias:
            BlockDiagonalMask = Bias

    @staticmethod
    def memory_efficient_attention(q, k, v, attn_bias=None):
        assert attn_bias is None or attn_bias.device == q.device
        return attention.attention(q, k, v)


def test_xformers_mask_lies_where_the_tensors_are(monkeypatch):
    with torch.no_grad(), pretend(devices=2):
        device = torch.device("cuda", 1)
        q, k, v = (torch.zeros(2, 9, 4, 16, device=device) for _ in range(3))
        padding = attention.Padding.of((5, 9), torch.device("cpu"))
        padding = padding._replace(indices=padding.indices.to(device))
        assert attention._xformers(Xformers, q, k, v, padding).device == device
