"""Packed matrices: whole, by rows, by places, merged with adapters."""

import pytest
import torch

from zimage.nn import ggml
from zimage.nn.adapters import adapt
from zimage.nn.deltas import LowRank
from zimage.nn.packed import NVFP4, Blocks, Grouped, Int4, PackedEmbedding, Scaled, decoded, packed_product

OUT, IN = 24, 512
GENERATOR = torch.Generator().manual_seed(0)
E4M3 = torch.float8_e4m3fn


def numbers(*shape):
    return torch.randn(shape, generator=GENERATOR)


def codes(*shape):
    return torch.randint(256, shape, generator=GENERATOR, dtype=torch.uint8)


def blocks(kind):
    """Any codes, with finite scales: halves of an f16 number below 0x7C."""
    return ggml.GGML(codes(OUT, IN // ggml.NUMBERS[kind] * ggml.BYTES[kind]) & 0x77, kind)


KINDS = {
    "fp8": Scaled(numbers(OUT, IN).to(E4M3), torch.tensor(0.25)),
    "int8": Scaled(codes(OUT, IN).view(torch.int8), numbers(OUT, 1)),
    "int8 ConvRot": Scaled(codes(OUT, IN).view(torch.int8), numbers(OUT, 1), 256),
    "int4 ConvRot": Int4(codes(OUT, IN // 2), numbers(OUT, 1), 64),
    "fp8 in blocks": Grouped(numbers(OUT, IN).to(E4M3), numbers(OUT, 4), 128),
    "mxfp8": Grouped(numbers(OUT, IN).to(E4M3), codes(OUT, 16) // 2 + 60, 32),
    "nvfp4": NVFP4(codes(OUT, IN // 2), numbers(OUT, IN // 16).to(E4M3), torch.tensor(0.1)),
    "of a library": Blocks(codes(OUT, IN), IN, lambda bytes_: bytes_.float() - 7),
    **{kind: blocks(kind) for kind in ggml.BYTES},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_the_same_numbers_in_every_way(kind, monkeypatch):
    packed = KINDS[kind]
    whole = packed.decode()
    assert whole.shape == packed.shape == (OUT, IN)
    assert whole.isfinite().all()
    assert torch.equal(packed.decode(torch.bfloat16), whole.bfloat16())
    assert torch.equal(torch.cat([packed.rows(i, i + 1).decode() for i in range(OUT)]), whole)
    ids = torch.tensor([[3, 3], [23, 0]])
    assert torch.equal(PackedEmbedding(packed)(ids), whole[ids])
    x = numbers(2, 3, IN)
    monkeypatch.setattr("zimage.nn.layers.PIECE", 10 * IN)  # the last piece is smaller
    assert torch.equal(decoded(packed, torch.float16, torch.device("cpu")), whole.half())
    assert torch.allclose(packed_product(x, packed), x @ whole.T, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_adapters_merge_into_what_was_decoded():
    """Kinds that a GPU cannot widen are plain layers there, whose weights are packed in the file."""
    packed, delta = KINDS["of a library"], LowRank((numbers(OUT, 2), numbers(2, IN)))
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False).requires_grad_(False))
    model[0].weight.copy_(packed.decode())
    adapt(model, "0", [(delta, 0.5)], lambda: packed, torch.float32, torch.device("cpu"))
    assert torch.allclose(model[0].weight, packed.decode() + 0.5 * delta.w[0] @ delta.w[1], atol=1e-4)
    adapt(model, "0", [], lambda: packed, torch.float32, torch.device("cpu"))
    assert torch.equal(model[0].weight, packed.decode())
