"""The classic tiled pass: overlapping tiles, each run as a picture of its own, blended where they overlap.

It needs little memory but is not exact: every tile has its own norm statistics and attention, which causes seams and
shifts of colour. `zimage.vae.walk` is exact.
"""

import itertools
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from zimage.kernels.tiles import add_tile


def blend(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int) -> Tensor:
    """run(x) in tiles of at most `tile` × `tile` input positions; (B, C, H, W) → fp32 at the scale of its results."""
    tops, lefts = (starts(length, tile, overlap) for length in x.shape[-2:])
    canvas: Tensor | None = None
    for (i, top), (j, left) in itertools.product(enumerate(tops), enumerate(lefts)):
        part = x[..., top : top + tile, left : left + tile]
        out = run(part)
        if canvas is None:  # the first tile shows the channels and the scale
            scale = Fraction(out.shape[-1], part.shape[-1])
            canvas = torch.zeros(*out.shape[:2], *(int(n * scale) for n in x.shape[-2:]), device=out.device)
            rows = weights(tops, tile, overlap, x.shape[-2], scale, out.device)
            columns = weights(lefts, tile, overlap, x.shape[-1], scale, out.device)
        add_tile(canvas, out, rows[i], columns[j], int(top * scale), int(left * scale))
    assert canvas is not None  # there is at least one tile
    return canvas


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """The first position of each tile along one axis; the last tile ends with the axis."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def weights(
    begins: list[int], tile: int, overlap: int, length: int, scale: Fraction, device: torch.device
) -> list[Tensor]:
    """Weights of each tile's output positions along one axis; they add up to one at every position.

    All lengths are those of the input; each inner edge of a tile has a ramp over the overlap.
    """
    tile, overlap, length = (int(n * scale) for n in (min(tile, length), overlap, length))
    begins = [int(begin * scale) for begin in begins]
    ramp = (torch.arange(tile, device=device) + 0.5) / max(overlap, 1)
    raw = []
    for begin in begins:
        rise = ramp.clamp(max=1) if begin > 0 else torch.ones_like(ramp)
        fall = ramp.flip(0).clamp(max=1) if begin + tile < length else torch.ones_like(ramp)
        raw.append(torch.minimum(rise, fall))
    total = torch.zeros(length, device=device)
    for begin, weight in zip(begins, raw, strict=True):
        total[begin : begin + tile] += weight
    return [weight / total[begin : begin + tile] for begin, weight in zip(begins, raw, strict=True)]
