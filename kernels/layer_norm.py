"""LayerNorm without weights, times a modulation's scale: the head of the DiT.

Shapes: B batch, L tokens, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl, tokens_per_program


def layer_norm_scale(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """(x − mean) / √(variance + eps) · scale over the last dimension of x (B, L, C), scale (B or 1, 1, C)."""
    run = choose(launch, reference, x, scale)
    return run(x, scale, eps)


def reference(x, scale, eps):
    return F.layer_norm(x, x.shape[-1:], eps=eps) * scale


@jit
def _kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    length,
    channels,
    x_stride,
    scale_stride,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens of one sample; `x_stride` leads from sample to sample."""
    first, batch = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    present = column < channels
    scale = tl.load(scale_ptr + batch * scale_stride + column, mask=present, other=0.0).to(tl.float32)
    for i in range(ROWS):
        there = present & (first + i < length)
        x = tl.load(x_ptr + batch * x_stride + (first + i) * channels + column, mask=there, other=0.0).to(tl.float32)
        centred = tl.where(there, x - tl.sum(x, axis=0) / channels, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, axis=0) / channels + EPS)
        place = (batch * length + first + i) * channels + column
        tl.store(out_ptr + place, (centred * inverse * scale).to(out_ptr.dtype.element_ty), mask=there)


def launch(x, scale, eps):
    B, L, C = x.shape
    if x.stride()[1:] != (C, 1):
        x = x.contiguous()  # a slice of leading tokens, as the DiT passes it, needs no copy
    out = torch.empty((B, L, C), dtype=x.dtype, device=x.device)
    strides, rows = (x.stride(0), scale.stride(0) if len(scale) > 1 else 0), tokens_per_program(B * L)
    enqueue(_kernel, (-(-L // rows), B), x, scale, out, L, C, *strides, eps, rows, power_of_two(C), num_warps=8)
    return out


def _inputs(make, B: int, L: int, C: int, beyond: int = 0, scales: int = 1) -> tuple:
    return make(B, L + beyond, C)[:, :L], make(scales, 1, C), 1e-6


SPEC = Spec(
    name="layer_norm_scale",
    reference=reference,
    launch=launch,
    inputs=_inputs,
    cases=({"B": 2, "L": 17, "C": 24, "beyond": 5, "scales": 2}, {"B": 1, "L": 3, "C": 192}),
    model={"B": 1, "L": 4096, "C": 3840, "beyond": 32},
    least_bytes=lambda x, scale, eps: 2 * bytes_of(x) + bytes_of(scale),
)
