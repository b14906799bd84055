"""Group norm with SiLU in three ops, so that a map can be written, measured and normalised strip by strip.

    put_rows       rows of a convolution + bias + residual → rows of a map, and the moments of every block of them
    merge_moments  moments of all blocks of a map → mean and variance of its groups
    normalise      rows of a map → norm and SiLU → what the next convolution reads

Every map is written once and read once for this, besides the convolutions.

Shapes: C channels, H × W positions, G groups of D = C/G channels, N blocks of positions. Maps and rows of maps are
(1, C, H, W) with the channels innermost; rows and positions may lie apart, as in a view.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl

CHANNELS, POSITIONS = 128, 512  # of a tile, at most
TILE = 8192  # values that a program of eight warps holds in registers: 32 per thread
TILES = 4  # that a program normalises, which share one read of the values per channel
BLOCKS = 1024  # whose moments are merged side by side


def put_rows(
    rows: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """out = rows + bias + residual, rounded once; returns `out` and its moments (3, G, N) fp32 (none for 0 groups).

    All maps have the shape (1, C, H, W), bias (C,); `out` may be `rows` or `residual`. The moments are the mean, the
    sum of squared differences from it and the count of the values of each group in each block of positions.
    """
    fits = groups == 0 or power_of_two(out.shape[1] // groups) == out.shape[1] // groups
    run = choose(launch_put, reference_put, rows, out) if fits else reference_put
    return run(rows, bias, residual, out, groups)


def block_count(channels: int, groups: int, positions: int) -> int:
    """How many blocks of a map `put_rows` gives the moments of."""
    return -(-positions // _tile(channels, groups, TILE)[0])


def merge_moments(moments: Tensor) -> Tensor:
    """Mean and biased variance (2, G) fp32 of groups whose values lie in N blocks with these moments (3, G, N).

    Chan, Golub & LeVeque 1979: no difference of large squares, so groups far from zero keep their variance.
    """
    return choose(launch_merge, reference_merge, moments)(moments)


def normalise(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> Tensor:
    """out = silu(weight · (x − mean) / √(variance + eps) + bias), in fp32 inside; returns `out`.

    `statistics` (2, G) fp32 holds mean and variance of the groups: GroupNorm (Wu & He 2018), then SiLU.
    """
    run = choose(launch_normalise, reference_normalise, x, weight, bias)
    return run(x, statistics, weight, bias, eps, out)


def reference_put(rows, bias, residual, out, groups):
    total = rows.to(torch.promote_types(rows.dtype, torch.float32))
    for part in (None if bias is None else bias[:, None, None], residual):
        total = total if part is None else total + part
    out.copy_(total)
    values = out.permute(0, 2, 3, 1).flatten(0, 2)  # (P, C)
    step = _tile(out.shape[1], groups, TILE)[0]
    whole = values.shape[0] // step * step
    parts = [values[:whole].unflatten(0, (-1, step)), values[whole:][None]]
    return out, torch.cat([_moments(part, groups) for part in parts if part.numel()], dim=2)


def _moments(values: Tensor, groups: int) -> Tensor:
    """Moments (3, G, N) of values (N, P, C)."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    if groups == 0:
        return torch.empty((3, 0, values.shape[0]), dtype=dtype, device=values.device)
    grouped = values.unflatten(2, (groups, -1)).to(dtype)  # (N, P, G, D)
    mean = grouped.mean(dim=(1, 3))
    deviation = (grouped - mean[:, None, :, None]).square().sum(dim=(1, 3))
    count = torch.full_like(mean, grouped.shape[1] * grouped.shape[3])
    return torch.stack((mean.T, deviation.T, count.T))


def reference_merge(moments):
    means, deviations, counts = moments
    total = counts.sum(dim=1)
    first = means[:, 0]
    mean = first + ((means - first[:, None]) * counts).sum(dim=1) / total
    deviation = deviations + counts * (means - mean[:, None]).square()
    return torch.stack((mean, deviation.sum(dim=1) / total))


def reference_normalise(x, statistics, weight, bias, eps, out):
    mean, variance = statistics.repeat_interleave(x.shape[1] // statistics.shape[1], dim=1)  # (C,) each
    if x.device.type != "cpu":
        x = x.to(mean.dtype)  # not every device mixes dtypes here
    x = x.contiguous(memory_format=torch.channels_last)
    if x.dtype in (torch.float16, torch.bfloat16) or x.device.type != "cpu":
        weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)  # all arguments per channel must have one dtype
    return out.copy_(F.silu(F.batch_norm(x, mean, variance, weight, bias, eps=eps), inplace=True))


