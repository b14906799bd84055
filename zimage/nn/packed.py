"""Matrices that stay quantised in memory and are widened when they are used.

A packed matrix (out, in) consists of codes and of what turns them into numbers. On a CPU, `PackedLinear` widens a few
rows at a time to multiply with them; on a GPU one kernel widens a whole matrix, so one at a time exists in the dtype of
the activations. quant.py multiplies some kinds without widening.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.kernels.decode_nvfp4 import BLOCK, decode_nvfp4
from zimage.kernels.decode_scaled import decode_scaled
from zimage.kernels.rotate import decode_rotated
from zimage.nn.layers import rows_at_a_time

if TYPE_CHECKING:
    from typing_extensions import TypeIs

MXFP8_BLOCK = 32  # columns that share a scale


@dataclass(frozen=True)
class Packed(ABC):
    """A quantised matrix. Each of its tensors has a row for every one of its rows, or is a number for all of them."""

    codes: Tensor
    has_kernel: ClassVar[bool] = True  # whether a GPU widens it by itself

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of its numbers."""
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, begin: int, end: int) -> Self:
        """Rows begin … end − 1, without a copy."""
        return self._each(lambda tensor: tensor[begin:end] if tensor.ndim else tensor)

    def taken(self, ids: Tensor) -> Self:
        """Its rows at these places (N,), as a matrix of N rows."""
        return self._each(lambda tensor: tensor[ids] if tensor.ndim else tensor)

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device))

    def tensors(self) -> list[Tensor]:
        """Its tensors in memory."""
        return [value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)]

    @abstractmethod
    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers (out, in), computed in fp32 and rounded once to `dtype`."""

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        names = [field.name for field in fields(self) if isinstance(getattr(self, field.name), Tensor)]
        return replace(self, **{name: change(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class Scaled(Packed):
    """codes × scale: int8 or fp8 codes (out, in); scale fp32, () for all rows or (out, 1) for each.

    With `rotated`, groups of that many columns were rotated by the regular Hadamard matrix (ConvRot):
    codes × scale = W·Hᵀ, so W = codes × scale · H.
    """

    scale: Tensor
    rotated: int = 0

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.rotated:
            return decode_rotated(self.codes, self.scale, self.rotated, dtype)
        return decode_scaled(self.codes, self.scale, self.codes.shape[1], dtype)


@dataclass(frozen=True)
class Grouped(Packed):
    """codes × scale: int8 or fp8 codes (out, in), with a scale for every `group` columns of a row.

    scale (out, groups) fp32, or uint8 for the exponents of mxfp8 (e8m0), whose number is 2^(byte − 127). The last
    group may be shorter.
    """

    scale: Tensor
    group: int

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return decode_scaled(self.codes, self.scale, self.group, dtype)


@dataclass(frozen=True)
class Int4(Packed):
    """Two signed 4-bit integers per byte, the first in the low half, a scale for each row; rotated as in Scaled.

    codes (out, in / 2) uint8, scale (out, 1) fp32.
    """

    scale: Tensor
    rotated: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return decode_rotated(self.codes, self.scale, self.rotated, dtype)


@dataclass(frozen=True)
class NVFP4(Packed):
    """Two 4-bit floats (e2m1) per byte, the first in the high half; an e4m3 scale per 16 columns and one for all.

    codes (out, in / 2) uint8, block_scale (out, in / 16) fp8, scale () fp32.
    """

    block_scale: Tensor
    scale: Tensor
    block: ClassVar[int] = BLOCK

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return decode_nvfp4(self.codes, self.block_scale, self.scale, dtype)


@dataclass(frozen=True)
class Blocks(Packed):
    """Rows of bytes that a library unpacks: `unpack` takes uint8 (out, bytes) and returns numbers (out, in), fp32.

    It runs on a CPU; for a GPU such a matrix is decoded while it is loaded.
    """

    columns: int
    unpack: Callable[[Tensor], Tensor]
    has_kernel: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.unpack(self.codes).to(dtype)


def is_packed(value: Tensor | Packed) -> "TypeIs[Packed]":
    return isinstance(value, Packed)


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
        return self.packed.taken(ids.flatten()).decode().view(*ids.shape, -1)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Products (..., tokens) of x (..., C) with every token's row."""
        return packed_product(x, self.packed)


def packed_product(x: Tensor, packed: Packed) -> Tensor:
    """x · weightᵀ of x (..., C) and a packed weight (out, C): as many rows are widened at a time as suit the device."""
    out, columns = packed.shape
    rows = rows_at_a_time(columns, x.device)
    if rows >= out:
        return F.linear(x, packed.decode(x.dtype))
    pieces = (packed.rows(i, min(i + rows, out)) for i in range(0, out, rows))
    return torch.cat([F.linear(x, piece.decode(x.dtype)) for piece in pieces], dim=-1)


def decoded(packed: Packed, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers (out, in) as a plain tensor on another device; a few rows at a time are decoded where they lie."""
    out = torch.empty(packed.shape, dtype=dtype, device=device)
    rows = rows_at_a_time(packed.shape[1], packed.codes.device)
    for i in range(0, len(out), rows):
        end = min(i + rows, len(out))
        out[i:end] = packed.rows(i, end).decode(dtype)
    return out


def packed_codes(module: nn.Module) -> list[Tensor]:
    """The codes of a packed layer, on a CPU a view of the file; an empty list for other modules."""
    return [module.packed.codes] if isinstance(module, PackedLinear) else []


def unswizzled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales (rows, columns) from cuBLAS's tiles of 128 × 4, each stored as 32 × 16."""
    tiles = scales.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)  # tile row, tile column, r mod 32, r div 32, c
    return tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)[:rows, :columns].contiguous()
