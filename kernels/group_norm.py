"""Group norm in two ops, channel statistics and normalisation, so that a map can be normalised strip by strip.

Shapes: B batch, C channels, H × W positions, P = B·H·W. Maps lie in memory with the channels innermost: (P, C).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl

POSITIONS = 512  # positions per program, which share one read or write of the values per channel
SUMS = 2048  # sums side by side on a CPU: short ones are accurate, and few enough stay in the nearest cache


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,), fp32 or wider, of every channel of a map (B, C, H, W) over all its positions."""
    return choose(launch_statistics, reference_statistics, x)(x)


def normalise(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(weight · (x − mean) / √(variance + eps) + bias) per channel of x (B, C, H, W), in fp32 inside.

    `mean` and `variance` (C,) fp32. With those of a channel's group this is GroupNorm (Wu & He 2018), then SiLU.
    """
    run = choose(launch_normalise, reference_normalise, x, weight, bias)
    return run(x, mean, variance, weight, bias, eps)


def reference_statistics(x):
    # Batch norm's own statistics: two passes over narrow values, the second about the mean (a mean of squares would
    # lose the variance of channels far from zero). It adds one row after the other: sums side by side stay accurate.
    channels = x.shape[1]
    columns = math.gcd(x.numel() // channels, max(SUMS // channels, 1))
    rows = x.permute(0, 2, 3, 1).reshape(-1, columns * channels)
    running = torch.zeros((2, rows.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    statistics = torch.batch_norm_update_stats(rows, running[0], running[1], momentum=0.0)
    means, variances = (each.view(columns, channels) for each in statistics)
    mean = means.mean(dim=0)
    return mean, (variances + (means - mean).square()).mean(dim=0)


def reference_normalise(x, mean, variance, weight, bias, eps):
    x = x.contiguous(memory_format=torch.channels_last)
    if x.dtype in (torch.float16, torch.bfloat16):
        weight, bias = weight.float(), bias.float()  # all arguments per channel must have one dtype
    return F.silu(F.batch_norm(x, mean, variance, weight, bias, eps=eps), inplace=True)


@jit
def _statistics_kernel(
    x_ptr,
    mean_ptr,
    deviation_ptr,
    positions,
    channels,
    POSITIONS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and sum of squared differences of each channel over POSITIONS positions, merged STEP by STEP (Chan 1979)."""
    first = tl.program_id(0).to(tl.int64) * POSITIONS
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    deviation = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for i in range(0, POSITIONS, STEP):
        position = first + i + tl.arange(0, STEP)
        there = (position < positions)[:, None] & (channel < channels)[None, :]
        x = tl.load(x_ptr + position[:, None] * channels + channel[None, :], mask=there, other=0.0).to(tl.float32)
        count = tl.minimum(tl.maximum(positions - first - i, 0), STEP).to(tl.float32)
        new_mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
        centred = tl.where(there, x - new_mean[None, :], 0.0)
        before = tl.minimum(positions - first, i).to(tl.float32)
        shift = new_mean - mean
        share = count / tl.maximum(before + count, 1.0)
        mean += shift * share
        deviation += tl.sum(centred * centred, axis=0) + shift * shift * before * share
    place = tl.program_id(0) * channels + channel
    tl.store(mean_ptr + place, mean, mask=channel < channels)
    tl.store(deviation_ptr + place, deviation, mask=channel < channels)


@jit
def _normalise_kernel(
    x_ptr,
    mean_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    positions,
    channels,
    POSITIONS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * POSITIONS
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    mean = tl.load(mean_ptr + channel, mask=known, other=0.0)[None, :]
    factor = tl.load(factor_ptr + channel, mask=known, other=0.0)[None, :]
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for i in range(0, POSITIONS, STEP):
        position = first + i + tl.arange(0, STEP)
        there = (position < positions)[:, None] & known[None, :]
        place = position[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        y = (x - mean) * factor + bias
        tl.store(out_ptr + place, (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty), mask=there)


def _grid(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """The grid over (P, C), and POSITIONS, STEP, BLOCK_C."""
    block = min(power_of_two(x.shape[1]), 128)
    return (-(-(x.numel() // x.shape[1]) // POSITIONS), -(-x.shape[1] // block)), (
        POSITIONS,
        min(4096 // block, 64),
        block,
    )


def launch_statistics(x):
    x = x.contiguous(memory_format=torch.channels_last)
    grid, blocks = _grid(x)
    positions, channels = x.numel() // x.shape[1], x.shape[1]
    means, deviations = torch.empty((2, grid[0], channels), device=x.device, dtype=torch.float32).unbind()
    enqueue(_statistics_kernel, grid, x, means, deviations, positions, channels, *blocks, num_warps=8)
    counts = torch.full((grid[0], 1), float(POSITIONS), device=x.device)
    counts[-1] = positions - POSITIONS * (grid[0] - 1)
    mean = (means * counts).sum(dim=0) / positions
    return mean, (deviations + counts * (means - mean) ** 2).sum(dim=0) / positions


def launch_normalise(x, mean, variance, weight, bias, eps):
    x = x.contiguous(memory_format=torch.channels_last)
    grid, blocks = _grid(x)
    out = torch.empty_like(x)
    factor = weight.float() * torch.rsqrt(variance + eps)
    enqueue(
        _normalise_kernel, grid, x, mean, factor, bias, out, x.numel() // x.shape[1], x.shape[1], *blocks, num_warps=8
    )
    return out


def _map(make, B: int, C: int, H: int, W: int) -> Tensor:
    return make(B, C, H, W).contiguous(memory_format=torch.channels_last)


def _normalise_inputs(make, B: int, C: int, H: int, W: int) -> tuple:
    variance = make(C).float().square() + 0.5
    return _map(make, B, C, H, W), make(C).float(), variance, make(C), make(C), 1e-6


CASES = ({"B": 1, "C": 8, "H": 7, "W": 83}, {"B": 2, "C": 40, "H": 5, "W": 9}, {"B": 1, "C": 256, "H": 3, "W": 6})
MODEL = {"B": 1, "C": 128, "H": 1024, "W": 1024}
STATISTICS_SPEC = Spec(
    name="channel_statistics",
    reference=reference_statistics,
    launch=launch_statistics,
    inputs=lambda make, **sizes: (_map(make, **sizes) + 3,),
    cases=CASES,
    model=MODEL,
    least_bytes=lambda x: bytes_of(x) + 8 * x.shape[1],
    rounds_once=False,
    stores_little=True,
)
NORMALISE_SPEC = Spec(
    name="group_norm_silu",
    reference=reference_normalise,
    launch=launch_normalise,
    inputs=_normalise_inputs,
    cases=CASES,
    model=MODEL,
    least_bytes=lambda x, mean, variance, weight, bias, eps: 2 * bytes_of(x) + bytes_of(mean, variance, weight, bias),
)
