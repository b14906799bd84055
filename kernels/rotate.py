"""Products with regular Hadamard matrices (ConvRot, Huang et al. 2025): of rows, and of int8 or int4 matrices.

H of size 4ⁿ is the Kronecker power of (1 1 1 −1; 1 1 −1 1; 1 −1 1 1; −1 1 1 1) / 2. Written in base 4, an entry is
negative for each place where the digits of its row and column add up to 3, so kernels make H from indices; it is
symmetric, orthogonal, and exact in every dtype. Shapes: x (…, C) and codes (O, I), in groups of 4ⁿ columns.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, any_bytes, bytes_of, choose, enqueue, jit, tl
from zimage.kernels.rms_norm import HALF


class Tile(NamedTuple):
    """What a program multiplies: rows, terms at a time, columns; with how many warps."""

    rows: int
    depth: int
    width: int
    warps: int


ROTATE, DECODE = Tile(64, 64, 256, 16), Tile(32, 128, 256, 8)  # as large as registers allow, read 128 bits at a time
LEAST = 32  # terms of a product of int8: smaller groups come several at a time
CAPABILITY = 80  # Triton multiplies int8 and bf16 from there on


def rotate(x: Tensor, group: int) -> Tensor:
    """x · H in groups of `group` columns; group is a power of 4."""
    # A tile of fp32, which matrix units do not multiply, takes far more registers than there are.
    run = choose(launch, reference, x, least_capability=CAPABILITY) if x.dtype in HALF else reference
    return run(x, group)


def decode_rotated(codes: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """codes · scale · H (O, I) in `dtype`: codes int8 and scale fp32, (O, 1) or ().

    With uint8 codes (O, I / 2), a byte holds two signed 4-bit integers, the first in its low half.
    """
    run = choose(launch_decode, reference_decode, codes, least_capability=CAPABILITY)
    return run(codes, scale, group, dtype)


def reference(x, group):
    """Factor by factor, each rounded to the dtype of x."""
    factor = 0.5 - torch.eye(4, dtype=x.dtype, device=x.device).flip(0)
    shape, levels = x.shape, round(math.log(group, 4))
    x = x.reshape(-1, *[4] * levels)
    for axis in range(1, levels + 1):
        x = (x.transpose(axis, -1) @ factor).transpose(axis, -1)
    return x.reshape(shape)


def reference_decode(codes, scale, group, dtype):
    if codes.dtype is torch.uint8:
        codes = codes.view(torch.int8)
        codes = (torch.stack((codes << 4, codes), dim=-1) >> 4).flatten(1)  # int8: the shifts carry the sign
    return reference(codes.float() * scale, group).to(dtype)


@jit
def _signs(row, column, GROUP: tl.constexpr):
    """±1, the entries of H without its factor; 0 where row and column lie in different groups."""
    differ = row ^ column
    places = differ & (differ >> 1) & 0x55555555  # a bit for every place whose digits add up to 3
    places ^= places >> 8
    places ^= places >> 4
    places ^= places >> 2
    return tl.where(differ < GROUP, 1 - 2 * (places & 1), 0)


@jit
def _kernel(
    x_ptr,
    out_ptr,
    rows,
    columns,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS × WIDTH of the products, DEPTH terms at a time; SPAN columns are whole groups."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, term = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    begin = tl.program_id(1) * WIDTH // SPAN * SPAN
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for k in range(begin, begin + SPAN, DEPTH):
        there = (row < rows)[:, None] & (k + term < columns)[None, :]
        x = tl.load(x_ptr + row[:, None] * columns + (k + term)[None, :], mask=there, other=0.0)
        signs = _signs((k + term)[:, None], column[None, :], GROUP).to(tl.float32)
        total = tl.dot(x, signs.to(x_ptr.dtype.element_ty), total, input_precision="ieee")
    place = out_ptr + row[:, None] * columns + column[None, :]
    within = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(place, (total * NORM).to(out_ptr.dtype.element_ty), mask=within)


@jit
def _decode_kernel(
    codes_ptr,
    scale_ptr,
    out_ptr,
    rows,
    columns,
    scale_row,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """As _kernel, in integers, which are exact; halves of bytes if the codes are uint8."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, term = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    begin = tl.program_id(1) * WIDTH // SPAN * SPAN
    total = tl.zeros((ROWS, WIDTH), dtype=tl.int32)
    for k in range(begin, begin + SPAN, DEPTH):
        if codes_ptr.dtype.element_ty == tl.uint8:
            half = k // 2 + tl.arange(0, DEPTH // 2)
            there = (row < rows)[:, None] & (half < columns // 2)[None, :]
            byte = tl.load(codes_ptr + row[:, None] * (columns // 2) + half[None, :], mask=there, other=0).to(tl.int8)
            code = tl.reshape(tl.join((byte << 4) >> 4, byte >> 4), (ROWS, DEPTH))
        else:
            there = (row < rows)[:, None] & (k + term < columns)[None, :]
            code = tl.load(codes_ptr + row[:, None] * columns + (k + term)[None, :], mask=there, other=0)
        signs = _signs((k + term)[:, None], column[None, :], GROUP).to(tl.int8)
        total = tl.dot(code, signs, total, out_dtype=tl.int32)
    scale = tl.load(scale_ptr + row * scale_row, mask=row < rows, other=0.0)
    place = out_ptr + row[:, None] * columns + column[None, :]
    within = (row < rows)[:, None] & (column < columns)[None, :]
    decoded = total.to(tl.float32) * NORM * scale[:, None]
    tl.store(place, decoded.to(out_ptr.dtype.element_ty), mask=within)


def launch(x, group):
    x, columns = x.contiguous(), x.shape[-1]
    rows, out = x.numel() // columns, torch.empty_like(x)
    tile, grid = _tiles(rows, columns, group, ROTATE)
    enqueue(_kernel, grid, x, out, rows, columns, 1 / math.isqrt(group), group, *tile, num_warps=ROTATE.warps)
    return out


def launch_decode(codes, scale, group, dtype):
    codes, scale = codes.contiguous(), scale.contiguous()
    rows, columns = len(codes), _columns(codes)
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    tile, grid = _tiles(rows, columns, group, DECODE)
    arguments = codes, scale, out, rows, columns, min(scale.ndim, 1), 1 / math.isqrt(group), group
    enqueue(_decode_kernel, grid, *arguments, *tile, num_warps=DECODE.warps)
    return out


def _columns(codes: Tensor) -> int:
    return codes.shape[1] * (2 if codes.dtype is torch.uint8 else 1)


def _tiles(rows: int, columns: int, group: int, most: Tile) -> tuple[tuple[int, ...], tuple[int, int]]:
    """SPAN, ROWS, DEPTH and WIDTH for groups of this size, and the grid."""
    span = max(group, LEAST)
    width = min(span, most.width)
    return (span, most.rows, min(span, most.depth), width), (-(-rows // most.rows), -(-columns // width))


ROTATE_SPEC = Spec(
    name="rotate",
    reference=reference,
    launch=launch,
    inputs=lambda make, L, C, group: (make(L, C), group),
    cases=({"L": 3, "C": 512, "group": 256}, {"L": 70, "C": 48, "group": 16}, {"L": 5, "C": 12, "group": 4}),
    model={"L": 4128, "C": 10240, "group": 256},
    least_bytes=lambda x, group: 2 * bytes_of(x),
    least_capability=CAPABILITY,
    half_only=True,
)


def _decode_spec(name: str, bits: int) -> Spec:
    def inputs(make, rows: int, columns: int, group: int, scales: int = 1) -> tuple:
        codes = any_bytes(make, rows, columns * bits // 8).view(torch.uint8 if bits == 4 else torch.int8)
        return codes, make(*((rows, 1) if scales else ())).float(), group, make(1).dtype

    return Spec(
        name=name,
        reference=reference_decode,
        launch=launch_decode,
        inputs=inputs,
        cases=(
            {"rows": 70, "columns": 256, "group": 256},
            {"rows": 3, "columns": 128, "group": 64, "scales": bits // 8},
            {"rows": 5, "columns": 48, "group": 16},
            {"rows": 2, "columns": 1024, "group": 1024},
        ),
        model={"rows": 10240, "columns": 3840, "group": 256},
        least_bytes=lambda codes, scale, group, dtype: (
            bytes_of(codes, scale) + len(codes) * _columns(codes) * dtype.itemsize
        ),
        least_capability=CAPABILITY,
        narrow_loads=bits == 4,  # a tile has 8 bytes for each thread
    )


INT8_SPEC, INT4_SPEC = _decode_spec("decode_int8_rotated", 8), _decode_spec("decode_int4_rotated", 4)
