"""Gated residual: a branch is normalised, multiplied by a gate and added to the stream.

Shapes: B batch, L tokens, C channels.
"""

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl, tokens_per_program
from zimage.kernels.rms_norm import HALF, plain, scaled_by_rms


def gated_residual(x: Tensor, branch: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """x + gate · rms_norm(branch), for x and branch (B, L, C), weight (C,) and gate (B or 1, 1, C)."""
    run = choose(launch, reference, x, branch, weight, gate)
    return run(x, branch, weight, gate, eps)


def reference(x, branch, weight, gate, eps):
    if x.dtype in HALF:
        return scaled_by_rms(branch, weight.float() * gate, eps).add_(x).to(x.dtype)
    return x + gate * plain(branch, weight, eps)


@jit
def _kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    gate_ptr,
    out_ptr,
    length,
    channels,
    gate_stride,
    EPS: tl.constexpr,
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
        inverse = tl.rsqrt(tl.sum(branch * branch, axis=0) / channels + EPS)
        tl.store(out_ptr + place, (x + branch * inverse * weight).to(out_ptr.dtype.element_ty), mask=there)


def launch(x, branch, weight, gate, eps):
    x, branch = x.contiguous(), branch.contiguous()
    out = torch.empty_like(x)
    B, L, C = x.shape
    stride, rows = gate.stride(0) if len(gate) > 1 else 0, tokens_per_program(B * L)
    grid = (-(-L // rows), B)
    enqueue(_kernel, grid, x, branch, weight, gate, out, L, C, stride, eps, rows, power_of_two(C), num_warps=8)
    return out


SPEC = Spec(
    name="gated_residual",
    reference=reference,
    launch=launch,
    inputs=lambda make, B, L, C, gates=1: (make(B, L, C), make(B, L, C), make(C), make(gates, 1, C), 1e-5),
    cases=({"B": 2, "L": 17, "C": 24, "gates": 2}, {"B": 1, "L": 3, "C": 192}, {"B": 2, "L": 16, "C": 40}),
    model={"B": 1, "L": 4128, "C": 3840},
    least_bytes=lambda x, branch, weight, gate, eps: 3 * bytes_of(x) + bytes_of(weight, gate),
)