@jit
def places(first, positions, width, row_stride, stride, channel, STEP: tl.constexpr):
    """Offsets of STEP positions from `first` on in a map: (STEP, channels), int64."""
    position = first + tl.arange(0, STEP)
    rows = (position // width).to(tl.int64) * row_stride + (position % width).to(tl.int64) * stride
    return rows[:, None] + channel[None, :]


@jit
def _put_kernel(
    rows_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    moments_ptr,
    positions,
    channels,
    width,
    rows_row,
    rows_stride,
    residual_row,
    residual_stride,
    out_row,
    out_stride,
    groups,
    DEPTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """STEP positions of BLOCK_C channels, which are whole groups of DEPTH channels."""
    first = tl.program_id(0) * STEP
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    there = (first + tl.arange(0, STEP) < positions)[:, None] & known[None, :]
    place = places(first, positions, width, rows_row, rows_stride, channel, STEP)
    value = tl.load(rows_ptr + place, mask=there, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        place = places(first, positions, width, residual_row, residual_stride, channel, STEP)
        value += tl.load(residual_ptr + place, mask=there, other=0.0).to(tl.float32)
    stored = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places(first, positions, width, out_row, out_stride, channel, STEP), stored, mask=there)
    if moments_ptr is not None:
        value = tl.where(there, stored.to(tl.float32), 0.0)
        count = (tl.minimum(positions - first, STEP) * DEPTH).to(tl.float32)
        mean = tl.sum(tl.reshape(tl.sum(value, axis=0), (BLOCK_C // DEPTH, DEPTH)), axis=1) / count
        of_channel = tl.reshape(tl.broadcast_to(mean[:, None], (BLOCK_C // DEPTH, DEPTH)), (BLOCK_C,))
        centred = tl.where(there, value - of_channel[None, :], 0.0)
        deviation = tl.sum(tl.reshape(tl.sum(centred * centred, axis=0), (BLOCK_C // DEPTH, DEPTH)), axis=1)
        blocks = tl.num_programs(0)
        group = tl.program_id(1) * (BLOCK_C // DEPTH) + tl.arange(0, BLOCK_C // DEPTH)
        place = moments_ptr + group * blocks + tl.program_id(0)
        tl.store(place, mean, mask=group < groups)
        tl.store(place + groups * blocks, deviation, mask=group < groups)
        tl.store(place + 2 * groups * blocks, tl.zeros_like(mean) + count, mask=group < groups)


@jit
def _merge_kernel(moments_ptr, out_ptr, groups, blocks, BLOCKS: tl.constexpr):
    """One group: lane by lane first, then all lanes."""
    group = tl.program_id(0)
    count = tl.zeros((BLOCKS,), dtype=tl.float32)
    mean = tl.zeros((BLOCKS,), dtype=tl.float32)
    deviation = tl.zeros((BLOCKS,), dtype=tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        place = moments_ptr + group * blocks + block
        new_mean = tl.load(place, mask=block < blocks, other=0.0)
        new_deviation = tl.load(place + groups * blocks, mask=block < blocks, other=0.0)
        new_count = tl.load(place + 2 * groups * blocks, mask=block < blocks, other=0.0)
        share = new_count / tl.maximum(count + new_count, 1.0)
        shift = new_mean - mean
        mean += shift * share
        deviation += new_deviation + shift * shift * count * share
        count += new_count
    total = tl.sum(count, axis=0)
    # Lanes are averaged about one of them: sums of large means would round.
    origin = tl.max(tl.where(count > 0.0, mean, float("-inf")), axis=0)
    shift = tl.where(count > 0.0, mean - origin, 0.0)
    centre = tl.sum(shift * count, axis=0) / total
    deviation += count * (shift - centre) * (shift - centre)
    tl.store(out_ptr + group, origin + centre)
    tl.store(out_ptr + groups + group, tl.sum(deviation, axis=0) / total)


@jit
def _normalise_kernel(
    x_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    positions,
    channels,
    width,
    x_row,
    x_stride,
    out_row,
    out_stride,
    groups,
    EPS: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    group = channel // (channels // groups)
    mean = tl.load(statistics_ptr + group, mask=known, other=0.0)
    variance = tl.load(statistics_ptr + groups + group, mask=known, other=1.0)
    factor = tl.load(weight_ptr + channel, mask=known, other=0.0).to(tl.float32) * tl.rsqrt(variance + EPS)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    for i in range(TILES):
        first = (tl.program_id(0) * TILES + i) * STEP
        there = (first + tl.arange(0, STEP) < positions)[:, None] & known[None, :]
        place = places(first, positions, width, x_row, x_stride, channel, STEP)
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * factor[None, :] + bias[None, :]
        place = places(first, positions, width, out_row, out_stride, channel, STEP)
        tl.store(out_ptr + place, (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty), mask=there)


def _tile(channels: int, groups: int, values: int) -> tuple[int, int]:
    """Positions and channels of a tile; its channels are whole groups."""
    block = max(min(power_of_two(channels), CHANNELS), channels // groups if groups else 1)
    return max(min(values // block, POSITIONS), 1), block


def launch_put(rows, bias, residual, out, groups):
    _, C, H, W = out.shape
    rows, residual = innermost(rows), None if residual is None else innermost(residual)
    step, block = _tile(C, groups, TILE)
    grid = (block_count(C, groups, H * W), -(-C // block))
    moments = torch.empty((3, groups, grid[0]), dtype=torch.float32, device=out.device)
    strides = [stride for each in (rows, rows if residual is None else residual, out) for stride in each.stride()[2:]]
    given = (rows, bias, residual, out, moments if groups else None, H * W, C, W, *strides, groups)
    enqueue(_put_kernel, grid, *given, C // groups if groups else 1, step, block, num_warps=8)
    return out, moments


def launch_merge(moments):
    moments = moments.contiguous()
    _, groups, blocks = moments.shape
    out = torch.empty((2, groups), dtype=torch.float32, device=moments.device)
    enqueue(_merge_kernel, (groups,), moments, out, groups, blocks, BLOCKS, num_warps=8)
    return out


def launch_normalise(x, statistics, weight, bias, eps, out):
    x = innermost(x)
    _, C, H, W = x.shape
    step, block = _tile(C, 0, TILE // 2)  # beside three values per channel
    grid = (-(-H * W // (TILES * step)), -(-C // block))
    strides, groups = (*x.stride()[2:], *out.stride()[2:]), statistics.shape[1]
    given = (x, statistics, weight, bias, out, H * W, C, W, *strides, groups)
    enqueue(_normalise_kernel, grid, *given, eps, TILES, step, block, num_warps=8)
    return out


def innermost(x: Tensor) -> Tensor:
    """The map with its channels innermost: itself, unless a convolution chose another layout."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def sample_map(make, C: int, H: int, W: int, apart: int = 0) -> Tensor:
    """A map (1, C, H, W); with `apart`, every second row of one that is twice as high."""
    whole = make(1, C, H * (1 + apart), W).contiguous(memory_format=torch.channels_last)
    return whole[:, :, :: 1 + apart]


def _put_inputs(make, C: int, H: int, W: int, G: int, apart: int = 0, plain: int = 0) -> tuple:
    rows, out = sample_map(make, C, H, W), sample_map(make, C, H, W, apart)
    if plain:
        return rows, None, None, out, G
    return rows + 3, make(C), sample_map(make, C, H, W, apart), out, G


def _normalise_inputs(make, C: int, H: int, W: int, G: int, apart: int = 0) -> tuple:
    statistics = torch.stack((make(G).float(), make(G).float().square() + 0.5))
    return sample_map(make, C, H, W, apart), statistics, make(C), make(C), 1e-6, sample_map(make, C, H, W)


def _moments_inputs(make, G: int, N: int) -> tuple:
    values = make(3, G, N).float()
    return (torch.stack((values[0] + 1000, 500 * values[1].square(), (100 * values[2].square()).ceil())),)


CASES = (
    {"C": 8, "H": 29, "W": 83, "G": 4},
    {"C": 48, "H": 5, "W": 9, "G": 12, "apart": 1},
    {"C": 256, "H": 3, "W": 43, "G": 32},
)
MODEL = {"C": 128, "H": 1024, "W": 1024, "G": 32}
PUT_SPEC = Spec(
    name="put_rows",
    reference=reference_put,
    launch=launch_put,
    inputs=_put_inputs,
    cases=(*CASES, {"C": 3, "H": 30, "W": 91, "G": 0}, {"C": 64, "H": 4, "W": 50, "G": 2, "plain": 1}),
    model=MODEL,
    least_bytes=lambda rows, bias, residual, out, groups: bytes_of(
        *(t for t in (rows, bias, residual, out) if t is not None)
    ),
    in_place=(3,),
    of_rounded=True,
)
MERGE_SPEC = Spec(
    name="merge_moments",
    reference=reference_merge,
    launch=launch_merge,
    inputs=_moments_inputs,
    cases=({"G": 2, "N": 5000}, {"G": 3, "N": 37}, {"G": 4, "N": 1}),
    model={"G": 32, "N": 16384},
    least_bytes=lambda moments: bytes_of(moments) + 8 * moments.shape[1],
    rounds_once=False,
    stores_little=True,
)
NORMALISE_SPEC = Spec(
    name="group_norm_silu",
    reference=reference_normalise,
    launch=launch_normalise,
    inputs=_normalise_inputs,
    cases=({**CASES[0], "H": 60}, {"C": 40, "H": 5, "W": 9, "G": 4, "apart": 1}, CASES[2]),
    model=MODEL,
    least_bytes=lambda x, statistics, weight, bias, eps, out: bytes_of(x, statistics, weight, bias, out),
    in_place=(5,),
)
