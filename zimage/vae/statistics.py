"""Mean and variance of a map's groups, gathered while the map is written strip by strip.

Shapes: C channels, H × W positions, G groups. Maps are (1, C, H, W) with the channels innermost.
"""

import math

import torch
from torch import Tensor

from zimage.kernels.group_norm import merge_moments, put_rows

SUMS = 2048  # sums side by side on a CPU: short ones are accurate, and few enough stay in the nearest cache


class Statistics:
    """What writes the rows of one map and then knows its groups; `groups` is 0 where no norm asks."""

    # Whether `write` adds a convolution's bias, in the pass that it makes anyway; else the convolution has added it.
    adds_bias: bool

    def __init__(self, groups: int):
        self.groups = groups

    def write(self, out: Tensor, rows: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        """out = rows + bias + residual; may overwrite `rows`."""
        raise NotImplementedError

    def measure(self, rows: Tensor) -> None:
        """Take the rows of a strip into account, after all of them have been written."""
        raise NotImplementedError

    def of_groups(self) -> Tensor:
        """Mean and biased variance of every group, (2, G) fp32."""
        raise NotImplementedError


class ChannelStatistics(Statistics):
    """On a CPU: every channel of a strip while it lies in the cache; strips are merged in fp64.

    Chan, Golub & LeVeque 1979.
    """

    adds_bias = False

    def __init__(self, groups: int):
        super().__init__(groups)
        self.count = 0
        self.mean = self.deviation = torch.zeros((), dtype=torch.float64)  # deviation: sum of squares about the mean

    def write(self, out: Tensor, rows: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        assert bias is None
        if residual is not None:
            rows += residual
        out.copy_(rows)

    def measure(self, rows: Tensor) -> None:
        if self.groups == 0:
            return
        mean, variance = (part.double() for part in channel_statistics(rows))
        count = rows.numel() // rows.shape[1]
        total = self.count + count
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.deviation = self.deviation + variance * count + shift**2 * (self.count * count / total)
        self.count = total

    def of_groups(self) -> Tensor:
        means = self.mean.view(self.groups, -1)
        mean = means.mean(dim=1, keepdim=True)
        spread = self.deviation.view(self.groups, -1) / self.count + (means - mean) ** 2
        return torch.stack((mean[:, 0], spread.mean(dim=1))).float()


class BlockMoments(Statistics):
    """On other devices: the pass that writes rows also takes the moments of their blocks, which are merged once."""

    adds_bias = True

    def __init__(self, groups: int):
        super().__init__(groups)
        self.moments: list[Tensor] = []

    def write(self, out: Tensor, rows: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        self.moments.append(put_rows(rows, bias, residual, out, self.groups)[1])

    def measure(self, rows: Tensor) -> None:
        pass  # `write` has

    def of_groups(self) -> Tensor:
        return merge_moments(self.moments[0] if len(self.moments) == 1 else torch.cat(self.moments, dim=2))


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
