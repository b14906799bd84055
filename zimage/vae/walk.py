"""Decoding and encoding in strips: the exact result of the whole pass in a fraction of its memory.

A strip is a band of rows over the full width. Every layer is walked strip by strip from one stored map to the next:

    rows of x, one more above and below → norm, SiLU → 3 × 3 convolution → rows of the next map
                                                                        └→ its statistics, for the norm after it

Only stored maps have full size, two at a time; everything between them is as small as a strip. GroupNorm needs the
statistics of a whole map, which are gathered while the map is written. Attention in the mid block, which sees every
position, runs whole, at the resolution of the latents. On a GPU the whole pass is a walk too, of one strip a map. A
convolution may overwrite its own input, since the rows that the next strip still needs are carried along. A residual
block that halves the channels puts its map and its shortcut into the memory of the map that it read; the blocks after
it use the same two.

The rows of a map may be divided over several processes (`zimage.vae.share`): each strip is computed where its rows
are, the same wherever that is.

Shapes: C channels, H × W positions. Maps are (1, C, H, W) with the channels innermost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.kernels import backend
from zimage.kernels.group_norm import normalise
from zimage.vae.layers import ChannelNorm, DecoderStack, ResnetBlock, Stack, convolve
from zimage.vae.share import ALONE, Bounds, Share
from zimage.vae.statistics import BlockMoments, ChannelStatistics, Statistics
from zimage.vae.windows import Rows, new_map, phase_weights, plain, two_maps, windows


def on_gpu(device: torch.device) -> bool:
    return device.type != "cpu"


def runs_kernels(device: torch.device) -> bool:
    """Whether maps on this device are written, measured and normalised by kernels."""
    return device.type == "cuda" and backend.ACTIVE


def strip_values(device: torch.device) -> int:
    """Values of a strip without a given height."""
    if not on_gpu(device):
        return 4 << 20  # small enough for the processor's cache
    # Work for every multiprocessor of a card, in few launches; references have copies in fp32 beside a strip.
    return 64 << 20 if runs_kernels(device) else 8 << 20


@dataclass
class Map:
    """A stored map, or the rows of one that this process has.

    `bounds` are None where every process has the whole. Its strips of `step` rows were written in `parts` each.
    """

    values: Tensor  # (1, C, rows, W)
    height: int
    statistics: Statistics
    bounds: Bounds | None = None
    step: int = 1
    parts: int = 1
    spare: Tensor | None = None  # memory for other values of this shape

    def blocks(self) -> list[int]:
        """How many blocks of positions the statistics of each process tell of."""
        _, channels, _, width = self.values.shape
        return [
            sum(
                self.statistics.blocks(channels, min(self.step, end - top) * width, self.parts)
                for top in range(first, end, self.step)
            )
            for first, end in pairwise(self.bounds or ())
        ]

    def alone(self) -> "Map":
        """The map with its values in memory of their own; the spare memory is released."""
        self.spare = None
        self.values = self.values.contiguous(memory_format=torch.channels_last)
        return self


class StripWalk:
    """Runs an encoder or a decoder layer by layer in strips of at most `height` rows of the picture's `pixels`.

    Maps of lower resolution have proportionally lower strips. Strips have at most `values` values, by default where no
    height is given. Of maps that are divided over several processes, each runs the strips of its share.
    """

    def __init__(self, stack: Stack, pixels: int, height: int | None, values: int | None = None, share: Share = ALONE):
        device = stack.conv_in.weight.device
        self.stack, self.pixels, self.height, self.share = stack, pixels, height, share
        self.values = values or (strip_values(device) if height is None else None)
        self.groups = next((module.num_groups for module in stack.modules() if isinstance(module, nn.GroupNorm)), 0)
        self.gathers: type[Statistics] = BlockMoments if on_gpu(device) else ChannelStatistics

    def run(self, x: Tensor) -> Tensor:
        """What the stack makes of a batch, sample by sample."""
        one = self.decode if isinstance(self.stack, DecoderStack) else self.encode
        return torch.cat([one(sample) for sample in x.split(1)])

    def decode(self, z: Tensor) -> Tensor:
        """Picture (1, 3, H, W) of unscaled latents (1, 16, h, w)."""
        return self._head(self._through_layers(self._middle(self.stack.conv_in(z))))

    def encode(self, image: Tensor) -> Tensor:
        """Moments (1, 2·16, h, w) of a picture (1, 3, H, W)."""
        first, x = self.stack.conv_in, Map(image, image.shape[2], self.gathers(0))
        step = self._rows(x, first)
        x = self._convolve(self._placed(x, step), first, step)
        return self._head(self._middle(self._everywhere(self._through_layers(x))))

    def _middle(self, values: Tensor) -> Map:
        """The mid block, which runs whole on a CPU; elsewhere its attention does."""
        middle = self.stack.mid_block
        if not on_gpu(values.device):
            return self._measured(middle.last(self._attend(middle.first(values))))
        x = self._residual(middle.first, self._measured(values))
        return self._residual(middle.last, self._measured(self._attend(self._everywhere(x.alone()))))

    def _attend(self, x: Tensor) -> Tensor:
        attention = self.stack.mid_block.attention
        return attention.leave(x, self.share.attend(*attention.enter(x)))

    def _measured(self, values: Tensor) -> Map:
        """A map that is written already, for a norm."""
        values = values.contiguous(memory_format=torch.channels_last)
        statistics = self.gathers(self.groups)
        statistics.write(values, values)
        statistics.measure(values)
        return Map(values, values.shape[2], statistics)

    def _through_layers(self, x: Map) -> Map:
        for layer in self.stack.layers():
            x = self._residual(layer, x) if isinstance(layer, ResnetBlock) else self._resample(layer, x)
        return x

    def _resample(self, layer: nn.Module, x: Map) -> Map:
        conv = next(module for module in layer.modules() if isinstance(module, nn.Conv2d))
        return (self._halve if conv.stride == (2, 2) else self._double)(conv, x.alone())

    def _head(self, x: Map) -> Tensor:
        before, conv = self._activation(self.stack.last_norm(), x), self.stack.conv_out
        step = self._rows(x, conv)
        return self._everywhere(self._convolve(self._placed(x, step), conv, step, before, groups=0))

    def _residual(self, block: ResnetBlock, x: Map) -> Map:
        """The second convolution's strips are so many of the first's, so that no row of a block changes its place."""
        step, before, shortcut = self._rows(x, block.conv1), self._activation(block.norm1, x), block.conv_shortcut
        wide = max(1, self._rows(x, block.conv2) // step) * step
        x = self._placed(x, wide)
        out, residual = x.spare, x.values
        if shortcut is not None:
            out, residual = two_maps(x.values, shortcut.out_channels)
        h = self._convolve(x, block.conv1, step, before, out, shortcut=shortcut, kept=residual)
        y = self._convolve(h, block.conv2, wide, self._activation(block.norm2, h), h.values, residual)
        y.spare = residual
        return y

    def _convolve(
        self,
        x: Map,
        conv: nn.Conv2d,
        step: int,
        before: Rows = plain,
        out: Tensor | None = None,
        residual: Tensor | None = None,
        shortcut: nn.Conv2d | None = None,
        kept: Tensor | None = None,
        groups: int | None = None,
    ) -> Map:
        """conv(before(x)) + residual with a 3 × 3 kernel; also writes shortcut(x) into `kept`.

        `out` may be the values of `x`; `out` and `kept` may be the result of `two_maps` for them. `groups`: which a
        norm reads.
        """
        rows = x.values
        out = new_map(rows, conv.out_channels, rows.shape[2], rows.shape[3]) if out is None else out
        statistics, unread = self.gathers(self.groups if groups is None else groups), self.gathers(0)
        for top, end, window in windows(rows, step, before, *self.share.edges(rows, x.bounds)):
            if shortcut is not None and kept is not None:
                unread.write(kept[:, :, top:end], *self._product(rows[:, :, top:end], shortcut))
            made, bias = self._product(window, conv, padding=(0, 1))
            statistics.write(out[:, :, top:end], made, bias, None if residual is None else residual[:, :, top:end])
            statistics.measure(made)
        return Map(out, x.height, statistics, x.bounds, step)

    def _product(
        self, x: Tensor, conv: nn.Conv2d, stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor | None]:
        """A convolution and the bias that `write` has to add."""
        if self.gathers.adds_bias:
            return convolve(x, conv.weight, None, stride, padding), conv.bias
        return convolve(x, conv.weight, conv.bias, stride, padding), None

    def _halve(self, conv: nn.Conv2d, x: Map) -> Map:
        """3 × 3 at stride 2 with one row and column of zeros at the bottom and right, as the reference was trained."""
        height, step = x.height // 2, max(1, self._rows(x, conv) // 2)
        bounds, rank = self.share.bounds(height, step), self.share.rank
        rows = self._moved(x, (*(2 * first for first in bounds[:-1]), x.height)).values
        below = self.share.edges(rows, x.bounds)[1]
        out = new_map(rows, conv.out_channels, bounds[rank + 1] - bounds[rank], rows.shape[3] // 2)
        statistics = self.gathers(self.groups)
        for top in range(0, out.shape[2], step):
            end = min(top + step, out.shape[2])
            band = rows[:, :, 2 * top : 2 * end + 1]
            if below is not None and 2 * end == rows.shape[2]:
                band = torch.cat((band, below), dim=2)
            band = F.pad(band, (0, 1, 0, 2 * (end - top) + 1 - band.shape[2]))
            made, bias = self._product(band, conv, stride=2)
            statistics.write(out[:, :, top:end], made, bias)
            statistics.measure(made)
        return Map(out, height, statistics, bounds, step)

    def _double(self, conv: nn.Conv2d, x: Map) -> Map:
        """Nearest × 2, then 3 × 3, as four 2 × 2 convolutions of the small map: 4/9 of the products, no doubled map."""
        step = max(1, self._rows(x, conv, scale=2) // 2)
        rows = self._placed(x, step).values
        height, width = rows.shape[2:]
        out, statistics = new_map(rows, conv.out_channels, 2 * height, 2 * width), self.gathers(self.groups)
        by_row, bias = phase_weights(conv.weight).chunk(2), conv.get_parameter("bias")
        early, late = (None, bias) if statistics.adds_bias else (bias.repeat(2), None)
        for top, end, window in windows(rows, step, plain, *self.share.edges(rows, x.bounds)):
            for row, kernels in enumerate(by_row):
                band = window[:, :, row : row + end - top + 1]
                columns = convolve(band, kernels, early, padding=(0, 1)).chunk(2, dim=1)  # each (1, C, rows, W + 1)
                place = out[:, :, 2 * top + row : 2 * end : 2]
                statistics.write(place[..., ::2], columns[0][..., :width], late)
                statistics.write(place[..., 1::2], columns[1][..., 1:], late)
                del columns  # before the next are made
            statistics.measure(out[:, :, 2 * top : 2 * end])
        return Map(out, 2 * x.height, statistics, tuple(2 * first for first in x.bounds or ()), 2 * step, parts=4)

    def _rows(self, x: Map, conv: nn.Conv2d, scale: int = 1) -> int:
        """The number of rows in a strip of `x`, or of a map `scale` times as large: an even one, or 1.

        Strips of a map that is halved or doubled so have the borders of those before or after it.
        """
        width, limits = scale * x.values.shape[3], []
        if self.height is not None:
            limits.append(self.height * scale * x.height // self.pixels)
        if self.values is not None:
            limits.append(self.values // (max(conv.in_channels, conv.out_channels) * width))
        return max(1, min(limits) // 2 * 2)

    # ------------------------------------------------------------------ what other processes have

    def _placed(self, x: Map, step: int) -> Map:
        """`x` with the rows here whose strips, of `step` rows, are computed here."""
        return self._moved(x, self.share.bounds(x.height, step))

    def _moved(self, x: Map, bounds: Bounds) -> Map:
        if x.bounds != bounds and self.share.size > 1:
            x.spare = None
            x.values = self.share.moved(x.values, x.bounds, bounds)
        x.bounds = bounds
        return x

    def _everywhere(self, x: Map) -> Tensor:
        """The whole map, in every process."""
        return self.share.whole(x.values, x.bounds)

    def _activation(self, norm: nn.Module, x: Map) -> Rows:
        """norm and SiLU for rows of `x`: a GroupNorm takes the statistics of all of `x`, others look at one pixel."""
        if isinstance(norm, ChannelNorm):
            return norm.activated
        assert isinstance(norm, nn.GroupNorm)
        if x.bounds is not None and self.share.size > 1:
            x.statistics.moments = [self.share.gathered(x.statistics.joined(x.values), x.blocks())]
        statistics = x.statistics.of_groups()
        return lambda rows, out: normalise(rows, statistics, norm.weight, norm.bias, norm.eps, out)


Walk = Callable[[Stack, int, int | None], StripWalk]  # (stack, rows of the picture, rows of a strip)
