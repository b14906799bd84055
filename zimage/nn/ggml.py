"""Decodes those block-quantised matrices of llama.cpp that image models use, in PyTorch, on any device.

A row is a sequence of blocks. A block of Q8_0 or Q4_0 has 32 numbers and a scale d; a block of a K kind has 256 numbers
in groups of 32 or 16, each group with a small integer scale (and minimum) times the block's d (and dmin).
Source: ggml's quants (Gerganov et al.); tests compare every kind with PyPI's `gguf`, which unpacks the other kinds.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def q8_0(b: Tensor) -> Tensor:
    """d (f16), 32 × int8."""
    return _half(b, 0) * b[:, 2:].view(torch.int8)


def q4_0(b: Tensor) -> Tensor:
    """d (f16), 16 bytes: low halves are numbers 0 to 15, high halves 16 to 31, each minus 8."""
    return _half(b, 0) * (_halves(b[:, 2:]).flatten(1) - 8)


def q4_k(b: Tensor) -> Tensor:
    """d, dmin (f16), 12 bytes of scales and minima, 4 × 32 bytes: low halves are a group of 32, high ones the next."""
    codes = _halves(b[:, 16:].unflatten(1, (4, 32))).flatten(1, 2)  # (blocks, 8 groups, 32)
    return _scaled(b, codes)


def q5_k(b: Tensor) -> Tensor:
    """As Q4_K, with the fifth bits in 32 more bytes: bit g of byte i belongs to number i of group g."""
    bits = torch.arange(8, dtype=torch.uint8, device=b.device)[:, None]
    fifth = (b[:, None, 16:48] >> bits) & 1  # (blocks, 8, 32)
    codes = _halves(b[:, 48:].unflatten(1, (4, 32))).flatten(1, 2)
    return _scaled(b, codes + 16 * fifth)


def q6_k(b: Tensor) -> Tensor:
    """128 bytes of lower four bits, 64 of upper two, 16 int8 scales of groups of 16, d (f16); numbers minus 32."""
    low = _halves(b[:, :128].unflatten(1, (2, 64))).flatten(2)  # (blocks, 2, 128): both halves of each 64 bytes
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device)[:, None]
    high = (b[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts) & 3  # (blocks, 2, 4, 32)
    codes = (low + 16 * high.flatten(2)).to(torch.int16) - 32
    scale = _half(b, 208) * b[:, 192:208].view(torch.int8)  # (blocks, 16)
    return (scale[..., None] * codes.reshape(-1, 16, 16)).flatten(1)


DECODERS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q8_0": (34, q8_0),
    "Q4_0": (18, q4_0),
    "Q4_K": (144, q4_k),
    "Q5_K": (176, q5_k),
    "Q6_K": (210, q6_k),
}  # bytes of a block, and the function that decodes it

NUMBERS = {kind: 256 if kind.endswith("_K") else 32 for kind in DECODERS}  # in a block


def decode(kind: str, codes: Tensor) -> Tensor:
    """uint8 (rows, bytes) → numbers (rows, columns) fp32."""
    size, decoder = DECODERS[kind]
    return decoder(codes.reshape(-1, size)).reshape(len(codes), -1)


def _half(b: Tensor, at: int) -> Tensor:
    """The f16 number at byte `at` of each block, (blocks, 1) fp32."""
    return b[:, at : at + 2].contiguous().view(torch.float16).float()


def _halves(packed: Tensor) -> Tensor:
    """(..., n) bytes → (..., 2, n): their low and high halves."""
    return torch.stack((packed & 15, packed >> 4), dim=-2).to(torch.int8)


def _scaled(b: Tensor, codes: Tensor) -> Tensor:
    """d · scale · codes − dmin · minimum of 8 groups (blocks, 8, 32); six bits each in bytes 4 to 15."""
    s = b[:, 4:16]
    first, second, third = s[:, :4], s[:, 4:8], s[:, 8:12]
    scale = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minimum = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    scale, minimum = _half(b, 0) * scale, _half(b, 2) * minimum
    return (scale[..., None] * codes - minimum[..., None]).flatten(1)
