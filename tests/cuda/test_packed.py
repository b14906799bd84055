"""Packed files on a pretended card: a step of the published size in every kind, and what loading decodes."""

import gc
import math
from typing import NamedTuple
from unittest import mock

import loose
import pytest
import torch
from pretended import Card, Count, needs_pretended, pretend
from test_steps import CARD, step
from torch import Tensor, nn

from bench.card.models import random_model
from bench.weights import COMPONENTS
from zimage.kernels import backend
from zimage.loading.files import Component
from zimage.loading.sizes import measure
from zimage.nn import ggml
from zimage.nn.layers import GPU_PIECE, WideningLinear
from zimage.nn.packed import NVFP4, Grouped, Int4, Packed, PackedEmbedding, PackedLinear, Scaled

pytestmark = [pytest.mark.cuda, needs_pretended]
E4M3 = torch.float8_e4m3fn
BLOCKS = 32  # of a step: 30 joint ones and two noise refiners


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=CARD)


def per_row(rows: int) -> Tensor:
    return zeros(rows, 1, dtype=torch.float32)


def in_blocks(rows: int, columns: int, kind: str) -> Packed:
    return ggml.GGML(zeros(rows, columns // ggml.NUMBERS[kind] * ggml.BYTES[kind]), kind)


KINDS = {
    "fp8": lambda o, i: Scaled(zeros(o, i, dtype=E4M3), zeros(dtype=torch.float32)),
    "fp8 in blocks": lambda o, i: Grouped(zeros(o, i, dtype=E4M3), zeros(o, i // 128, dtype=torch.float32), 128),
    "mxfp8": lambda o, i: Grouped(zeros(o, i, dtype=E4M3), zeros(o, i // 32), 32),
    "int8": lambda o, i: Scaled(zeros(o, i, dtype=torch.int8), per_row(o)),
    "int8 ConvRot": lambda o, i: Scaled(zeros(o, i, dtype=torch.int8), per_row(o), 256),
    "int4 ConvRot": lambda o, i: Int4(zeros(o, i // 2), per_row(o), 256),
    "nvfp4": lambda o, i: NVFP4(zeros(o, i // 2), zeros(o, i // 16, dtype=E4M3), zeros(dtype=torch.float32)),
    **{kind: lambda o, i, kind=kind: in_blocks(o, i, kind) for kind in ggml.BYTES},
}


@pytest.fixture
def card(monkeypatch):
    """A card on which `random_model` makes one block of each kind instead of 34, as wide as published."""
    cls, config, rest = COMPONENTS["transformer"]
    monkeypatch.setitem(COMPONENTS, "transformer", (cls, {**config, "n_layers": 1, "n_refiner_layers": 1}, rest))
    with torch.no_grad(), pretend() as card:
        yield card


def pack(dit: nn.Module, kind: str) -> None:
    for name, layer in list(dit.named_modules()):
        if isinstance(layer, nn.Linear | PackedLinear) and ("attention" in name or "feed_forward" in name):
            owner, _, leaf = name.rpartition(".")
            setattr(dit.get_submodule(owner), leaf, PackedLinear(KINDS[kind](layer.out_features, layer.in_features)))


class Whole(NamedTuple):
    """A step of the published model."""

    launches: int
    bytes: int
    peak: int


def whole_step(card: Card, dit: nn.Module, size: int = 1024) -> Whole:
    """One step of this model, with the other blocks as its first one."""
    blocks: list[Count] = []
    forward = type(dit.layers[0]).forward

    def counted(block, *arguments):
        with card.count() as count:
            out = forward(block, *arguments)
        blocks.append(count)
        return out

    with mock.patch.object(type(dit.layers[0]), "forward", counted):
        count = step(card, dit, size)
    assert not count.syncs, "the host waits inside a step"
    assert not count.copies
    block, others = blocks[-1], BLOCKS - 2
    return Whole(len(count.launches) + others * len(block.launches), count.bytes + others * block.bytes, count.peak)


def test_a_step_of_every_kind(card):
    """One launch more than in bf16 for each matrix, which is read packed and written once; one lives at a time."""
    dit = random_model("transformer", CARD)
    plain, matrix = whole_step(card, dit), (10240, 3840)
    for kind in KINDS:
        pack(dit, kind)
        found = whole_step(card, dit)
        print(f"{kind:13} {found.launches} launches, {found.bytes / plain.bytes:.3f} of bf16's bytes, {found.peak:,}")
        assert found.launches == plain.launches + 7 * BLOCKS <= 2000
        assert found.bytes <= 1.305 * plain.bytes, kind
        assert found.peak <= plain.peak + 2 * math.prod(matrix)


def test_without_kernels_nothing_waits(card, monkeypatch):
    monkeypatch.setattr(backend, "ACTIVE", False)
    dit = random_model("transformer", CARD)
    for kind in ("int8 ConvRot", "nvfp4", "Q6_K"):
        pack(dit, kind)
        whole_step(card, dit, 256)


@pytest.mark.parametrize("kind", ["Q8_0", "int8 ConvRot", "nvfp4"])
def test_rows_are_looked_up_on_the_card(card, kind):
    table = PackedEmbedding(KINDS[kind](151_936, 2560))
    with card.count() as count:
        assert table(zeros(2, 40, dtype=torch.int64)).shape == (2, 40, 2560)
        assert table.logits(zeros(1, 2560, dtype=torch.bfloat16)).shape == (1, 151_936)
    assert not count.syncs
    assert count.peak < 3 * GPU_PIECE


def test_whole_matrices_are_widened_late(card):
    layer = WideningLinear(3840, 10240, bias=False, device=CARD, dtype=torch.bfloat16)
    x = zeros(4128, 3840, dtype=torch.float32)
    with card.count() as count:
        layer(x)
    assert len(count.launches) == 2


def test_what_a_card_cannot_widen_is_decoded_while_it_is_loaded(tmp_path):
    states = loose.renamed("dit", "native", loose.states()["dit"])
    loose.write_gguf(tmp_path / "dit.gguf", "lumina2", states, "TQ2_0", loose.is_matrix)
    opened = Component.open("dit", tmp_path / "dit.gguf")
    with torch.no_grad(), pretend() as card:
        dit = opened.load(CARD, torch.bfloat16)
        planned = measure(opened, CARD, torch.bfloat16, False, "bf16", False).weights
        gc.collect()
        assert isinstance(dit.layers[0].feed_forward.w1, nn.Linear)
        assert card.live[0] <= 1.01 * planned <= 1.02 * card.live[0]
        assert not step(card, dit, 64).syncs
