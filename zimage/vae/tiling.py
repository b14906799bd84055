"""Decoding and encoding in strips: the exact result of the whole pass in a fraction of its memory.

A strip is a band of rows over the full width. Every layer is walked strip by strip from one stored map to the next:

    rows of x, one more above and below → norm, SiLU → 3 × 3 convolution → rows of the next map
                                                                        └→ its statistics, for the norm after it

Only stored maps have full size, two at a time; everything between them is as small as a strip. GroupNorm needs the
statistics of a whole map, which are gathered while the map is written. The mid block, whose attention sees every
position, runs whole, at the resolution of the latents. A convolution may overwrite its own input, since the rows that
the next strip still needs are carried along. A residual block that halves the channels puts its map and its shortcut
into the memory of the map that it read; the blocks after it use the same two.

Shapes: C channels, H × W positions. Maps are (1, C, H, W) with the channels innermost.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.errors import RequestError, quoted
from zimage.kernels.group_norm import channel_statistics, normalise
from zimage.settings.declared import BLEND_TILE, TILE_MODES, TILE_OVERLAP
from zimage.vae.blend import blend
from zimage.vae.layers import DecoderStack, EncoderStack, ResnetBlock, Stack

Rows = Callable[[Tensor], Tensor]
STRIP_VALUES = 4 << 20  # values of a strip without a given height: small enough for the processor's cache


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut for the VAE; `size` and `overlap` in pixels. Raises RequestError.

    "off" runs the VAE on the whole, "exact" on strips of `size` rows, "blend" on overlapping tiles of `size` × `size`.
    """

    mode: str = "off"
    size: int | None = None
    overlap: int = TILE_OVERLAP

    def __post_init__(self):
        if self.mode not in TILE_MODES:
            raise RequestError(f"tile_mode {quoted(self.mode)} is not known; use {', '.join(TILE_MODES)}")
        if self.size is not None and self.size < 8:
            raise RequestError(f"tile_size {self.size} is too small; it must be at least 8")
        tile = self.size or BLEND_TILE
        if self.mode == "blend" and not 0 <= self.overlap < tile:
            raise RequestError(f"tile_overlap {self.overlap} must be at least 0 and below the tile_size {tile}")

    def decode(self, decoder: DecoderStack, z: Tensor, factor: int) -> Tensor:
        """decoder(z) of unscaled latents (B, 16, h, w) at `factor` pixels per latent."""
        if self.mode == "off":
            return decoder(z)
        if self.mode == "blend":
            return blend(decoder, z, *self._in_steps_of(factor))
        walk = StripWalk(decoder, z.shape[2] * factor, self.size)
        return torch.cat([walk.decode(sample) for sample in z.split(1)])

    def encode(self, encoder: EncoderStack, images: Tensor, factor: int) -> Tensor:
        """encoder(images) of pictures (B, 3, H, W)."""
        if self.mode == "off":
            return encoder(images)
        if self.mode == "blend":
            tile, overlap = self._in_steps_of(factor)
            return blend(encoder, images, tile * factor, overlap * factor)
        walk = StripWalk(encoder, images.shape[2], self.size)
        return torch.cat([walk.encode(image) for image in images.split(1)])

    def _in_steps_of(self, factor: int) -> tuple[int, int]:
        """Tile and overlap in latents; at least one latent of every tile lies outside the overlap."""
        tile = max((self.size or BLEND_TILE) // factor, 2)
        return tile, min(self.overlap // factor, tile - 1)


OFF = Tiling()


class Statistics:
    """Mean and variance of each channel of a map, gathered over its strips (Chan, Golub & LeVeque 1979)."""

    def __init__(self, needed: bool = True) -> None:
        self.needed = needed  # False: no norm reads them, so they are not computed
        self.count = 0
        self.mean = self.deviation = torch.zeros((), dtype=torch.float64)  # deviation: sum of squares about the mean

    def add(self, rows: Tensor) -> None:
        if not self.needed:
            return
        mean, variance = (part.double() for part in channel_statistics(rows))
        count = rows.numel() // rows.shape[1]
        total = self.count + count
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.deviation = self.deviation + variance * count + shift**2 * (self.count * count / total)
        self.count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel's group, (C,) fp32."""
        means = self.mean.view(groups, -1)
        mean = means.mean(dim=1, keepdim=True)
        spread = self.deviation.view(groups, -1) / self.count + (means - mean) ** 2
        variance = spread.mean(dim=1, keepdim=True)
        mean, variance = (values.expand_as(means).flatten().float() for values in (mean, variance))
        return mean, variance


@dataclass
class Map:
    values: Tensor  # (1, C, H, W)
    statistics: Statistics
    spare: Tensor | None = None  # memory for another map of its shape

    def alone(self) -> Tensor:
        """The values in memory of their own; the spare map is released."""
        self.spare = None
        self.values = self.values.contiguous(memory_format=torch.channels_last)
        return self.values


class StripWalk:
    """Runs an encoder or a decoder layer by layer in strips of at most `height` rows of the picture's `pixels`.

    Maps of lower resolution have proportionally lower strips. Without `height`, strips have a fixed number of values.
    """

    def __init__(self, stack: Stack, pixels: int, height: int | None):
        self.stack, self.pixels, self.height = stack, pixels, height
        self.needs_statistics = any(isinstance(module, nn.GroupNorm) for module in stack.modules())

    def decode(self, z: Tensor) -> Tensor:
        """Picture (1, 3, H, W) of unscaled latents (1, 16, h, w)."""
        return self._head(self._through_layers(self._whole(self.stack.mid_block(self.stack.conv_in(z)))))

    def encode(self, image: Tensor) -> Tensor:
        """Moments (1, 2·16, h, w) of a picture (1, 3, H, W)."""
        x = self._through_layers(self._convolve(image, self.stack.conv_in))
        return self._head(self._whole(self.stack.mid_block(x.values)))

    def _whole(self, values: Tensor) -> Map:
        x = Map(values, Statistics(self.needs_statistics))
        x.statistics.add(values)
        return x

    def _through_layers(self, x: Map) -> Map:
        for layer in self.stack.layers():
            x = self._residual(layer, x) if isinstance(layer, ResnetBlock) else self._resample(layer, x)
        return x

    def _resample(self, layer: nn.Module, x: Map) -> Map:
        conv = next(module for module in layer.modules() if isinstance(module, nn.Conv2d))
        return (self._halve if conv.stride == (2, 2) else self._double)(conv, x.alone())

    def _head(self, x: Map) -> Tensor:
        return self._convolve(x.values, self.stack.conv_out, activation(self.stack.last_norm(), x)).values

    def _residual(self, block: ResnetBlock, x: Map) -> Map:
        out, residual, shortcut = x.spare, x.values, block.conv_shortcut
        if shortcut is not None:
            out, residual = two_maps(x.values, shortcut.out_channels)
        h = self._convolve(x.values, block.conv1, activation(block.norm1, x), out, shortcut=shortcut, kept=residual)
        y = self._convolve(h.values, block.conv2, activation(block.norm2, h), h.values, residual)
        return Map(y.values, y.statistics, spare=residual)

    def _convolve(
        self,
        x: Tensor,
        conv: nn.Conv2d,
        before: Rows = lambda rows: rows,
        out: Tensor | None = None,
        residual: Tensor | None = None,
        shortcut: nn.Conv2d | None = None,
        kept: Tensor | None = None,
    ) -> Map:
        """conv(before(x)) + residual with a 3 × 3 kernel; also writes shortcut(x) into `kept`.

        `out` may be `x` itself; `out` and `kept` may be the result of `two_maps` for it.
        """
        out = new_map(x, conv.out_channels, x.shape[2], x.shape[3]) if out is None else out
        statistics = Statistics(self.needs_statistics)
        for top, end, window in windows(x, self._rows(x, conv), before):
            rows = F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))
            if residual is not None:
                rows += residual[:, :, top:end]
            if shortcut is not None and kept is not None:
                kept[:, :, top:end] = shortcut(x[:, :, top:end])
            out[:, :, top:end] = rows
            statistics.add(rows)
        return Map(out, statistics)

    def _halve(self, conv: nn.Conv2d, x: Tensor) -> Map:
        """3 × 3 at stride 2 with one row and column of zeros at the bottom and right, as the reference was trained."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        out, statistics = new_map(x, conv.out_channels, height, width), Statistics(self.needs_statistics)
        step = max(1, self._rows(x, conv) // 2)
        for top in range(0, height, step):
            end = min(top + step, height)
            band = x[:, :, 2 * top : 2 * end + 1]
            band = F.pad(band, (0, 1, 0, 2 * (end - top) + 1 - band.shape[2]))
            rows = F.conv2d(band, conv.weight, conv.bias, stride=2)
            out[:, :, top:end] = rows
            statistics.add(rows)
        return Map(out, statistics)

    def _double(self, conv: nn.Conv2d, x: Tensor) -> Map:
        """Nearest × 2, then 3 × 3, as four 2 × 2 convolutions of the small map: 4/9 of the products, no doubled map."""
        height, width = x.shape[2:]
        out, statistics = new_map(x, conv.out_channels, 2 * height, 2 * width), Statistics(self.needs_statistics)
        weight, bias = phase_weights(conv.weight), conv.get_parameter("bias").repeat(4)
        by_row = tuple(zip(weight.chunk(2), bias.chunk(2), strict=True))
        for top, end, window in windows(x, max(1, self._rows(x, conv) // 4), lambda rows: rows):
            for row, (kernels, offsets) in enumerate(by_row):
                band = window[:, :, row : row + end - top + 1]
                phases = F.conv2d(band, kernels, offsets, padding=(0, 1)).chunk(2, dim=1)  # each (1, C, rows, W + 1)
                for column, phase in enumerate(phases):
                    out[:, :, 2 * top + row : 2 * end : 2, column::2] = phase[:, :, :, column : column + width]
            statistics.add(out[:, :, 2 * top : 2 * end])
        return Map(out, statistics)

    def _rows(self, x: Tensor, conv: nn.Conv2d) -> int:
        """The number of rows in a strip of `x`."""
        if self.height is None:
            return max(1, STRIP_VALUES // (max(x.shape[1], conv.out_channels) * x.shape[3]))
        return max(1, self.height * x.shape[2] // self.pixels)


def activation(norm: nn.Module, x: Map) -> Rows:
    """norm and SiLU for rows of `x`: a GroupNorm takes the statistics of all of `x`, other norms look at one pixel."""
    if not isinstance(norm, nn.GroupNorm):
        return lambda rows: F.silu(norm(rows))
    mean, variance = x.statistics.of_groups(norm.num_groups)
    return lambda rows: normalise(rows, mean, variance, norm.weight, norm.bias, norm.eps)


def windows(x: Tensor, height: int, before: Rows) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (top, end, rows top − 1 … end of before(x)), with zeros beyond the borders; `before` sees each row once.

    Rows top … end − 1 of `x` may be overwritten once they have been yielded. All windows share their memory.
    """
    window = new_map(x, x.shape[1], min(height, x.shape[2]) + 2, x.shape[3])
    window[:, :, :1] = 0
    held, ready = 1, 0  # rows already in the window, rows of x already prepared
    for top in range(0, x.shape[2], height):
        end = min(top + height, x.shape[2])
        size = end - top + 2
        if ready < x.shape[2]:
            rows = before(x[:, :, ready : end + 1])
            window[:, :, held : held + rows.shape[2]] = rows
        if end == x.shape[2]:
            window[:, :, size - 1 : size] = 0
        yield top, end, window[:, :, :size]
        window[:, :, :2] = window[:, :, size - 2 : size].clone()
        held, ready = 2, end + 1


