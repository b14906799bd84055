"""RMS norm over the last dimension, of a tensor and of a sum of two: the text encoder's, without a modulation.

Shapes: C channels; leading dimensions are tokens, however they are arranged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl, tokens_per_program

HALF = (torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension (Zhang & Sennrich 2019), in fp32 inside."""
    return choose(launch_plain, plain, x, weight)(x, weight, eps)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch in their dtype, and its RMS norm: what stands between two branches of a residual stream."""
    return choose(launch, reference, x, branch, weight)(x, branch, weight, eps)


def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype in HALF:
        return scaled_by_rms(x, weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def scaled_by_rms(x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """factor · x / √(mean(x²) + eps) in fp32, for `x` in half precision, in the fewest passes that PyTorch offers."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # √(sum of squares)
    return (x * (size.square() / x.shape[-1] + eps).rsqrt()).mul_(factor)


def reference(x, branch, weight, eps):
    x = x + branch
    return x, plain(x, weight, eps)


@jit
def _kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    tokens,
    channels,
    ADDS: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens. Without ADDS, `branch_ptr` and `sum_ptr` are not used."""
    first = tl.program_id(0) * ROWS
    column = tl.arange(0, BLOCK)
    present = column < channels
    weight = tl.load(weight_ptr + column, mask=present, other=0.0).to(tl.float32)
    for i in range(ROWS):
        there = present & (first + i < tokens)
        place = (first + i).to(tl.int64) * channels + column
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        if ADDS:
            x += tl.load(branch_ptr + place, mask=there, other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)  # the norm is that of the stream as it is stored
            tl.store(sum_ptr + place, rounded, mask=there)
            x = rounded.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, axis=0) / channels + EPS)
        tl.store(out_ptr + place, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=there)


def launch(x, branch, weight, eps):
    x, branch = x.contiguous(), branch.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, branch, weight, total, out, adds=True, eps=eps)
    return total, out


def launch_plain(x, weight, eps):
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, x, weight, out, out, adds=False, eps=eps)
    return out


def _launch(x, branch, weight, total, out, adds, eps):
    channels = x.shape[-1]
    tokens, block = x.numel() // channels, power_of_two(channels)
    rows, warps = tokens_per_program(tokens), min(max(block // 512, 1), 8)
    grid = (-(-tokens // rows),)
    enqueue(_kernel, grid, x, branch, weight, total, out, tokens, channels, adds, eps, rows, block, num_warps=warps)


SPEC = Spec(
    name="add_rms_norm",
    reference=reference,
    launch=launch,
    inputs=lambda make, L, C: (make(L, C), make(L, C), make(C), 1e-6),
    cases=({"L": 17, "C": 24}, {"L": 3, "C": 192}, {"L": 1, "C": 2560}),
    model={"L": 4096, "C": 2560},
    least_bytes=lambda x, branch, weight, eps: 4 * bytes_of(x) + bytes_of(weight),
)
PLAIN_SPEC = Spec(
    name="rms_norm",
    reference=plain,
    launch=launch_plain,
    inputs=lambda make, L, C, heads=1: (make(1, L, heads, C), make(C), 1e-6),
    cases=({"L": 17, "C": 24}, {"L": 3, "C": 192, "heads": 5}, {"L": 2, "C": 40}),
    model={"L": 4096, "C": 2560},
    least_bytes=lambda x, weight, eps: 2 * bytes_of(x) + bytes_of(weight),
)
