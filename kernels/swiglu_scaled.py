"""SwiGLU in fp16 with a unit per row: hidden values beyond fp16's range, and products of them that stay inside.

Shapes: L rows, C channels.
"""

import torch
from torch import Tensor

from zimage.kernels import swiglu
from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl
from zimage.kernels.quantise import empty_operand, warps_of_a_row
from zimage.kernels.swiglu import activated, gate_and_up

LEAST = 2.0**-40  # of a row's scale: its square is a number too


def swiglu_scaled(gate: Tensor, up: Tensor, unit: float, norm: float) -> tuple[Tensor, Tensor]:
    """silu(g) · u = values · scale: values (…, C) in the dtype of gate and up, scale (…, 1) fp32.

    g = unit · gate and u = unit · up (…, C). A row of values has a norm of at most `norm`, at least half of it unless
    the row is nearly 0. Unit and norm are powers of two, and so is the scale.
    """
    return choose(launch, reference, gate, up)(gate, up, unit, norm)


def reference(gate, up, unit, norm):
    wide = gate.float() if gate.dtype.itemsize == 2 else gate
    hidden = wide * torch.sigmoid(wide * unit) * up
    scale = _power_above(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).float() / norm)
    return (hidden / scale).to(gate.dtype), scale * unit**2


def _power_above(x: Tensor) -> Tensor:
    """The power of two above x, whose exponent is that of x and one more; at least LEAST."""
    return (x.clamp_min(LEAST / 2).view(torch.int32) & 0x7F800000).view(torch.float32) * 2


@jit
def _kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    scale_ptr,
    channels,
    gate_stride,
    up_stride,
    UNIT: tl.constexpr,
    NORM: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A whole row, whose norm the scale needs."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    present = column < channels
    hidden = activated(gate_ptr, up_ptr, row, column, present, gate_stride, up_stride, UNIT)
    size = tl.maximum(tl.sqrt(tl.sum(hidden * hidden, axis=0)) / NORM, SMALLEST / 2)
    scale = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 2
    tl.store(out_ptr + row * channels + column, (hidden * (1 / scale)).to(out_ptr.dtype.element_ty), mask=present)
    tl.store(scale_ptr + row, scale * (UNIT * UNIT))


def launch(gate, up, unit, norm):
    C = gate.shape[-1]
    gates, ups = gate.flatten(0, -2), up.flatten(0, -2)  # views for halves of a packed product
    (out, scale), block = empty_operand(gate, gate.dtype), power_of_two(C)
    sizes, constants = (C, gates.stride(0), ups.stride(0)), (unit, norm, LEAST, block)
    enqueue(_kernel, (len(gates),), gates, ups, out, scale, *sizes, *constants, num_warps=warps_of_a_row(block))
    return out, scale


SPEC = Spec(
    name="swiglu_scaled",
    reference=reference,
    launch=launch,
    inputs=lambda make, **sizes: (*gate_and_up(make, **sizes), 0.25, 1024.0),
    cases=swiglu.SPEC.cases,
    model=swiglu.SPEC.model,
    least_bytes=lambda gate, up, unit, norm: 3 * bytes_of(gate) + 4 * len(gate),
)
