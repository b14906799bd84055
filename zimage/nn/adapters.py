"""Adds the deltas of adapters to the Linear layers of a loaded model: a transformation that follows quantising.

Deltas are merged into the weight of a plain float layer, always from the checkpoint's weight: nothing is ever added to
or subtracted from a merged weight, so without deltas the layer holds the original bits. A layer of another kind
(quantised, or widened when used) is wrapped, and its deltas are computed at run time.

Shapes: x (…, I), y (…, O), weights (O, I).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.errors import RequestError
from zimage.nn.deltas import Decomposed, Delta, Hadamard, Kronecker, LowRank, product

LEAST_RANK = 16

Stack = Sequence[tuple[Delta, float]]  # deltas of one layer with their strengths


class LowRankBranch(nn.Module):
    """x ↦ (x · downᵀ) · upᵀ for any number of low-rank deltas, with their factors side by side."""

    down: Tensor  # (R, I)
    up: Tensor  # (O, R)

    def __init__(self, stack: Sequence[tuple[LowRank, float]], like: Tensor):
        super().__init__()
        wide = like.float()
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


BRANCHES: dict[type[Delta], Callable[..., nn.Module]] = {Kronecker: KroneckerBranch, Hadamard: HadamardBranch}


class AdaptedLinear(nn.Module):
    """A linear layer of any kind with branches beside it: y = base(x) + Σ branch(x)."""

    def __init__(self, base: nn.Module, branches: Sequence[nn.Module]):
        super().__init__()
        self.base, self.branches = base, nn.ModuleList(branches)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def bias(self) -> Tensor | None:
        bias = self.base.bias
        return bias if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        for branch in self.branches:
            out = out + branch(x)
        return out


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Path → (O, I) of every linear layer; the model may be on meta."""
    layers = {path: module for path, module in model.named_modules() if hasattr(module, "in_features")}
    return {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}


def is_plain(model: nn.Module, path: str, dtype: torch.dtype) -> bool:
    """Whether deltas are merged into the layer at `path`: a Linear whose weight stays in memory in `dtype`."""
    layer = model.get_submodule(path)
    return type(layer) is nn.Linear and layer.weight.dtype == dtype


def adapt(
    model: nn.Module, path: str, stack: Stack, original: Callable[[], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Make these the only deltas of the layer at `path`; an empty stack restores the layer as it was loaded.

    `original` reads the layer's weight from the checkpoint; `dtype` is that of the activations. Raises RequestError.
    """
    layer = model.get_submodule(path)
    base = layer.base if isinstance(layer, AdaptedLinear) else layer
    if is_plain(model, path, dtype):
        base.weight = nn.Parameter(merged(original().to(device), stack, dtype), requires_grad=False)
        return
    if any(isinstance(delta, Decomposed) for delta, _ in stack):
        raise RequestError(f"{path} is not a plain layer, and DoRA needs its float weight; load with precision bf16")
    _replace(model, path, AdaptedLinear(base, _branches(stack, dtype, device)) if stack else base)


def merged(original: Tensor, stack: Stack, dtype: torch.dtype) -> Tensor:
    """W + Σ strength · ΔW, computed in fp32 or wider and rounded once; without deltas `original` itself if possible."""
    if not stack:
        return original.to(dtype).contiguous()
    weight = original.to(torch.promote_types(dtype, torch.float32))
    total = weight.clone()
    for delta, strength in stack:
        total.add_(delta.change(weight), alpha=strength)
    return total.to(dtype)


def _branches(stack: Stack, dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
    like = torch.empty(0, dtype=dtype, device=device)
    low = [(delta, strength) for delta, strength in stack if isinstance(delta, LowRank)]
    others = [BRANCHES[type(d)](d, strength, like) for d, strength in stack if not isinstance(d, LowRank)]
    return [LowRankBranch(low, like), *others] if low else others


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, layer)
