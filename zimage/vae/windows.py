"""The rows that a strip's convolution reads, the kernels of a doubled map, and memory for maps.

Shapes: C channels, H × W positions. Maps are (1, C, H, W) with the channels innermost.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

Rows = Callable[[Tensor, Tensor], object]  # (rows of a map, where to put them, prepared for a convolution)


def plain(rows: Tensor, out: Tensor) -> None:
    out.copy_(rows)


def windows(
    x: Tensor, height: int, before: Rows = plain, above: Tensor | None = None, below: Tensor | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (top, end, rows top − 1 … end of x after `before`); beyond `x` are `above` and `below`, else zeros.

    Each row is prepared once.
    Rows top … end − 1 of `x` may be overwritten once they have been yielded. All windows share their memory.
    """
    total = x.shape[2]
    window = new_map(x, x.shape[1], min(height, total) + 2, x.shape[3])
    _put(above, window[:, :, :1], before)
    ready = 0  # rows of x already prepared
    for top in range(0, total, height):
        end = min(top + height, total)
        size, ends = end - top + 2, end == total
        for first, last in _pieces(x, ready, end, above is not None, ends and below is None):
            before(x[:, :, first:last], window[:, :, first - top + 1 : last - top + 1])
        if ends:
            _put(below, window[:, :, size - 1 : size], before)
        yield top, end, window[:, :, :size]
        if not ends:
            window[:, :, :2] = window[:, :, size - 2 : size].clone()
        ready = end + 1


def _pieces(x: Tensor, ready: int, end: int, continues: bool, finishes: bool) -> Iterable[tuple[int, int]]:
    """The rows from `ready` to the one below a strip, in the pieces in which they are prepared.

    On a CPU an element's last bit may depend on how many are prepared with it. So rows that two processes may prepare,
    those on both sides of a border between strips, are prepared by themselves. `continues`: another strip lies above
    `x`; `finishes`: this is the map's last strip.
    """
    stop = min(end + 1, x.shape[2])
    alone = () if x.device.type != "cpu" else (1,) * (continues and ready == 0) + (end - 1, end) * (not finishes)
    return pairwise(sorted({ready, stop, *(cut for cut in alone if ready < cut < stop)}))


def _put(row: Tensor | None, out: Tensor, before: Rows) -> None:
    """A row beyond those at hand, or zeros beyond the map."""
    if row is None:
        out.zero_()
    else:
        before(row, out)


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
