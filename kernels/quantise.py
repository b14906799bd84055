"""Dynamic quantisation with one scale per row: the input of an int8 or fp8 matrix product."""

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST_CAPABILITY = {torch.int8: 75, torch.float8_e4m3fn: 89}
TINY = 1e-12  # the scale of a row of zeros


def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (rows, C) ≈ q · scale with q (rows, C) in int8 or fp8 e4m3 and scale (rows, 1) fp32, symmetric.

    A row's largest magnitude becomes the largest value of `dtype`; the others are rounded to nearest, ties to even.
    """
    return choose(launch, reference, x, least_capability=LEAST_CAPABILITY[dtype])(x, dtype)


def reference(x, dtype):
    values = x.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_(min=TINY) / LARGEST[dtype]
    values = values / scale
    return (values.round_() if dtype is torch.int8 else values).to(dtype), scale


@jit
def _kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    channels,
    PEAK: tl.constexpr,
    TINY: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    present = column < channels
    x = tl.load(x_ptr + row * channels + column, mask=present, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), TINY) / PEAK
    x = tl.div_rn(x, tl.full((BLOCK,), 0.0, tl.float32) + scale)
    if INTEGER:
        x = (x + 12582912.0) - 12582912.0  # to the nearest even integer: 1.5 · 2²³ leaves no fractional bits
    tl.store(out_ptr + row * channels + column, x.to(out_ptr.dtype.element_ty), mask=present)
    tl.store(scale_ptr + row, scale)


def launch(x, dtype):
    x = x.contiguous()
    rows, channels = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = power_of_two(channels)
    warps = min(max(block // 512, 4), 16)
    enqueue(
        _kernel, (rows,), x, out, scale, channels, LARGEST[dtype], TINY, dtype is torch.int8, block, num_warps=warps
    )
    return out, scale


def _spec(name: str, dtype: torch.dtype) -> Spec:
    return Spec(
        name=name,
        reference=reference,
        launch=launch,
        inputs=lambda make, rows, C: (make(rows, C), dtype),
        cases=({"rows": 3, "C": 40}, {"rows": 2, "C": 1000}, {"rows": 1, "C": 4096}),
        model={"rows": 4128, "C": 10240},
        least_bytes=lambda x, dtype: bytes_of(x) + x.numel() + 4 * len(x),
        least_capability=LEAST_CAPABILITY[dtype],
    )


INT8_SPEC, FP8_SPEC = _spec("quantise_int8", torch.int8), _spec("quantise_fp8", torch.float8_e4m3fn)
