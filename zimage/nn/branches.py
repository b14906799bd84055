"""What adapters compute beside a layer whose weight they cannot be merged into: quantised, or widened when used.

A change of y = W · x belongs to one of three places: before the product (x is changed), beside it (a product of its
own) or after it (W · x is changed). Nothing here holds W, and only a dense difference takes a matrix's memory.

Shapes: x (…, I), y (…, O).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.nn.deltas import Decomposed, Delta, Dense, Hadamard, Kronecker, LowRank, product
from zimage.nn.rotations import InputRotation, OutputRotation, rotated

LEAST_RANK = 16

Stack = Sequence[tuple[Delta, float]]  # deltas of one layer with their strengths
Norms = Callable[[Decomposed], Tensor]  # of W + ΔW: (O, 1) or (1, I), fp32


@dataclass
class Beside:
    """The modules of one layer by their place."""

    before: list[nn.Module] = field(default_factory=list)  # x ↦ what is added to x
    branches: list[nn.Module] = field(default_factory=list)  # x ↦ what is added to y
    after: list[nn.Module] = field(default_factory=list)  # W · x ↦ what is added to y


def beside(stack: Stack, norms: Norms, like: Tensor) -> Beside:
    """The modules for the deltas of one layer, in the dtype and on the device of `like`."""
    found = Beside()
    if low := [(delta, strength) for delta, strength in stack if isinstance(delta, LowRank)]:
        found.branches.append(LowRankBranch(low, like))
    for delta, strength in stack:
        if isinstance(delta, Decomposed):
            _add_decomposed(found, delta, strength, norms(delta), like)
        elif isinstance(delta, InputRotation):
            found.before.append(Turned(delta.blocks, strength, None, like))
        elif isinstance(delta, OutputRotation):
            found.after.append(Turned(delta.blocks, strength, delta.rescale, like))
        elif not isinstance(delta, LowRank):
            found.branches.append(_branch(delta, strength, like))
    return found


def _branch(delta: Delta, strength: float, like: Tensor) -> nn.Module:
    if isinstance(delta, LowRank):
        return LowRankBranch([(delta, strength)], like)
    return BRANCHES[type(delta)](delta, strength, like)


def _add_decomposed(found: Beside, delta: Decomposed, strength: float, norms: Tensor, like: Tensor) -> None:
    """DoRA: with c = magnitude / norm, W + s · ΔW = (1 + s · (c − 1)) · W + s · c · inner, along rows or columns."""
    ratio = (delta.magnitude.to(norms) / norms).flatten()
    inner = _branch(delta.inner, strength, like)
    found.branches.append(Weighted(inner, ratio.to(like), after=delta.per_row))
    changed = Factor((strength * (ratio - 1)).to(like))
    (found.after if delta.per_row else found.before).append(changed)


class LowRankBranch(nn.Module):
    """x ↦ (x · downᵀ) · upᵀ for any number of low-rank deltas, with their factors side by side."""

    down: Tensor  # (R, I)
    up: Tensor  # (O, R)

    def __init__(self, stack: Iterable[tuple[LowRank, float]], like: Tensor):
        super().__init__()
        wide, stack = like.float(), list(stack)
        down = torch.cat([delta.w[1].to(wide) for delta, _ in stack])
        up = torch.cat([delta.scale * strength * delta.w[0].to(wide) for delta, strength in stack], dim=1)
        # Ranks are powers of two, since each size costs another compilation of a block.
        room = max(LEAST_RANK, 1 << (len(down) - 1).bit_length()) - len(down)
        self.register_buffer("down", F.pad(down, (0, 0, 0, room)).to(like))
        self.register_buffer("up", F.pad(up, (0, room)).to(like))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


class KroneckerBranch(nn.Module):
    """x ↦ x · (w1 ⊗ w2)ᵀ through its factors w1 (a, b) and w2 (c, d): a·c = O, b·d = I."""

    w1: Tensor  # (a, b)
    w2: Tensor  # (c, d)

    def __init__(self, delta: Kronecker, strength: float, like: Tensor):
        super().__init__()
        wide = like.float()
        self.register_buffer("w1", (delta.scale * strength * product(delta.w1, wide)).to(like))
        self.register_buffer("w2", product(delta.w2, wide).to(like))
        self.first, self.last = delta.first, delta.last

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x.unflatten(-1, (self.w1.shape[1], -1)), self.w2)  # (…, b, d) → (…, b, c)
        return (self.w1 @ inner).flatten(-2)[..., self.first : self.last]  # (…, a, c) → (…, O)


class HadamardBranch(nn.Module):
    """x ↦ x · ((w1_a · w1_b) ∘ (w2_a · w2_b))ᵀ; computed at each use, since x cannot pass through the factors."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor

    def __init__(self, delta: Hadamard, strength: float, like: Tensor):
        super().__init__()
        (a1, b1), (a2, b2) = delta.w1, delta.w2
        scaled = delta.scale * strength * a1.to(like.float())
        for name, factor in (("a1", scaled), ("b1", b1), ("a2", a2), ("b2", b2)):
            self.register_buffer(name, factor.to(like))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.a1 @ self.b1) * (self.a2 @ self.b2))


class DenseBranch(nn.Module):
    """x ↦ x · ΔWᵀ with the whole ΔW, which takes the memory of the unquantised layer and doubles the products."""

    w: Tensor  # (O, I)

    def __init__(self, delta: Dense, strength: float, like: Tensor):
        super().__init__()
        self.register_buffer("w", (strength * delta.w.to(like.float())).to(like))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Factor(nn.Module):
    """x ↦ factor ∘ x."""

    factor: Tensor

    def __init__(self, factor: Tensor):
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Weighted(nn.Module):
    """A branch with one weight per output (`after`) or per input."""

    weights: Tensor

    def __init__(self, inner: nn.Module, weights: Tensor, after: bool):
        super().__init__()
        self.inner, self.after = inner, after
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.weights if self.after else self.inner(x * self.weights)


class Turned(nn.Module):
    """x ↦ strength · (rescale ∘ (x · R) − x)."""

    blocks: Tensor  # (n, b, b): strength · (R · diag(rescale) − I)

    def __init__(self, blocks: Tensor, strength: float, rescale: Tensor | None, like: Tensor):
        super().__init__()
        wide = blocks.to(like.float())
        if rescale is not None:
            wide = wide * rescale.to(wide).unflatten(0, (len(wide), 1, -1))  # (n, 1, b)
        one = torch.eye(wide.shape[-1], device=wide.device)
        self.register_buffer("blocks", (strength * (wide - one)).to(like))

    def forward(self, x: Tensor) -> Tensor:
        return rotated(x, self.blocks)


BRANCHES: dict[type[Delta], Callable[..., nn.Module]] = {
    Kronecker: KroneckerBranch,
    Hadamard: HadamardBranch,
    Dense: DenseBranch,
}
