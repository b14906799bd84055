"""Dynamic quantisation with one scale per row: the input of an int8 or fp8 matrix product.

Ops whose result is only ever multiplied write it in this form at once: see `norm.py` and `swiglu.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
LEAST_CAPABILITY = {torch.int8: 75, torch.float8_e4m3fn: 89}
TINY = 1e-12  # the scale of a row of zeros


class Operand(NamedTuple):
    """The input of matrix products: values · scale, made once and shared by the products of one input."""

    values: Tensor  # (…, C) in the dtype that is multiplied
    scale: Tensor  # (…, 1) fp32
    dtype: torch.dtype  # of the products' results


def quantise_rows(x: Tensor, dtype: torch.dtype) -> Operand:
    """x (…, C) ≈ values · scale with values (…, C) in int8 or fp8 e4m3 and scale (…, 1) fp32, symmetric.

    A row's largest magnitude becomes the largest value of `dtype`; the others are rounded to nearest, ties to even.
    """
    run = choose(launch, reference, x, least_capability=LEAST_CAPABILITY[dtype])
    values, scale = run(x, dtype)
    return Operand(values, scale, x.dtype)


def reference(x, dtype):
    values = x.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_(min=TINY) / LARGEST[dtype]
    values = values / scale
    return (values.round_() if dtype is torch.int8 else values).to(dtype), scale


@jit
def quantised(x, PEAK: tl.constexpr, SMALLEST: tl.constexpr, INTEGER: tl.constexpr):
    """What other kernels call: (values, scale) of one row x, all three fp32. PEAK is LARGEST, SMALLEST is TINY."""
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=0)  # in their order; a maximum of floats would drop NaN
    scale = tl.maximum(bits.to(tl.float32, bitcast=True), SMALLEST, propagate_nan=tl.PropagateNan.ALL) / PEAK
    x = tl.div_rn(x, tl.zeros_like(x) + scale)
    if INTEGER:
        x = (x + 12582912.0) - 12582912.0  # to the nearest even integer: 1.5 · 2²³ leaves no fractional bits
    return x, scale


@jit
def _kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    channels,
    PEAK: tl.constexpr,
    SMALLEST: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    present = column < channels
    x = tl.load(x_ptr + row * channels + column, mask=present, other=0.0).to(tl.float32)
    x, scale = quantised(x, PEAK, SMALLEST, INTEGER)
    tl.store(out_ptr + row * channels + column, x.to(out_ptr.dtype.element_ty), mask=present)
    tl.store(scale_ptr + row, scale)


def launch(x, dtype):
    x = x.contiguous()
    out, scale = empty_operand(x, dtype)
    channels = x.shape[-1]
    block = power_of_two(channels)
    enqueue(
        _kernel, (scale.numel(),), x, out, scale, channels, *constants(dtype), block, num_warps=warps_of_a_row(block)
    )
    return out, scale


def empty_operand(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for the values and the scale of x (…, C)."""
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device), scale


def constants(dtype: torch.dtype) -> tuple[float, float, bool]:
    """PEAK, SMALLEST and INTEGER of `quantised`; a PEAK of 0 for dtypes that are not quantised."""
    return LARGEST.get(dtype, 0.0), TINY, dtype is torch.int8


def warps_of_a_row(block: int) -> int:
    """For programs that hold one row of `block` values in registers."""
    return min(max(block // 512, 4), 16)


def quantised_spec(
    plain: Spec,
    dtype: torch.dtype,
    reference: Callable[..., tuple[Tensor, ...]],
    launch: Callable[..., tuple[Tensor, ...]],
    least_bytes: Callable[..., int],
) -> Spec:
    """The specification of an op that writes the result of another one quantised; it also takes the dtype."""
    return replace(
        plain,
        name=f"{plain.name}_{NAMES[dtype]}",
        reference=reference,
        launch=launch,
        inputs=lambda make, **sizes: (*plain.inputs(make, **sizes), dtype),
        least_bytes=least_bytes,
        least_capability=LEAST_CAPABILITY[dtype],
        levels_of_a_sum=True,
    )


def _spec(dtype: torch.dtype) -> Spec:
    return Spec(
        name=f"quantise_{NAMES[dtype]}",
        reference=reference,
        launch=launch,
        inputs=lambda make, rows, C: (make(rows, C), dtype),
        cases=({"rows": 3, "C": 40}, {"rows": 2, "C": 1000}, {"rows": 1, "C": 4096}),
        model={"rows": 4128, "C": 10240},
        least_bytes=lambda x, dtype: bytes_of(x) + x.numel() + 4 * len(x),
        least_capability=LEAST_CAPABILITY[dtype],
    )


INT8_SPEC, FP8_SPEC = map(_spec, LARGEST)
