"""Decodes llama.cpp's K blocks of 256 numbers: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

The numbers of a block come in groups of 32 or 16, each group with a small integer scale (and minimum) times the block's
d (and dmin). Products of scales and codes are exact in fp32, so a multiplication and a subtraction fused into one
instruction round as two do. Source: ggml's quants (Gerganov et al.). Shapes: codes uint8 (rows, bytes).
"""

import torch
from torch import Tensor

from zimage.kernels.backend import choose, enqueue, jit, tl
from zimage.kernels.decode_blocks import block_spec, half, halves, interleaved, word_half

BLOCK = 256
BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}  # of a block
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where d and dmin are
BLOCKS = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 16, "Q5_K": 16, "Q6_K": 8}  # per program


def decode_k_blocks(codes: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Codes → numbers (rows, columns), computed in fp32 and rounded once to `dtype`."""
    return choose(launch, reference, codes)(codes, kind, dtype)


def reference(codes, kind, dtype):
    blocks = codes.reshape(-1, BYTES[kind])
    return _DECODERS[kind](blocks).reshape(len(codes), -1).to(dtype)


def _q2_k(b: Tensor) -> Tensor:
    """16 bytes: scales in low halves, minima in high ones; 64 bytes of two bits, d, dmin (f16)."""
    codes, s = _quarters(b[:, 16:80]), b[:, :16]
    scale, minimum = half(b, 80) * (s & 15), half(b, 82) * (s >> 4)
    return (scale[..., None] * codes - minimum[..., None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    """Third bits as the fifth ones of Q5_K, 64 bytes of two bits, 12 bytes of scales, d (f16); numbers minus 4.

    Scales have four bits in the halves of eight bytes and two in the quarters of four more, minus 32.
    """
    places = torch.arange(8, dtype=torch.uint8, device=b.device)[:, None]
    third = ((b[:, None, :32] >> places) & 1).reshape(-1, 16, 16).to(torch.int8)
    s = b[:, 96:108]
    upper = ((s[:, None, 8:] >> places[::2]) & 3).flatten(1)
    scale = (torch.cat((s[:, :8] & 15, s[:, :8] >> 4), dim=1) | (upper << 4)).to(torch.int8) - 32
    codes = _quarters(b[:, 32:96]).to(torch.int8) + 4 * third - 4
    return ((half(b, 108) * scale)[..., None] * codes).flatten(1)


def _quarters(packed: Tensor) -> Tensor:
    """64 bytes → two bits each (blocks, 16 groups, 16): the lowest of 32 bytes, the next of the same …"""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)[:, None]
    return ((packed.unflatten(1, (2, 1, 32)) >> shifts) & 3).reshape(-1, 16, 16)


def _q4_k(b: Tensor) -> Tensor:
    """d, dmin (f16), 12 bytes of scales and minima, 4 × 32 bytes: low halves are a group of 32, high ones the next."""
    codes = halves(b[:, 16:].unflatten(1, (4, 32))).flatten(1, 2)  # (blocks, 8 groups, 32)
    return _scaled(b, codes)


def _q5_k(b: Tensor) -> Tensor:
    """As Q4_K, with the fifth bits in 32 more bytes: bit g of byte i belongs to number i of group g."""
    bits = torch.arange(8, dtype=torch.uint8, device=b.device)[:, None]
    fifth = (b[:, None, 16:48] >> bits) & 1  # (blocks, 8, 32)
    codes = halves(b[:, 48:].unflatten(1, (4, 32))).flatten(1, 2)
    return _scaled(b, codes + 16 * fifth)


def _q6_k(b: Tensor) -> Tensor:
    """128 bytes of lower four bits, 64 of upper two, 16 int8 scales of groups of 16, d (f16); numbers minus 32."""
    low = halves(b[:, :128].unflatten(1, (2, 64))).flatten(2)  # (blocks, 2, 128): both halves of each 64 bytes
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=b.device)[:, None]
    high = (b[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts) & 3  # (blocks, 2, 4, 32)
    codes = (low + 16 * high.flatten(2)).to(torch.int16) - 32
    scale = half(b, 208) * b[:, 192:208].view(torch.int8)  # (blocks, 16)
    return (scale[..., None] * codes.reshape(-1, 16, 16)).flatten(1)


def _scaled(b: Tensor, codes: Tensor) -> Tensor:
    """d · scale · codes − dmin · minimum of 8 groups (blocks, 8, 32); six bits each in bytes 4 to 15."""
    s = b[:, 4:16]
    first, second, third = s[:, :4], s[:, 4:8], s[:, 8:12]
    scale = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minimum = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    scale, minimum = half(b, 0) * scale, half(b, 2) * minimum
    return (scale[..., None] * codes - minimum[..., None]).flatten(1)


_DECODERS = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}


@jit
def _quarters_kernel(codes_ptr, out_ptr, count, THIRD: tl.constexpr, BLOCKS: tl.constexpr):
    """BLOCKS blocks of Q2_K, or Q3_K if THIRD, as twice as many halves of 128 numbers; in words of 16 bits."""
    part = tl.program_id(0).to(tl.int64) * (2 * BLOCKS) + tl.arange(0, 2 * BLOCKS)
    present, block, side = part // 2 < count, part // 2, (part % 2).to(tl.int32)
    words = codes_ptr.to(tl.pointer_type(tl.uint16)) + block * (55 if THIRD else 42)
    w, there = tl.arange(0, 16)[None, :], present[:, None]
    d = word_half(tl.load(words + (54 if THIRD else 40), mask=present, other=0))[:, None]
    low = tl.load((words + (16 if THIRD else 8) + 16 * side)[:, None] + w, mask=there, other=0).to(tl.int32)
    if THIRD:
        third = tl.load(words[:, None] + w, mask=there, other=0).to(tl.int32) >> (4 * side)[:, None]
    else:
        dmin = word_half(tl.load(words + 41, mask=present, other=0))[:, None]
    for run in tl.static_range(4):  # of 32 numbers: two groups, whose scales are the bytes of a word
        scales = tl.load(words + (48 if THIRD else 4 * side) + run, mask=present, other=0).to(tl.int32)[:, None]
        scales = scales >> (8 * (w // 8))
        first, second = (low >> (2 * run)) & 3, (low >> (2 * run + 8)) & 3
        if THIRD:
            upper = tl.load(words + 52 + run % 2, mask=present, other=0).to(tl.int32)[:, None] >> (8 * (w // 8))
            upper = (upper >> (4 * side + 2 * (run // 2))[:, None]) & 3
            scale = d * (((scales >> (4 * side)[:, None]) & 15 | upper << 4) - 32).to(tl.float32)
            first += 4 * ((third >> run) & 1) - 4
            second += 4 * ((third >> (run + 8)) & 1) - 4
            pairs = scale * first.to(tl.float32), scale * second.to(tl.float32)
        else:
            scale, minimum = d * (scales & 15).to(tl.float32), dmin * ((scales >> 4) & 15).to(tl.float32)
            pairs = scale * first.to(tl.float32) - minimum, scale * second.to(tl.float32) - minimum
        decoded = interleaved(pairs[0], pairs[1], (2 * BLOCKS, 32))
        place = part[:, None] * 128 + 32 * run + tl.arange(0, 32)[None, :]
        tl.store(out_ptr + place, decoded.to(out_ptr.dtype.element_ty), mask=there)


@jit
def _minima_kernel(codes_ptr, out_ptr, count, FIFTH: tl.constexpr, BLOCKS: tl.constexpr):
    """BLOCKS blocks of Q4_K, or Q5_K if FIFTH, of `count` in all rows together: 9 or 11 times 16 bytes each."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    present = block < count
    pair, i = tl.arange(0, 4)[None, :], tl.arange(0, 32)[None, None, :]  # pairs of groups share 32 bytes
    head = codes_ptr.to(tl.pointer_type(tl.int32)) + block * (44 if FIFTH else 36)
    both = tl.load(head, mask=present, other=0)
    d, dmin = word_half((both & 65535).to(tl.uint16)), word_half((both >> 16).to(tl.uint16))
    low_scales = tl.load(head + 1, mask=present, other=0)[:, None]
    low_minima = tl.load(head + 2, mask=present, other=0)[:, None]
    rest = tl.load(head + 3, mask=present, other=0)[:, None]
    byte = codes_ptr + block[:, None, None] * (176 if FIFTH else 144) + 16 + i
    there = present[:, None, None]
    code = tl.load(byte + (32 if FIFTH else 0) + 32 * pair[:, :, None], mask=there, other=0).to(tl.int32)
    if FIFTH:
        bits = tl.load(byte, mask=there, other=0).to(tl.int32)
    for high in tl.static_range(2):  # the low halves of bytes are a group, the high ones the next
        group = 2 * pair + high
        first, second = low_scales >> (8 * (group % 4)), low_minima >> (8 * (group % 4))
        third = rest >> (8 * (group % 4))
        scale = tl.where(group < 4, first & 63, (third & 15) | ((first >> 6) & 3) << 4)
        minimum = tl.where(group < 4, second & 63, ((third >> 4) & 15) | ((second >> 6) & 3) << 4)
        number = (code >> (4 * high)) & 15
        if FIFTH:
            number |= ((bits >> group[:, :, None]) & 1) << 4
        scale, minimum = d[:, None] * scale.to(tl.float32), dmin[:, None] * minimum.to(tl.float32)
        decoded = scale[:, :, None] * number.to(tl.float32) - minimum[:, :, None]
        place = block[:, None, None] * 256 + 32 * group[:, :, None] + i
        tl.store(out_ptr + place, decoded.to(out_ptr.dtype.element_ty), mask=there)


@jit
def _q6_kernel(codes_ptr, out_ptr, count, BLOCKS: tl.constexpr):
    """BLOCKS blocks of Q6_K, as twice as many halves of 128 numbers; blocks begin at any even address."""
    part = tl.program_id(0).to(tl.int64) * (2 * BLOCKS) + tl.arange(0, 2 * BLOCKS)
    present, block, side = part // 2 < count, part // 2, part % 2
    words = codes_ptr.to(tl.pointer_type(tl.int16)) + block * 105
    d = word_half(tl.load(words + 104, mask=present, other=0))[:, None, None]
    k, w = tl.arange(0, 2)[None, :, None], tl.arange(0, 16)[None, None, :]  # two runs of 16 words, 32 numbers each
    there = present[:, None, None]
    low = tl.load((words + side * 32)[:, None, None] + 16 * k + w, mask=there, other=0).to(tl.int32)
    high = tl.load((words + 64 + side * 16)[:, None, None] + w, mask=there, other=0).to(tl.int32)
    for nibble in tl.static_range(2):
        run = 2 * nibble + k  # of 32 numbers, which share two bits of each byte of `high`
        scales = tl.load((words + 96 + side * 4)[:, None, None] + run, mask=there, other=0).to(tl.int32)
        scale = (((scales >> (8 * (w // 8))) & 255) ^ 128) - 128  # of 16 numbers each, int8
        first = ((low >> (4 * nibble)) & 15) | ((high >> (2 * run)) & 3) << 4
        second = ((low >> (4 * nibble + 8)) & 15) | ((high >> (2 * run + 8)) & 3) << 4
        scale = d * scale.to(tl.float32)
        pairs = scale * (first - 32).to(tl.float32), scale * (second - 32).to(tl.float32)
        decoded = interleaved(pairs[0], pairs[1], (2 * BLOCKS, 2, 32))
        place = part[:, None, None] * 128 + 32 * run + tl.arange(0, 32)[None, None, :]
        tl.store(out_ptr + place, decoded.to(out_ptr.dtype.element_ty), mask=there)


def launch(codes, kind, dtype):
    codes = codes.contiguous()
    count = codes.numel() // BYTES[kind]
    out = torch.empty((len(codes), count // len(codes) * BLOCK), dtype=dtype, device=codes.device)
    blocks = BLOCKS[kind]
    grid = (-(-count // blocks),)
    if kind == "Q6_K":
        enqueue(_q6_kernel, grid, codes, out, count, blocks, num_warps=4)
    elif kind in ("Q2_K", "Q3_K"):
        enqueue(_quarters_kernel, grid, codes, out, count, kind == "Q3_K", blocks, num_warps=4)
    else:
        enqueue(_minima_kernel, grid, codes, out, count, kind == "Q5_K", blocks, num_warps=4)
    return out


SPECS = tuple(block_spec(kind, BYTES, BLOCK, HALVES[kind], reference, launch) for kind in BYTES)
