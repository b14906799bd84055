"""Matrices that stay quantised in memory and are widened piece by piece when they are used.

A packed matrix (out, in) consists of codes and of what turns them into numbers. `PackedLinear` widens a few rows at a
time to multiply with them, so the whole model never exists in bf16; quant.py multiplies some kinds without widening.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.nn.layers import PIECE

if TYPE_CHECKING:
    from typing_extensions import TypeIs

HADAMARD_4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NVFP4_BLOCK, MXFP8_BLOCK = 16, 32  # columns that share a scale


class Packed(Protocol):
    """A quantised matrix."""

    @property
    def codes(self) -> Tensor:
        """The quantised values as they are stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of its numbers."""

    def rows(self, begin: int, end: int) -> Self:
        """Rows begin … end − 1, without a copy."""

    def to(self, device: torch.device) -> Self: ...

    def tensors(self) -> list[Tensor]:
        """Its tensors in memory."""

    def decode(self) -> Tensor:
        """The numbers (out, in), fp32."""


@dataclass(frozen=True)
class Scaled:
    """codes × scale: int8 or fp8 codes (out, in); scale fp32, () for all rows or (out, 1) for each.

    With `rotated`, groups of that many columns were rotated by the regular Hadamard matrix (ConvRot):
    codes × scale = W·Hᵀ, so W = codes × scale · H.
    """

    codes: Tensor
    scale: Tensor
    rotated: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, begin: int, end: int) -> "Scaled":
        scale = self.scale[begin:end] if self.scale.ndim else self.scale
        return replace(self, codes=self.codes[begin:end], scale=scale)

    def to(self, device: torch.device) -> "Scaled":
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale]

    def decode(self) -> Tensor:
        numbers = self.codes.float() * self.scale
        return rotate(numbers, self.rotated) if self.rotated else numbers


@dataclass(frozen=True)
class Grouped:
    """codes × scale: int8 or fp8 codes (out, in), with a scale for every `group` columns of a row.

    scale (out, groups) fp32, or uint8 for the exponents of mxfp8 (e8m0), whose number is 2^(byte − 127). The last
    group may be shorter.
    """

    codes: Tensor
    scale: Tensor
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, begin: int, end: int) -> "Grouped":
        return replace(self, codes=self.codes[begin:end], scale=self.scale[begin:end])

    def to(self, device: torch.device) -> "Grouped":
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale]

    def decode(self) -> Tensor:
        scale = powers_of_two(self.scale) if self.scale.dtype == torch.uint8 else self.scale
        return self.codes.float() * scale.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]


@dataclass(frozen=True)
class Int4:
    """Two signed 4-bit integers per byte, the first in the low half, a scale for each row; rotated as in Scaled."""

    codes: Tensor  # (out, in / 2) int8
    scale: Tensor  # (out, 1) fp32
    rotated: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def rows(self, begin: int, end: int) -> "Int4":
        return replace(self, codes=self.codes[begin:end], scale=self.scale[begin:end])

    def to(self, device: torch.device) -> "Int4":
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale]

    def decode(self) -> Tensor:
        halves = torch.stack((self.codes << 4, self.codes), dim=-1) >> 4  # int8: the shifts carry the sign
        return rotate(halves.flatten(1).float() * self.scale, self.rotated)


@dataclass(frozen=True)
class NVFP4:
    """Two 4-bit floats (e2m1) per byte, the first in the high half; an e4m3 scale per 16 columns and one for all."""

    codes: Tensor  # (out, in / 2) uint8
    block_scale: Tensor  # (out, in / 16) fp8
    scale: Tensor  # () fp32

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def rows(self, begin: int, end: int) -> "NVFP4":
        return replace(self, codes=self.codes[begin:end], block_scale=self.block_scale[begin:end])

    def to(self, device: torch.device) -> "NVFP4":
        return NVFP4(self.codes.to(device), self.block_scale.to(device), self.scale.to(device))

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.block_scale, self.scale]

    def decode(self) -> Tensor:
        table = torch.tensor(E2M1, device=self.codes.device)
        halves = torch.stack((self.codes >> 4, self.codes & 15), dim=-1)  # (out, in/2, 2)
        numbers = table[halves.flatten(1).int()].unflatten(1, (-1, NVFP4_BLOCK))  # (out, in/16, 16)
        return (numbers * (self.block_scale.float() * self.scale)[..., None]).flatten(1)


@dataclass(frozen=True)
class Blocks:
    """Rows of bytes that a library unpacks: `unpack` takes uint8 (out, bytes) and returns numbers (out, in), fp32."""

    codes: Tensor
    columns: int
    unpack: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    def rows(self, begin: int, end: int) -> "Blocks":
        return replace(self, codes=self.codes[begin:end])

    def to(self, device: torch.device) -> "Blocks":
        return replace(self, codes=self.codes.to(device))

    def tensors(self) -> list[Tensor]:
        return [self.codes]

    def decode(self) -> Tensor:
        return self.unpack(self.codes)


def is_packed(value: Tensor | Packed) -> "TypeIs[Packed]":
    return isinstance(value, Scaled | Grouped | Int4 | NVFP4 | Blocks)


class PackedLinear(nn.Module):
    """A Linear whose weight is packed; inference only."""

    def __init__(self, packed: Packed, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.packed, self.bias = packed, bias

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        out = packed_product(x, self.packed)
        return out if self.bias is None else out + self.bias


class PackedEmbedding(nn.Module):
    """An Embedding whose table is packed; only the rows that are looked up are widened."""

    def __init__(self, packed: Packed):
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.shape
        self.packed = packed

    def forward(self, ids: Tensor) -> Tensor:
        rows = [self.packed.rows(i, i + 1).decode() for i in ids.flatten().tolist()]
        return torch.cat(rows).view(*ids.shape, -1)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Products (..., tokens) of x (..., C) with every token's row."""
        return packed_product(x, self.packed)