def phase_weights(weight: Tensor) -> Tensor:
    """Kernels (4·O, I, 2, 2) of the four phases (row, column) of nearest × 2 followed by a 3 × 3 kernel (O, I, 3, 3).

    An even row of the doubled map meets the small rows above (tap 0) and at (taps 1 and 2) its place, an odd one those
    at (taps 0 and 1) and below (tap 2); columns alike.
    """
    first, middle, last = weight.float().unbind(dim=2)
    by_row = [torch.stack(pair, dim=2) for pair in ((first, middle + last), (first + middle, last))]
    phases = []
    for rows in by_row:
        first, middle, last = rows.unbind(dim=3)
        phases += [torch.stack(pair, dim=3) for pair in ((first, middle + last), (first + middle, last))]
    return torch.cat(phases).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def new_map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        (1, channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def two_maps(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Two maps of the size of `x`: in its own memory if both fit there, row beside row, else in new memory."""
    height, width = x.shape[2:]
    if x.shape[1] != 2 * channels or not x.is_contiguous(memory_format=torch.channels_last):
        return new_map(x, channels, height, width), new_map(x, channels, height, width)
    rows = x.permute(0, 2, 3, 1).view(1, height, 2, width, channels)
    return rows[:, :, 0].permute(0, 3, 1, 2), rows[:, :, 1].permute(0, 3, 1, 2)
