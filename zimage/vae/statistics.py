"""Mean and variance of a map's groups, gathered while the map is written strip by strip.

Moments say of each block of positions what a norm needs to know, so that those of a map can come from several
processes: they are merged in the order of the blocks, wherever these were written.

Shapes: C channels, H × W positions, G groups, N blocks. Maps are (1, C, H, W) with the channels innermost.
"""

import math

import torch
from torch import Tensor

from zimage.kernels.group_norm import block_count, merge_moments, put_rows

SUMS = 2048  # sums side by side on a CPU: short ones are accurate, and few enough stay in the nearest cache


class Statistics:
    """What writes the rows of one map and then knows its groups; `groups` is 0 where no norm asks."""

    # Whether `write` adds a convolution's bias, in the pass that it makes anyway; else the convolution has added it.
    adds_bias: bool

    def __init__(self, groups: int):
        self.groups = groups
        self.moments: list[Tensor] = []  # each (3, C or G, N)

    def write(self, out: Tensor, rows: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        """out = rows + bias + residual; may overwrite `rows`."""
        raise NotImplementedError

    def measure(self, rows: Tensor) -> None:
        """Take the rows of a strip into account, after all of them have been written."""
        raise NotImplementedError

    def blocks(self, channels: int, positions: int, parts: int) -> int:
        """How many blocks a strip of so many positions has that is written in equal parts."""
        raise NotImplementedError

    def joined(self, like: Tensor) -> Tensor:
        """The moments of all rows of a map that were written; N is 0 if there were none."""
        raise NotImplementedError

    def of_groups(self) -> Tensor:
        """Mean and biased variance of every group, (2, G) fp32."""
        raise NotImplementedError


class ChannelStatistics(Statistics):
    """On a CPU: mean, variance and count of every channel of a strip while it lies in the cache, merged in fp64."""

    adds_bias = False

    def write(self, out: Tensor, rows: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        assert bias is None
        if residual is not None:
            rows += residual
        out.copy_(rows)

    def measure(self, rows: Tensor) -> None:
        if self.groups == 0:
            return
        mean, variance = (part.double() for part in channel_statistics(rows))
        count = torch.full_like(mean, rows.numel() // rows.shape[1])
        self.moments.append(torch.stack((mean, variance, count))[..., None])

    def blocks(self, channels: int, positions: int, parts: int) -> int:
        return 1

    def joined(self, like: Tensor) -> Tensor:
        return torch.cat([like.new_empty(3, like.shape[1], 0, dtype=torch.float64), *self.moments], dim=2)

    def of_groups(self) -> Tensor:
        mean, variance = merge_strips(torch.cat(self.moments, dim=2))
        means = mean.view(self.groups, -1)
        centre = means.mean(dim=1, keepdim=True)
        spread = variance.view(self.groups, -1) + (means - centre) ** 2
        return torch.stack((centre[:, 0], spread.mean(dim=1))).float()


class BlockMoments(Statistics):
    """On other devices: the pass that writes rows also takes the moments of their groups in blocks, merged once."""

    adds_bias = True

    def write(self, out: Tensor, rows: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        self.moments.append(put_rows(rows, bias, residual, out, self.groups)[1])

    def measure(self, rows: Tensor) -> None:
        pass  # `write` has

    def blocks(self, channels: int, positions: int, parts: int) -> int:
        return parts * block_count(channels, self.groups, positions // parts)

    def joined(self, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.cat([like.new_empty(3, self.groups, 0, dtype=dtype), *self.moments], dim=2)

    def of_groups(self) -> Tensor:
        return merge_moments(self.moments[0] if len(self.moments) == 1 else torch.cat(self.moments, dim=2))


def merge_strips(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each (C,) fp64, of strips (3, C, N), one after the other.

    Chan, Golub & LeVeque 1979.
    """
    total, mean, deviation = 0, *torch.zeros(2, moments.shape[1], dtype=torch.float64)
    for strip_mean, variance, counts in moments.unbind(2):
        before, count = total, int(counts[0])
        total += count
        shift = strip_mean - mean
        mean = mean + shift * (count / total)
        deviation = deviation + variance * count + shift**2 * (before * count / total)
    return mean, deviation / total


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,), fp32 or wider, of every channel of a map over all its positions, on a CPU."""
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
