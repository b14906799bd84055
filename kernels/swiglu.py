"""SwiGLU, the gated activation in the feed-forward layers of both transformers, plain and quantised."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.kernels import quantise
from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl
from zimage.kernels.quantise import Operand, quantised

BLOCK = 2048


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise (Shazeer 2020), of equal shapes (…, C); rows may be strided (half a product)."""
    run = choose(launch, reference, gate, up)
    return run(gate, up)


def swiglu_quantised(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Operand:
    """swiglu of the same arguments in int8 or fp8, quantised from fp32: rounded once."""
    least = quantise.LEAST_CAPABILITY[dtype]
    run = choose(launch_quantised, reference_quantised, gate, up, least_capability=least)
    values, scale = run(gate, up, dtype)
    return Operand(values, scale, gate.dtype)


def reference(gate, up):
    return F.silu(gate).mul_(up)


def reference_quantised(gate, up, dtype):
    return quantise.reference(reference(gate.float(), up), dtype)


@jit
def activated(gate_ptr, up_ptr, row, column, present, gate_stride, up_stride, UNIT: tl.constexpr):
    """silu(g) · up / UNIT for g = UNIT · gate, fp32."""
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=present, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=present, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate * UNIT) * up


@jit
def _kernel(gate_ptr, up_ptr, out_ptr, channels, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = column < channels
    x = activated(gate_ptr, up_ptr, row, column, present, gate_stride, up_stride, 1.0)
    tl.store(out_ptr + row * channels + column, x.to(out_ptr.dtype.element_ty), mask=present)


@jit
def _quantising_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    scale_ptr,
    channels,
    gate_stride,
    up_stride,
    PEAK: tl.constexpr,
    SMALLEST: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A whole row, whose largest value the scale needs."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    present = column < channels
    x = activated(gate_ptr, up_ptr, row, column, present, gate_stride, up_stride, 1.0)
    x, scale = quantised(x, PEAK, SMALLEST, INTEGER)
    tl.store(out_ptr + row * channels + column, x.to(out_ptr.dtype.element_ty), mask=present)
    tl.store(scale_ptr + row, scale)


def launch(gate, up):
    C = gate.shape[-1]
    gates, ups = gate.flatten(0, -2), up.flatten(0, -2)  # views for halves of a packed product
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    enqueue(
        _kernel, (len(gates), -(-C // BLOCK)), gates, ups, out, C, gates.stride(0), ups.stride(0), BLOCK, num_warps=8
    )
    return out


def launch_quantised(gate, up, dtype):
    gates, ups = gate.flatten(0, -2), up.flatten(0, -2)
    out, scale = quantise.empty_operand(gate, dtype)
    sizes, block = (gate.shape[-1], gates.stride(0), ups.stride(0)), power_of_two(gate.shape[-1])
    warps = quantise.warps_of_a_row(block)
    enqueue(
        _quantising_kernel,
        (len(gates),),
        gates,
        ups,
        out,
        scale,
        *sizes,
        *quantise.constants(dtype),
        block,
        num_warps=warps,
    )
    return out, scale


def gate_and_up(make, L: int, C: int, packed: int = 0) -> tuple:
    """Two tensors (L, C), or both halves of one."""
    return make(L, 2 * C).chunk(2, dim=-1) if packed else (make(L, C), make(L, C))


SPEC = Spec(
    name="swiglu",
    reference=reference,
    launch=launch,
    inputs=gate_and_up,
    cases=({"L": 3, "C": 40}, {"L": 5, "C": 2056, "packed": 1}, {"L": 1, "C": 4096}),
    model={"L": 4128, "C": 10240},
    least_bytes=lambda gate, up: 3 * bytes_of(gate),
)


def _quantised_spec(dtype: torch.dtype) -> Spec:
    def least_bytes(gate, up, dtype):
        return bytes_of(gate, up) + gate.numel() + 4 * gate.shape[:-1].numel()

    return quantise.quantised_spec(SPEC, dtype, reference_quantised, launch_quantised, least_bytes)


INT8_SPEC, FP8_SPEC = _quantised_spec(torch.int8), _quantised_spec(torch.float8_e4m3fn)
