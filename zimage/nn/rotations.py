"""OFT: weights that are rotated, block by block, instead of added to (Qiu et al. 2023).

A rotation R is block-diagonal: n blocks of b × b, each made of a skew-symmetric matrix Q = −Qᵀ by Cayley's formula.
PEFT and OneTrainer rotate a layer's inputs, LyCORIS and kohya its outputs.

Shapes: W (O, I), blocks (n, b, b).
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from zimage.nn.deltas import Delta


@dataclass(frozen=True, eq=False)
class InputRotation(Delta):
    """W + ΔW = W · Rᵀ, so y = W · (Rᵀ · x); a strength s moves W by s · ΔW. n · b = I, and `out` is O."""

    blocks: Tensor
    out: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.blocks.shape[0] * self.blocks.shape[1]

    def rows(self, first: int, last: int) -> Self:
        return replace(self, out=last - first)

    def change(self, weight: Tensor) -> Tensor:
        return rotated(weight, self.blocks.to(weight).mT) - weight


@dataclass(frozen=True, eq=False)
class OutputRotation(Delta):
    """W + ΔW = diag(rescale) · Rᵀ · W; n · b = O, and `columns` is I. `rescale` (O,) may be absent."""

    blocks: Tensor
    columns: int
    rescale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape[0] * self.blocks.shape[1], self.columns

    def rows(self, first: int, last: int) -> Self:
        side = self.blocks.shape[1]
        if first % side or last % side:
            raise ValueError("rows that are rotated together cannot be separated")
        scale = None if self.rescale is None else self.rescale[first:last]
        return replace(self, blocks=self.blocks[first // side : last // side], rescale=scale)

    def change(self, weight: Tensor) -> Tensor:
        moved = rotated(weight.T, self.blocks.to(weight)).T
        return (moved if self.rescale is None else moved * self.rescale.to(weight)[:, None]) - weight


def rotated(x: Tensor, blocks: Tensor) -> Tensor:
    """x · R of x (…, n · b)."""
    pieces = x.unflatten(-1, blocks.shape[:2])  # (…, n, b)
    return torch.einsum("...nk,nkc->...nc", pieces, blocks).flatten(-2)


def skew(upper: Tensor, side: int) -> Tensor:
    """Q (n, b, b) from the values above its diagonals (n, b · (b − 1) / 2), row by row."""
    rows, columns = torch.triu_indices(side, side, 1)
    matrices = upper.new_zeros(len(upper), side, side)
    matrices[:, rows, columns] = upper
    return matrices - matrices.mT


def cayley(q: Tensor) -> Tensor:
    """(I + Q) · (I − Q)⁻¹."""
    one = torch.eye(q.shape[-1], dtype=q.dtype)
    return torch.linalg.solve(one - q, one + q, left=False)


def cayley_series(q: Tensor, terms: int) -> Tensor:
    """PEFT's approximation of Cayley's formula: I + 2Q + 2Q² + … + Q^m, with its way to count the terms."""
    total = torch.eye(q.shape[-1], dtype=q.dtype).repeat(len(q), 1, 1)
    if terms == 2:
        return total + 2 * q
    power, highest = q, max(terms - 1, 3)
    for exponent in range(1, highest + 1 if terms > 2 else 1):
        power = q if exponent == 1 else power @ q
        total = total + (power if exponent == highest else 2 * power)
    return total


def limited(q: Tensor, most: float) -> Tensor:
    """Each matrix of Q with a norm of at most `most` (constrained OFT)."""
    norms = torch.linalg.matrix_norm(q)[:, None, None]
    return torch.where(norms <= most, q, q * (most / norms))


def side_of(values: int) -> int | None:
    """b of a matrix with b · (b − 1) / 2 values above its diagonal, or None where there is no such b."""
    side = (1 + math.isqrt(1 + 8 * values)) // 2
    return side if side * (side - 1) // 2 == values else None
