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

Shapes: C channels, H × W positions. Maps are (1, C, H, W) with the channels innermost.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.errors import RequestError, quoted
from zimage.kernels import backend
from zimage.kernels.backend import fuses
from zimage.kernels.group_norm import normalise
from zimage.settings.declared import BLEND_TILE, TILE_MODES, TILE_OVERLAP
from zimage.vae.blend import blend
from zimage.vae.layers import ChannelNorm, DecoderStack, EncoderStack, ResnetBlock, Stack, convolve
from zimage.vae.statistics import BlockMoments, ChannelStatistics, Statistics

Rows = Callable[[Tensor, Tensor], object]  # (rows of a map, where to put them, prepared for a convolution)
WHOLE = 1 << 30  # values of a strip that holds a whole map, up to what 32 bits can index


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


def plain(rows: Tensor, out: Tensor) -> None:
    out.copy_(rows)


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

    def decode(self, decoder: DecoderStack, z: Tensor, factor: int, walk: "Walk | None" = None) -> Tensor:
        """decoder(z) of unscaled latents (B, 16, h, w) at `factor` pixels per latent; `walk` runs strips."""
        if self.mode == "off":
            return run_whole(decoder, z)
        if self.mode == "blend":
            return blend(partial(run_whole, decoder), z, *self._in_steps_of(factor))
        return (walk or StripWalk)(decoder, z.shape[2] * factor, self.size).run(z)

    def encode(self, encoder: EncoderStack, images: Tensor, factor: int, walk: "Walk | None" = None) -> Tensor:
        """encoder(images) of pictures (B, 3, H, W)."""
        if self.mode == "off":
            return run_whole(encoder, images)
        if self.mode == "blend":
            tile, overlap = self._in_steps_of(factor)
            return blend(partial(run_whole, encoder), images, tile * factor, overlap * factor)
        return (walk or StripWalk)(encoder, images.shape[2], self.size).run(images)

    def _in_steps_of(self, factor: int) -> tuple[int, int]:
        """Tile and overlap in latents; at least one latent of every tile lies outside the overlap."""
        tile = max((self.size or BLEND_TILE) // factor, 2)
        return tile, min(self.overlap // factor, tile - 1)


OFF = Tiling()


def run_whole(stack: Stack, x: Tensor) -> Tensor:
    """stack(x). Where kernels run, each sample is one strip: fewer passes over the maps, in half the memory."""
    if not fuses(x, stack.conv_in.weight):
        return stack(x)
    return StripWalk(stack, x.shape[2], None, WHOLE).run(x)


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

    Maps of lower resolution have proportionally lower strips. Without `height`, strips have `values` values.
    """

    def __init__(self, stack: Stack, pixels: int, height: int | None, values: int | None = None):
        device = stack.conv_in.weight.device
        self.stack, self.pixels, self.height, self.values = stack, pixels, height, values or strip_values(device)
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
        return self._head(self._middle(self._through_layers(self._convolve(image, self.stack.conv_in)).values))

    def _middle(self, values: Tensor) -> Map:
        """The mid block, which runs whole on a CPU; elsewhere its attention does."""
        middle = self.stack.mid_block
        if not on_gpu(values.device):
            return self._whole(middle(values))
        x = self._residual(middle.first, self._whole(values))
        return self._residual(middle.last, self._whole(middle.attention(x.alone())))

    def _whole(self, values: Tensor) -> Map:
        """A map that is written already."""
        x = Map(values.contiguous(memory_format=torch.channels_last), self.gathers(self.groups))
        x.statistics.write(x.values, x.values)
        x.statistics.measure(x.values)
        return x

    def _through_layers(self, x: Map) -> Map:
        for layer in self.stack.layers():
            x = self._residual(layer, x) if isinstance(layer, ResnetBlock) else self._resample(layer, x)
        return x

    def _resample(self, layer: nn.Module, x: Map) -> Map:
        conv = next(module for module in layer.modules() if isinstance(module, nn.Conv2d))
        return (self._halve if conv.stride == (2, 2) else self._double)(conv, x.alone())

    def _head(self, x: Map) -> Tensor:
        before = activation(self.stack.last_norm(), x)
        return self._convolve(x.values, self.stack.conv_out, before, groups=0).values

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
        before: Rows = plain,
        out: Tensor | None = None,
        residual: Tensor | None = None,
        shortcut: nn.Conv2d | None = None,
        kept: Tensor | None = None,
        groups: int | None = None,
    ) -> Map:
        """conv(before(x)) + residual with a 3 × 3 kernel; also writes shortcut(x) into `kept`.

        `out` may be `x` itself; `out` and `kept` may be the result of `two_maps` for it. `groups`: which a norm reads.
        """
        out = new_map(x, conv.out_channels, x.shape[2], x.shape[3]) if out is None else out
        statistics, unread = self.gathers(self.groups if groups is None else groups), self.gathers(0)
        for top, end, window in windows(x, self._rows(x, conv), before):
            if shortcut is not None and kept is not None:
                unread.write(kept[:, :, top:end], *self._product(x[:, :, top:end], shortcut))
            rows, bias = self._product(window, conv, padding=(0, 1))
            statistics.write(out[:, :, top:end], rows, bias, None if residual is None else residual[:, :, top:end])
            statistics.measure(rows)
        return Map(out, statistics)

    def _product(
        self, x: Tensor, conv: nn.Conv2d, stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor | None]:
        """A convolution and the bias that `write` has to add."""
        if self.gathers.adds_bias:
            return convolve(x, conv.weight, None, stride, padding), conv.bias
        return convolve(x, conv.weight, conv.bias, stride, padding), None

    def _halve(self, conv: nn.Conv2d, x: Tensor) -> Map:
        """3 × 3 at stride 2 with one row and column of zeros at the bottom and right, as the reference was trained."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        out, statistics = new_map(x, conv.out_channels, height, width), self.gathers(self.groups)
        step = max(1, self._rows(x, conv) // 2)
        for top in range(0, height, step):
            end = min(top + step, height)
            band = x[:, :, 2 * top : 2 * end + 1]
            band = F.pad(band, (0, 1, 0, 2 * (end - top) + 1 - band.shape[2]))
            rows, bias = self._product(band, conv, stride=2)
            statistics.write(out[:, :, top:end], rows, bias)
            statistics.measure(rows)
        return Map(out, statistics)

    def _double(self, conv: nn.Conv2d, x: Tensor) -> Map:
        """Nearest × 2, then 3 × 3, as four 2 × 2 convolutions of the small map: 4/9 of the products, no doubled map."""
        height, width = x.shape[2:]
        out, statistics = new_map(x, conv.out_channels, 2 * height, 2 * width), self.gathers(self.groups)
        by_row, bias = phase_weights(conv.weight).chunk(2), conv.get_parameter("bias")
        early, late = (None, bias) if statistics.adds_bias else (bias.repeat(2), None)
        for top, end, window in windows(x, max(1, self._rows(x, conv) // 4)):
            for row, kernels in enumerate(by_row):
                band = window[:, :, row : row + end - top + 1]
                columns = convolve(band, kernels, early, padding=(0, 1)).chunk(2, dim=1)  # each (1, C, rows, W + 1)
                place = out[:, :, 2 * top + row : 2 * end : 2]
                statistics.write(place[..., ::2], columns[0][..., :width], late)
                statistics.write(place[..., 1::2], columns[1][..., 1:], late)
                del columns  # before the next are made
            statistics.measure(out[:, :, 2 * top : 2 * end])
        return Map(out, statistics)

    def _rows(self, x: Tensor, conv: nn.Conv2d) -> int:
        """The number of rows in a strip of `x`."""
        if self.height is None:
            return max(1, self.values // (max(x.shape[1], conv.out_channels) * x.shape[3]))
        return max(1, self.height * x.shape[2] // self.pixels)


Walk = Callable[[Stack, int, int | None], StripWalk]  # (stack, rows of the picture, rows of a strip)


def activation(norm: nn.Module, x: Map) -> Rows:
    """norm and SiLU for rows of `x`: a GroupNorm takes the statistics of all of `x`, other norms look at one pixel."""
    if isinstance(norm, ChannelNorm):
        return norm.activated
    assert isinstance(norm, nn.GroupNorm)
    statistics = x.statistics.of_groups()
    return lambda rows, out: normalise(rows, statistics, norm.weight, norm.bias, norm.eps, out)


def windows(x: Tensor, height: int, before: Rows = plain) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (top, end, rows top − 1 … end of x after `before`), with zeros beyond the borders.

    Each row is prepared once.
    Rows top … end − 1 of `x` may be overwritten once they have been yielded. All windows share their memory.
    """
    window = new_map(x, x.shape[1], min(height, x.shape[2]) + 2, x.shape[3])
    window[:, :, :1] = 0
    held, ready = 1, 0  # rows already in the window, rows of x already prepared
    for top in range(0, x.shape[2], height):
        end = min(top + height, x.shape[2])
        size = end - top + 2
        if ready < x.shape[2]:
            rows = x[:, :, ready : end + 1]
            before(rows, window[:, :, held : held + rows.shape[2]])
        if end == x.shape[2]:
            window[:, :, size - 1 : size] = 0
        yield top, end, window[:, :, :size]
        if end < x.shape[2]:
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
