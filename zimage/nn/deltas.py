"""The deltas that an adapter adds to the weight of a Linear layer, kept as the trained factors.

Shapes: W and ΔW (O, I), R the rank. A matrix is computed in the dtype and on the device of `like` or `weight`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


class Delta:
    """One layer's ΔW."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        raise NotImplementedError

    def rows(self, first: int, last: int) -> Self:
        """Rows first … last − 1: the share of one layer where several were trained as one."""
        raise NotImplementedError

    def matrix(self, like: Tensor) -> Tensor:
        """(O, I)"""
        raise NotImplementedError

    def change(self, weight: Tensor) -> Tensor:
        """What to add to this weight (O, I) at strength 1; this need not be a matrix that is known without it."""
        return self.matrix(weight)


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """LoRA (Hu et al. 2021): ΔW = scale · up · down, with w = up (O, R), down (R, I)."""

    w: tuple[Tensor, Tensor]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        up, down = self.w
        return up.shape[0], down.shape[1]

    def rows(self, first: int, last: int) -> Self:
        up, down = self.w
        return replace(self, w=(up[first:last], down))

    def matrix(self, like: Tensor) -> Tensor:
        up, down = self.w
        return (self.scale * up.to(like)) @ down.to(like)  # scales the smaller factor


@dataclass(frozen=True, eq=False)
class Kronecker(Delta):
    """LoKr (Yeh et al. 2023): rows `first` to `last` of ΔW = scale · w1 ⊗ w2; factors may be products."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float = 1.0
    first: int = 0
    last: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        height = self.w1[0].shape[0] * self.w2[0].shape[0]
        return len(range(height)[self.first : self.last]), self.w1[-1].shape[1] * self.w2[-1].shape[1]

    def rows(self, first: int, last: int) -> Self:
        return replace(self, first=self.first + first, last=self.first + last)

    def matrix(self, like: Tensor) -> Tensor:
        """Of w1 only the rows that are needed are multiplied out."""
        height, (out, _) = self.w2[0].shape[0], self.shape
        above = self.first // height  # rows of w1
        needed = product(self.w1, like)[above : -(-(self.first + out) // height)]
        begin = self.first - above * height
        return self.scale * torch.kron(needed, product(self.w2, like))[begin : begin + out]


@dataclass(frozen=True, eq=False)
class Hadamard(Delta):
    """LoHa (Hyeon-Woo et al. 2022): ΔW = scale · (w1_a · w1_b) ∘ (w2_a · w2_b)."""

    w1: tuple[Tensor, Tensor]
    w2: tuple[Tensor, Tensor]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1[0].shape[0], self.w1[1].shape[1]

    def rows(self, first: int, last: int) -> Self:
        (a1, b1), (a2, b2) = self.w1, self.w2
        return replace(self, w1=(a1[first:last], b1), w2=(a2[first:last], b2))

    def matrix(self, like: Tensor) -> Tensor:
        return self.scale * product(self.w1, like) * product(self.w2, like)


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """The difference between two models' weights, as it is."""

    w: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.w.shape[0], self.w.shape[1]

    def rows(self, first: int, last: int) -> Self:
        return replace(self, w=self.w[first:last])

    def matrix(self, like: Tensor) -> Tensor:
        return self.w.to(like)


@dataclass(frozen=True, eq=False)
class Decomposed(Delta):
    """DoRA (Liu et al. 2024): W + ΔW = magnitude · (W + inner) / ‖W + inner‖, so ΔW depends on W.

    The norm is per row for a magnitude (O, 1) and per column for (1, I). A strength s moves W by s · ΔW.
    """

    inner: Delta
    magnitude: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def per_row(self) -> bool:
        return self.magnitude.shape[1] == 1

    def rows(self, first: int, last: int) -> Self:
        if not self.per_row:
            raise ValueError("a norm per column cannot be computed from some of the rows")
        return replace(self, inner=self.inner.rows(first, last), magnitude=self.magnitude[first:last])

    def change(self, weight: Tensor) -> Tensor:
        moved = weight + self.inner.matrix(weight)
        norm = moved.norm(dim=1 if self.per_row else 0, keepdim=True).clamp_min(torch.finfo(moved.dtype).tiny)
        return moved * (self.magnitude.to(weight) / norm) - weight


def product(factors: Sequence[Tensor], like: Tensor) -> Tensor:
    """The single matrix, or the product of the two."""
    matrices = [factor.to(like) for factor in factors]
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]
