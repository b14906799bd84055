"""RMS norm over the last dimension, plain and times a modulation's scale.

Shapes: B batch, L tokens, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl, tokens_per_program

HALF = (torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension (Zhang & Sennrich 2019), in fp32 inside."""
    if x.dtype in HALF:
        return scaled_by_rms(x, weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def scaled_by_rms(x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """factor · x / √(mean(x²) + eps) in fp32, for `x` in half precision, in the fewest passes that PyTorch offers."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # √(sum of squares)
    return (x * (size.square() / x.shape[-1] + eps).rsqrt()).mul_(factor)


def rms_norm_scale(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """rms_norm(x) · scale, for x (B, L, C), weight (C,) and scale (B or 1, 1, C)."""
    run = choose(launch, reference, x, weight, scale)
    return run(x, weight, scale, eps)


def reference(x, weight, scale, eps):
    if x.dtype in HALF:
        return scaled_by_rms(x, weight.float() * scale, eps).to(x.dtype)
    return rms_norm(x, weight, eps) * scale


@jit
def _kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    length,
    channels,
    scale_stride,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens of one sample."""
    first, batch = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    present = column < channels
    weight = tl.load(weight_ptr + column, mask=present, other=0.0).to(tl.float32)
    weight *= tl.load(scale_ptr + batch * scale_stride + column, mask=present, other=0.0).to(tl.float32)
    for i in range(ROWS):
        there = present & (first + i < length)
        place = (batch * length + first + i) * channels + column
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, axis=0) / channels + EPS)
        tl.store(out_ptr + place, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=there)


def launch(x, weight, scale, eps):
    x = x.contiguous()
    out = torch.empty_like(x)
    B, L, C = x.shape
    stride, rows = scale.stride(0) if len(scale) > 1 else 0, tokens_per_program(B * L)
    enqueue(_kernel, (-(-L // rows), B), x, weight, scale, out, L, C, stride, eps, rows, power_of_two(C), num_warps=8)
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
