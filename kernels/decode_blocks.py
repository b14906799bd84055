"""Decodes llama.cpp's blocks of 32 numbers: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

A row is a sequence of blocks: a scale d (f16), perhaps a minimum m (f16), perhaps 32 fifth bits, and codes.
Source: ggml's quants (Gerganov et al.); tests compare every kind with PyPI's `gguf`. Shapes: codes uint8 (rows, bytes).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, any_bytes, bytes_of, choose, enqueue, jit, tl

BLOCK = 32
BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}  # of a block
BLOCKS = 64  # per program: 16 numbers for each of 128 threads


def decode_blocks(codes: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Codes → numbers (rows, columns), computed in fp32 and rounded once to `dtype`."""
    return choose(launch, reference, codes)(codes, kind, dtype)


def reference(codes, kind, dtype):
    blocks = codes.reshape(-1, BYTES[kind])
    return _DECODERS[kind](blocks).reshape(len(codes), -1).to(dtype)


def _q8_0(b: Tensor) -> Tensor:
    """d, 32 × int8."""
    return half(b, 0) * b[:, 2:].view(torch.int8)


def _q4_0(b: Tensor) -> Tensor:
    """d, 16 bytes: low halves are numbers 0 to 15, high halves 16 to 31, each minus 8."""
    return half(b, 0) * (halves(b[:, 2:]).flatten(1) - 8)


def _q4_1(b: Tensor) -> Tensor:
    """d, m, 16 bytes as in Q4_0: d · code + m."""
    return half(b, 0) * halves(b[:, 4:]).flatten(1) + half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    """d, 4 bytes of fifth bits, that of number i at bit i; 16 bytes as in Q4_0; each code minus 16."""
    return half(b, 0) * (halves(b[:, 6:]).flatten(1) + 16 * _bits(b[:, 2:6]) - 16)


def _q5_1(b: Tensor) -> Tensor:
    """d, m, fifth bits and codes as in Q5_0: d · code + m."""
    return half(b, 0) * (halves(b[:, 8:]).flatten(1) + 16 * _bits(b[:, 4:8])) + half(b, 2)


_DECODERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1}


def half(b: Tensor, at: int) -> Tensor:
    """The f16 number at byte `at` of each block, (blocks, 1) fp32."""
    return b[:, at : at + 2].contiguous().view(torch.float16).float()


def halves(packed: Tensor) -> Tensor:
    """(..., n) bytes → (..., 2, n): their low and high halves, int8."""
    return torch.stack((packed & 15, packed >> 4), dim=-2).to(torch.int8)


def _bits(packed: Tensor) -> Tensor:
    """(blocks, n) bytes → (blocks, 8 n) int8, the lowest bit first."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> places) & 1).flatten(1).to(torch.int8)


# ------------------------------------------------------------------ kernels
# Blocks begin at any even address, so they are read in words of 16 bits: a warp reads 64 adjacent bytes at a time.


@jit
def word_half(word):
    """The fp32 number of an f16 word."""
    return word.to(tl.float16, bitcast=True).to(tl.float32)


@jit
def interleaved(first, second, SHAPE: tl.constexpr):
    """Numbers of the low and the high bytes of words, in their order."""
    return tl.reshape(tl.join(first, second), SHAPE)


@jit
def _bytes_kernel(codes_ptr, out_ptr, count, BLOCKS: tl.constexpr):
    """BLOCKS blocks of Q8_0, of `count` in all rows together."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = (block < count)[:, None]
    words = codes_ptr.to(tl.pointer_type(tl.int16)) + block * 17
    d = word_half(tl.load(words, mask=block < count, other=0))
    word = tl.load(words[:, None] + 1 + tl.arange(0, 16)[None, :], mask=there, other=0)
    low, high = ((word << 8) >> 8).to(tl.float32), (word >> 8).to(tl.float32)  # int16: the shifts carry the sign
    decoded = interleaved(low, high, (BLOCKS, 32)) * d[:, None]
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out_ptr + place, decoded.to(out_ptr.dtype.element_ty), mask=there)


@jit
def _halves_kernel(codes_ptr, out_ptr, count, MINIMUM: tl.constexpr, FIFTH: tl.constexpr, BLOCKS: tl.constexpr):
    """BLOCKS blocks of the other kinds: words d, m if MINIMUM, two of fifth bits if FIFTH, and eight of codes."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    present = block < count
    words = codes_ptr.to(tl.pointer_type(tl.uint16)) + block * (9 + MINIMUM + 2 * FIFTH)
    d = word_half(tl.load(words, mask=present, other=0))[:, None]
    at = tl.arange(0, 8)[None, :]
    word = tl.load(words[:, None] + 1 + MINIMUM + 2 * FIFTH + at, mask=present[:, None], other=0).to(tl.int32)
    if MINIMUM:
        m = word_half(tl.load(words + 1, mask=present, other=0))[:, None]
    for high in tl.static_range(2):  # the low halves of bytes, and the high ones
        code = word >> (4 * high)
        first, second = code & 15, (code >> 8) & 15
        if FIFTH:
            bits = tl.load(words + 1 + MINIMUM + high, mask=present, other=0).to(tl.int32)[:, None]
            first, second = first | ((bits >> (2 * at)) & 1) << 4, second | ((bits >> (2 * at + 1)) & 1) << 4
        number = interleaved(first, second, (BLOCKS, 16)).to(tl.float32)
        if MINIMUM:
            number = d * number + m
        else:
            number = d * (number - (16 if FIFTH else 8))
        place = block[:, None] * 32 + 16 * high + tl.arange(0, 16)[None, :]
        tl.store(out_ptr + place, number.to(out_ptr.dtype.element_ty), mask=present[:, None])


def launch(codes, kind, dtype):
    codes = codes.contiguous()
    count = codes.numel() // BYTES[kind]
    out = torch.empty((len(codes), count // len(codes) * BLOCK), dtype=dtype, device=codes.device)
    grid = (-(-count // BLOCKS),)
    if kind == "Q8_0":
        enqueue(_bytes_kernel, grid, codes, out, count, BLOCKS, num_warps=4)
    else:
        enqueue(_halves_kernel, grid, codes, out, count, kind[3] == "1", kind[1] == "5", BLOCKS, num_warps=4)
    return out


def block_spec(
    kind: str, sizes: Mapping[str, int], numbers: int, halves_at: tuple[int, ...], reference: Callable, launch: Callable
) -> Spec:
    """The specification of one of the kinds whose blocks have these sizes in bytes.

    The bytes of its blocks are any, but for f16 numbers at some places.
    """

    def inputs(make, rows: int, columns: int) -> tuple:
        codes = any_bytes(make, rows, columns // numbers, sizes[kind])
        for at in halves_at:
            codes[..., at : at + 2] = make(rows, columns // numbers, 1).to(torch.float16).view(torch.uint8)
        return codes.flatten(1), kind, make(1).dtype

    return Spec(
        name=f"decode_{kind.lower()}",
        reference=reference,
        launch=launch,
        inputs=inputs,
        cases=({"rows": 3, "columns": numbers}, {"rows": 5, "columns": 3 * numbers}),
        model={"rows": 10240, "columns": 3840},
        least_bytes=lambda codes, kind, dtype: (
            bytes_of(codes) + codes.numel() // sizes[kind] * numbers * dtype.itemsize
        ),
        exact=True,
        narrow_loads=sizes[kind] % 16 > 0,
    )


SPECS = tuple(block_spec(kind, BYTES, BLOCK, (0, 2) if kind[3] == "1" else (0,), reference, launch) for kind in BYTES)
