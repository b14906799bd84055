"""One step of the published model in int8 and fp8 on a pretended RTX 4090, by the makers' figures."""

import pytest
import torch
from pretended import needs_pretended, pretend
from test_steps import CARD, TOKENS, step
from torch import nn

from bench.card import random_model
from zimage.kernels.rotate import rotate
from zimage.loading.plan import Workload
from zimage.loading.work import dit_bytes
from zimage.nn import quant
from zimage.nn.quant import QuantisedLinear

pytestmark = [pytest.mark.cuda, needs_pretended]


@pytest.mark.parametrize(
    ("precision", "sizes"), [("int8", {512: 0.028, 1024: 0.145}), ("fp8", {1024: 0.235})], ids=["int8", "fp8"]
)
def test_a_step(precision, sizes, monkeypatch):
    """No pass over sums, and each input quantised once: by the norm or SwiGLU before it, or on its own (to_out)."""
    monkeypatch.setattr(quant, "PIECE", 1 << 30)  # whole matrices, to be quick here
    quantised = {"int8": 32, "fp8": 28}[precision]  # blocks
    with torch.no_grad(), pretend() as card:
        dit = random_model("transformer", CARD, precision)
        for size, most in sizes.items():
            count = step(card, dit, size)
            names = count.by_name()
            assert (names["quantise.kernel"], names["swiglu.quantising_kernel"]) == (quantised, quantised)
            assert names["scaled_product.kernel"] + names["_scaled_mm"] == 7 * quantised
            assert not count.syncs
            assert not count.copies
            assert len(count.launches) <= 500
            assert count.seconds() <= most, f"{size}: {count.seconds():.4f} s"
            assert count.peak <= dit_bytes(dit.config, Workload(size, size, TOKENS), torch.bfloat16)


WAYS = {  # (precision, dtype of the results, inputs, outputs, compute capability) → what multiplies
    "int8": (torch.int8, torch.bfloat16, 96, 64, (8, 0), "scaled_product.kernel"),
    "int8 in fp32": (torch.int8, torch.float32, 96, 64, (8, 9), "scaled_product.kernel"),
    "int8 before Triton's": (torch.int8, torch.bfloat16, 96, 64, (7, 5), "_int_mm"),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16, 96, 64, (8, 9), "_scaled_mm"),
    "fp8 in fp32": (torch.float8_e4m3fn, torch.float32, 96, 64, (8, 9), "scaled_product.kernel"),
    "fp8 of other sizes": (torch.float8_e4m3fn, torch.bfloat16, 85, 64, (12, 0), "scaled_product.kernel"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_size_and_dtype_has_its_product(way):
    """A row-wise fp8 product of PyTorch's takes sizes in units of 16, and gives bf16."""
    precision, dtype, inputs, outputs, capability, expected = WAYS[way]
    with torch.no_grad(), pretend(capability=capability) as card:
        layer = QuantisedLinear(nn.Linear(inputs, outputs, device=CARD, dtype=dtype), precision)
        with card.count() as count:
            out = layer(torch.zeros(2, 32, inputs, device=CARD, dtype=dtype))
        assert (out.shape, out.dtype) == ((2, 32, outputs), dtype)
        products = {"scaled_product.kernel", "_int_mm", "_scaled_mm", "mm", "addmm"} & count.by_name().keys()
        assert products == {expected}


def test_pytorchs_int8_product_is_given_the_rows_that_it_needs():
    with torch.no_grad(), pretend(capability=(7, 5)):
        layer = QuantisedLinear(nn.Linear(96, 64, device=CARD, dtype=torch.bfloat16), torch.int8)
        assert layer(torch.zeros(1, 3, 96, device=CARD, dtype=torch.bfloat16)).shape == (1, 3, 64)


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 0)], ids=str)
def test_only_half_precision_is_rotated_by_the_kernel(dtype, kernels):
    """Without matrix units, a tile of fp32 spills kilobytes of registers."""
    with torch.no_grad(), pretend(capability=(8, 9)) as card, card.count() as count:
        out = rotate(torch.zeros(2, 32, 64, device=CARD, dtype=dtype), 16)
    assert (out.shape, out.dtype) == ((2, 32, 64), dtype)
    assert count.by_name()["rotate.kernel"] == kernels
