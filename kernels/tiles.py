"""Laying overlapping tiles over one another with feathered edges."""

from torch import Tensor


def add_tile(canvas: Tensor, tile: Tensor, rows: Tensor, columns: Tensor, top: int, left: int) -> None:
    """canvas[…, top + y, left + x] += rows[y] · columns[x] · tile[…, y, x], in place.

    canvas (B, C, H, W) fp32, tile (B, C, h, w) of any float dtype, weights rows (h,) and columns (w,) fp32. Where the
    weights of all tiles over a pixel add up to one, so do their shares of it.
    """
    h, w = tile.shape[-2:]
    canvas[..., top : top + h, left : left + w] += tile.float() * rows[:, None] * columns
