"""RMS norm over the last dimension, times a modulation's scale, also quantised: the DiT's form.

Shapes: B batch, L tokens, C channels.
"""

import torch
from torch import Tensor

from zimage.kernels import quantise
from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl, tokens_per_program
from zimage.kernels.quantise import Operand, quantised
from zimage.kernels.rms_norm import HALF, plain, scaled_by_rms


def rms_norm_scale(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """rms_norm(x) · scale, for x (B, L, C), weight (C,) and scale (B or 1, 1, C)."""
    run = choose(launch, reference, x, weight, scale)
    return run(x, weight, scale, eps)


def rms_norm_scale_quantised(x: Tensor, weight: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Operand:
    """rms_norm_scale of the same arguments in int8 or fp8, quantised from fp32: rounded once."""
    least = quantise.LEAST_CAPABILITY[dtype]
    run = choose(launch_quantised, reference_quantised, x, weight, scale, least_capability=least)
    values, row_scale = run(x, weight, scale, eps, dtype)
    return Operand(values, row_scale, x.dtype)


def reference(x, weight, scale, eps):
    return _reference(x, weight, scale, eps).to(x.dtype)


def reference_quantised(x, weight, scale, eps, dtype):
    return quantise.reference(_reference(x, weight, scale, eps), dtype)


def _reference(x, weight, scale, eps):
    """fp32 for `x` in half precision."""
    if x.dtype in HALF:
        return scaled_by_rms(x, weight.float() * scale, eps)
    return plain(x, weight, eps) * scale


@jit
def _kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    row_scale_ptr,
    length,
    channels,
    scale_stride,
    EPS: tl.constexpr,
    PEAK: tl.constexpr,
    SMALLEST: tl.constexpr,
    INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens of one sample; quantised if there is a PEAK."""
    first, batch = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    present = column < channels
    weight = tl.load(weight_ptr + column, mask=present, other=0.0).to(tl.float32)
    weight *= tl.load(scale_ptr + batch * scale_stride + column, mask=present, other=0.0).to(tl.float32)
    for i in range(ROWS):
        there = present & (first + i < length)
        row = batch * length + first + i
        x = tl.load(x_ptr + row * channels + column, mask=there, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / channels + EPS) * weight
        if PEAK > 0:
            x, row_scale = quantised(x, PEAK, SMALLEST, INTEGER)
            tl.store(row_scale_ptr + row, row_scale, mask=first + i < length)
        tl.store(out_ptr + row * channels + column, x.to(out_ptr.dtype.element_ty), mask=there)


def launch(x, weight, scale, eps):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launched(x, weight, scale, eps, out)


def launch_quantised(x, weight, scale, eps, dtype):
    out, row_scale = quantise.empty_operand(x, dtype)
    return _launched(x, weight, scale, eps, out, row_scale), row_scale


def _launched(x, weight, scale, eps, out, row_scale=None):
    x = x.contiguous()
    B, L, C = x.shape
    stride, rows = scale.stride(0) if len(scale) > 1 else 0, tokens_per_program(B * L)
    form, row_scale = quantise.constants(out.dtype), scale if row_scale is None else row_scale
    pointers, block = (x, weight, scale, out, row_scale), power_of_two(C)
    enqueue(_kernel, (-(-L // rows), B), *pointers, L, C, stride, eps, *form, rows, block, num_warps=8)
    return out


SPEC = Spec(
    name="rms_norm_scale",
    reference=reference,
    launch=launch,
    inputs=lambda make, B, L, C, scales=1: (make(B, L, C), make(C), make(scales, 1, C), 1e-5),
    cases=({"B": 2, "L": 17, "C": 24, "scales": 2}, {"B": 1, "L": 3, "C": 192}, {"B": 2, "L": 16, "C": 40}),
    model={"B": 1, "L": 4128, "C": 3840},
    least_bytes=lambda x, weight, scale, eps: 2 * bytes_of(x) + bytes_of(weight, scale),
)


def _quantised_spec(dtype: torch.dtype) -> Spec:
    def least_bytes(x, weight, scale, eps, dtype):
        return bytes_of(x, weight, scale) + x.numel() + 4 * x.shape[:-1].numel()

    return quantise.quantised_spec(SPEC, dtype, reference_quantised, launch_quantised, least_bytes)


INT8_SPEC, FP8_SPEC = _quantised_spec(torch.int8), _quantised_spec(torch.float8_e4m3fn)
