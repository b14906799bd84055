"""Gated residual: a branch is normalised, multiplied by a gate and added to the stream.

Shapes: B batch, L tokens, C channels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl, tokens_per_program
from zimage.kernels.rms_norm import HALF, plain, scaled_by_rms


def gated_residual(
    x: Tensor, branch: Tensor, weight: Tensor, gate: Tensor, eps: float, scale: Tensor | None = None
) -> Tensor:
    """x + gate · rms_norm(branch), for x and branch (B, L, C), weight (C,) and gate (B or 1, 1, C).

    With a scale (B, L, 1) fp32 the branch is branch · scale, which only eps can tell: rms_norm(y / s, eps / s²) is
    rms_norm(y, eps).
    """
    run = choose(launch, reference, x, branch, weight, gate)
    return run(x, branch, weight, gate, eps, scale)


def reference(x, branch, weight, gate, eps, scale=None):
    if scale is not None:
        eps = eps / scale.square()
    if x.dtype in HALF:
        return scaled_by_rms(branch, weight.float() * gate, eps).add_(x).to(x.dtype)
    if scale is not None:
        return x + gate * weight * branch * (branch.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return x + gate * plain(branch, weight, eps)


@jit
def _kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    gate_ptr,
    scale_ptr,
    out_ptr,
    length,
    channels,
    gate_stride,
    EPS: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens of one sample."""
    first, batch = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    present = column < channels
    weight = tl.load(weight_ptr + column, mask=present, other=0.0).to(tl.float32)
    weight *= tl.load(gate_ptr + batch * gate_stride + column, mask=present, other=0.0).to(tl.float32)
    for i in range(ROWS):
        there = present & (first + i < length)
        place = (batch * length + first + i) * channels + column
        branch = tl.load(branch_ptr + place, mask=there, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        eps = EPS
        if SCALED:
            scale = tl.load(scale_ptr + batch * length + first + i, mask=first + i < length, other=1.0)
            eps = EPS / (scale * scale)
        inverse = tl.rsqrt(tl.sum(branch * branch, axis=0) / channels + eps)
        tl.store(out_ptr + place, (x + branch * inverse * weight).to(out_ptr.dtype.element_ty), mask=there)


def launch(x, branch, weight, gate, eps, scale=None):
    x, branch = x.contiguous(), branch.contiguous()
    scaled, scale = scale is not None, gate if scale is None else scale.contiguous()
    out = torch.empty_like(x)
    B, L, C = x.shape
    stride, rows = gate.stride(0) if len(gate) > 1 else 0, tokens_per_program(B * L)
    sizes, constants = (L, C, stride), (eps, scaled, rows, power_of_two(C))
    grid = (-(-L // rows), B)
    enqueue(_kernel, grid, x, branch, weight, gate, scale, out, *sizes, *constants, num_warps=8)
    return out


def _least_bytes(x, branch, weight, gate, eps, scale=None) -> int:
    return 3 * bytes_of(x) + bytes_of(weight, gate) + (0 if scale is None else bytes_of(scale))


def _scaled_inputs(make, **sizes) -> tuple:
    x, branch, *rest = SPEC.inputs(make, **sizes)
    return x, branch, *rest, 0.01 + make(*x.shape[:-1], 1).float().abs()


SPEC = Spec(
    name="gated_residual",
    reference=reference,
    launch=launch,
    inputs=lambda make, B, L, C, gates=1: (make(B, L, C), make(B, L, C), make(C), make(gates, 1, C), 1e-5),
    cases=({"B": 2, "L": 17, "C": 24, "gates": 2}, {"B": 1, "L": 3, "C": 192}, {"B": 2, "L": 16, "C": 40}),
    model={"B": 1, "L": 4128, "C": 3840},
    least_bytes=_least_bytes,
)
SCALED_SPEC = replace(SPEC, name="gated_residual_scaled", inputs=_scaled_inputs)
