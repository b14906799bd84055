"""Decoding and encoding in exact strips that are divided over ranks: the bits of exact strips on one rank.

Each rank has a run of a map's strips and computes these alone. What it lacks is fetched from the rank that has it:

    borders   the row above its first strip and the row below its last, before every convolution
    rows      those of strips that another rank had in the map before, where strips become higher or lower
    moments   of all strips, before every group norm: each rank merges them in the order of the strips
    tokens    what every rank's share of the queries attends to, in the mid block

On every rank run, of the mid block, the linear layers of its attention, and on a CPU its norms and convolutions.

Shapes: C channels, H × W positions, G groups, L = H·W tokens, N blocks. Maps are (1, C, H, W).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from zimage.nn.attention import attention
from zimage.parallel.ranks import Ranks
from zimage.vae.layers import Stack
from zimage.vae.share import Bounds, Share
from zimage.vae.walk import StripWalk, Walk, on_gpu, strip_values

STRIPS = 2  # of a map for every rank, on a GPU where no height is asked for
QUERIES = 256  # PyTorch's attention computes as many at a time on a CPU, where there are at least 768
WORTH = 1024  # queries of a rank below which the attention is not divided
Range = tuple[int, int]


def divided_walk(ranks: Ranks) -> Walk:
    """What runs exact strips on all ranks; takes the place of `Autoencoder.walk`."""
    return partial(_walk, DividedShare(ranks))


def _walk(share: Share, stack: Stack, pixels: int, height: int | None) -> StripWalk:
    device = stack.conv_in.weight.device
    if height is not None or not on_gpu(device):
        return StripWalk(stack, pixels, height, share=share)
    # One rank's strips are as large as memory allows, too few for all.
    return StripWalk(stack, pixels, -(-pixels // (STRIPS * share.size)), strip_values(device), share)


class DividedShare(Share):
    """Every rank has a run of the strips of each map."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.rank, self.size = ranks, ranks.rank, ranks.size

    def moved(self, values: Tensor, have: Bounds | None, want: Bounds) -> Tensor:
        if have is None:
            return values[:, :, want[self.rank] : want[self.rank + 1]]
        (rows,) = fetch(self.ranks, "rows", by_row(values), have, [[run] for run in pairwise(want)])
        return as_map(rows)

    def edges(self, values: Tensor, bounds: Bounds | None) -> tuple[Tensor | None, Tensor | None]:
        assert bounds is not None
        wants = [list(beside(run, bounds[-1])) for run in pairwise(bounds)]
        rows = fetch(self.ranks, "borders", by_row(values), bounds, wants)
        first = bounds[self.rank]
        found = {begin < first: as_map(row) for (begin, _), row in zip(wants[self.rank], rows, strict=True)}
        return found.get(True), found.get(False)

    def whole(self, values: Tensor, have: Bounds | None) -> Tensor:
        return values if have is None else as_map(self._joined("rows", by_row(values), have))

    def gathered(self, moments: Tensor, blocks: Sequence[int]) -> Tensor:
        have = tuple(accumulate(blocks, initial=0))
        return self._joined("moments", moments.permute(2, 0, 1), have).permute(1, 2, 0).contiguous()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries are divided, in whole pieces as one rank computes them."""
        if q.shape[1] < WORTH * self.size:
            return attention(q, k, v)
        bounds = self.bounds(q.shape[1], QUERIES)
        out = attention(q[:, bounds[self.rank] : bounds[self.rank + 1]], k, v)
        return self._joined("tokens", out[0], bounds)[None]

    def _joined(self, kind: str, rows: Tensor, have: Bounds) -> Tensor:
        """The rows (n, …) of all ranks, on every rank."""
        (every,) = fetch(self.ranks, kind, rows, have, [[(0, have[-1])]] * self.size)
        return every


def fetch(ranks: Ranks, kind: str, rows: Tensor, have: Bounds, wants: Sequence[Sequence[Range]]) -> list[Tensor]:
    """The runs of rows that this rank wants, wherever they are.

    `rows` (n, …) are this rank's run of a sequence that is divided by `have`; wants[r] are the runs that rank r is to
    get, from its own rows without a copy if they lie among them.
    """
    rank, every = ranks.rank, range(ranks.size)
    parts = [_joined(rows, [_own(rows, have, rank, run) for run in wants[to]] if to != rank else []) for to in every]
    lengths = [sum(_length(have, owner, run) for run in wants[rank]) if owner != rank else 0 for owner in every]
    arrived = ranks.exchange(kind, parts, [(length, *rows.shape[1:]) for length in lengths])
    used, found = [0] * ranks.size, []
    for run in wants[rank]:
        pieces = []
        for owner in every:
            if owner == rank:
                pieces.append(_own(rows, have, rank, run))
                continue
            length = _length(have, owner, run)
            pieces.append(arrived[owner][used[owner] : used[owner] + length])
            used[owner] += length
        found.append(_joined(rows, pieces))
    return found


def _own(rows: Tensor, have: Bounds, rank: int, run: Range) -> Tensor:
    """Those of a rank's rows that lie in a run."""
    first, end = have[rank], have[rank + 1]
    begin = max(first, run[0])
    return rows[begin - first : max(min(end, run[1]), begin) - first]


def _length(have: Bounds, owner: int, run: Range) -> int:
    return max(min(have[owner + 1], run[1]) - max(have[owner], run[0]), 0)


def _joined(like: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    """The pieces one after the other; a single one is not copied."""
    there = [piece for piece in pieces if len(piece)]
    return there[0] if len(there) == 1 else torch.cat(there) if there else like[:0]


def beside(run: Range, height: int) -> Iterator[Range]:
    """The row above a run and the row below it, as far as there are any; none for a run without rows."""
    first, end = run
    if first < end and first > 0:
        yield first - 1, first
    if first < end < height:
        yield end, end + 1


def by_row(values: Tensor) -> Tensor:
    """A map (1, C, rows, W) as (rows, W, C), without a copy."""
    return values[0].permute(1, 2, 0)


def as_map(rows: Tensor) -> Tensor:
    """Rows (rows, W, C) as a map, in the very layout of one: PyTorch reads it off the strides, also of axes of 1."""
    return rows[None].permute(0, 3, 1, 2)