def packed_product(x: Tensor, packed: Packed) -> Tensor:
    """x · weightᵀ of x (..., C) and a packed weight (out, C): a few rows are widened at a time."""
    out, columns = packed.shape
    rows = max(1, PIECE // columns)
    pieces = (packed.rows(i, min(i + rows, out)) for i in range(0, out, rows))
    return torch.cat([F.linear(x, piece.decode().to(x.dtype)) for piece in pieces], dim=-1)


def packed_codes(module: nn.Module) -> list[Tensor]:
    """The codes of a packed layer, on a CPU a view of the file; an empty list for other modules."""
    return [module.packed.codes] if isinstance(module, PackedLinear) else []


def rotate(x: Tensor, group: int) -> Tensor:
    """x · H in groups of `group` columns (..., C), H the normalised regular Hadamard matrix, symmetric and orthogonal.

    It is the Kronecker power of HADAMARD_4 / 2 (ConvRot, Huang et al. 2025), and is therefore applied factor by factor.
    """
    factor = torch.tensor(HADAMARD_4, dtype=x.dtype, device=x.device) / 2
    shape, levels = x.shape, round(math.log(group, 4))
    x = x.reshape(-1, *[4] * levels)
    for axis in range(1, levels + 1):
        x = (x.transpose(axis, -1) @ factor).transpose(axis, -1)
    return x.reshape(shape)


def powers_of_two(exponents: Tensor) -> Tensor:
    """The fp32 numbers of e8m0 bytes: the exponent of a float without its sign and mantissa, and 0 for 0."""
    return (exponents.int() << 23).view(torch.float32)


def unswizzled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales (rows, columns) from cuBLAS's tiles of 128 × 4, each stored as 32 × 16."""
    tiles = scales.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)  # tile row, tile column, r mod 32, r div 32, c
    return tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)[:rows, :columns].contiguous()
