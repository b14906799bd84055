"""SwiGLU, the gated activation in the feed-forward layers of both transformers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, tl

BLOCK = 2048


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise (Shazeer 2020), of equal shapes (…, C); rows may be strided (half a product)."""
    run = choose(launch, reference, gate, up)
    return run(gate, up)


def reference(gate, up):
    return F.silu(gate).mul_(up)


@jit
def _kernel(gate_ptr, up_ptr, out_ptr, channels, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = column < channels
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=present, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=present, other=0.0).to(tl.float32)
    activated = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * channels + column, activated, mask=present)


def launch(gate, up):
    C = gate.shape[-1]
    gates, ups = gate.flatten(0, -2), up.flatten(0, -2)  # views for halves of a packed product
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    enqueue(
        _kernel, (len(gates), -(-C // BLOCK)), gates, ups, out, C, gates.stride(0), ups.stride(0), BLOCK, num_warps=8
    )
    return out


def _inputs(make, L: int, C: int, packed: int = 0) -> tuple:
    return make(L, 2 * C).chunk(2, dim=-1) if packed else (make(L, C), make(L, C))


SPEC = Spec(
    name="swiglu",
    reference=reference,
    launch=launch,
    inputs=_inputs,
    cases=({"L": 3, "C": 40}, {"L": 5, "C": 2056, "packed": 1}, {"L": 1, "C": 4096}),
    model={"L": 4128, "C": 10240},
    least_bytes=lambda gate, up: 3 * bytes_of(gate),
)
