"""RMS norm over the channels of every pixel, then SiLU: what stands before the convolutions of the Wan VAE.

Shapes: C channels, H × W positions. Maps are (1, C, H, W) with the channels innermost; rows may lie apart.
"""

import torch.nn.functional as F
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl
from zimage.kernels.group_norm import innermost, places, sample_map
from zimage.kernels.rms_norm import plain

TILE = 8192  # values that a program of eight warps holds in registers


def channel_norm_silu(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """out = silu(weight · x / √(mean(x²) + eps)) with the mean over C, in fp32 inside; returns `out`."""
    return choose(launch, reference, x, weight)(x, weight, eps, out)


def reference(x, weight, eps, out):
    return out.copy_(F.silu(plain(x.permute(0, 2, 3, 1), weight, eps).permute(0, 3, 1, 2)))


@jit
def _kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    positions,
    channels,
    width,
    x_row,
    x_stride,
    out_row,
    out_stride,
    EPS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """STEP positions with all their channels."""
    first, channel = tl.program_id(0) * STEP, tl.arange(0, BLOCK)
    there = (first + tl.arange(0, STEP) < positions)[:, None] & (channel < channels)[None, :]
    place = places(first, positions, width, x_row, x_stride, channel, STEP)
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / channels + EPS)
    y = x * inverse[:, None] * weight[None, :]
    place = places(first, positions, width, out_row, out_stride, channel, STEP)
    tl.store(out_ptr + place, (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty), mask=there)


def launch(x, weight, eps, out):
    x = innermost(x)
    _, C, H, W = x.shape
    block = power_of_two(C)
    step = max(TILE // block, 1)
    given = (x, weight, out, H * W, C, W, *x.stride()[2:], *out.stride()[2:])
    enqueue(_kernel, (-(-H * W // step),), *given, eps, step, block, num_warps=8)
    return out


SPEC = Spec(
    name="channel_norm_silu",
    reference=reference,
    launch=launch,
    inputs=lambda make, apart=0, **sizes: (
        sample_map(make, apart=apart, **sizes),
        make(sizes["C"]),
        1e-12,
        sample_map(make, **sizes),
    ),
    cases=({"C": 8, "H": 29, "W": 83}, {"C": 96, "H": 5, "W": 9, "apart": 1}, {"C": 384, "H": 3, "W": 13}),
    model={"C": 96, "H": 1024, "W": 1024},
    least_bytes=lambda x, weight, eps, out: bytes_of(x, weight, out),
    in_place=(3,),
)
