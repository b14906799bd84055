"""Blending overlapping tiles with feathered edges into a canvas, and rounding a picture's values to bytes."""

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, tl

BLOCK = (16, 128)  # rows × columns of a tile per program
LEVELS = 4096  # values per program


def add_tile(canvas: Tensor, tile: Tensor, rows: Tensor, columns: Tensor, top: int, left: int) -> Tensor:
    """canvas[…, top + y, left + x] += rows[y] · columns[x] · tile[…, y, x], in place; returns the canvas.

    canvas (B, C, H, W) fp32, tile (B, C, h, w) of any float dtype, weights rows (h,) and columns (w,) fp32. Where the
    weights of all tiles over a pixel add up to one, the canvas ends with their weighted mean.
    """
    run = choose(launch_add, reference_add, canvas, tile)
    return run(canvas, tile, rows, columns, top, left)


def to_levels(images: Tensor) -> Tensor:
    """Round values in [−1, 1] to the nearest of 256 levels, as uint8; values beyond are clamped."""
    return choose(launch_levels, reference_levels, images)(images)


def reference_add(canvas, tile, rows, columns, top, left):
    h, w = tile.shape[-2:]
    canvas[..., top : top + h, left : left + w] += tile.float() * rows[:, None] * columns
    return canvas


def reference_levels(images):
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


@jit
def _add_kernel(
    canvas_ptr,
    tile_ptr,
    rows_ptr,
    columns_ptr,
    height,
    width,
    canvas_plane,
    canvas_stride,
    tile_plane,
    tile_stride,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """A block of one channel's plane; `canvas_ptr` points to where the tile begins."""
    plane = tl.program_id(0).to(tl.int64)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X)
    there = (y < height)[:, None] & (x < width)[None, :]
    weight = tl.load(rows_ptr + y, mask=y < height, other=0.0)[:, None]
    weight = weight * tl.load(columns_ptr + x, mask=x < width, other=0.0)[None, :]
    place = canvas_ptr + plane * canvas_plane + y[:, None] * canvas_stride + x[None, :]
    tile = tl.load(tile_ptr + plane * tile_plane + y[:, None] * tile_stride + x[None, :], mask=there, other=0.0)
    total = tl.load(place, mask=there, other=0.0) + tile.to(tl.float32) * weight
    tl.store(place, total, mask=there)


@jit
def _levels_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count, other=0.0).to(tl.float32)
    level = tl.minimum(tl.maximum((x + 1.0) * 127.5, 0.0), 255.0)
    # Adding 1.5 · 2²³ leaves no fractional bits: the sum is rounded to the nearest even integer, as by torch.round.
    level = (level + 12582912.0) - 12582912.0
    tl.store(out_ptr + place, level.to(tl.uint8), mask=place < count)


def launch_add(canvas, tile, rows, columns, top, left):
    tile = tile.contiguous()
    B, C, h, w = tile.shape
    window = canvas[..., top : top + h, left : left + w]
    grid = (B * C, -(-h // BLOCK[0]), -(-w // BLOCK[1]))
    strides = canvas.stride(1), canvas.stride(2), tile.stride(1), tile.stride(2)
    enqueue(_add_kernel, grid, window, tile, rows, columns, h, w, *strides, *BLOCK, num_warps=8)
    return canvas


def launch_levels(images):
    if not images.is_contiguous(memory_format=torch.channels_last):
        images = images.contiguous()
    out = torch.empty_like(images, dtype=torch.uint8)  # in the order of the images' values
    enqueue(_levels_kernel, (-(-images.numel() // LEVELS),), images, out, images.numel(), LEVELS, num_warps=4)
    return out


def _add_inputs(make, B: int, C: int, H: int, W: int, h: int, w: int, top: int, left: int) -> tuple:
    canvas, rows, columns = make(B, C, H, W).float(), make(h).float().sigmoid(), make(w).float().sigmoid()
    return canvas, make(B, C, h, w), rows, columns, top, left


ADD_SPEC = Spec(
    name="add_tile",
    reference=reference_add,
    launch=launch_add,
    inputs=_add_inputs,
    cases=(
        {"B": 2, "C": 3, "H": 40, "W": 160, "h": 19, "w": 131, "top": 20, "left": 29},
        {"B": 1, "C": 3, "H": 16, "W": 16, "h": 16, "w": 16, "top": 0, "left": 0},
    ),
    model={"B": 1, "C": 3, "H": 1024, "W": 1024, "h": 512, "w": 512, "top": 448, "left": 448},
    least_bytes=lambda canvas, tile, rows, columns, top, left: 8 * tile.numel() + bytes_of(tile, rows, columns),
    in_place=(0,),
    rounds_once=False,
)
LEVELS_SPEC = Spec(
    name="to_levels",
    reference=reference_levels,
    launch=launch_levels,
    inputs=lambda make, B, H, W, last=0: (
        make(B, 3, H, W).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format),
    ),
    cases=({"B": 2, "H": 5, "W": 7}, {"B": 1, "H": 64, "W": 80}, {"B": 1, "H": 9, "W": 70, "last": 1}),
    model={"B": 1, "H": 1024, "W": 1024},
    least_bytes=lambda images: bytes_of(images) + images.numel(),
)
