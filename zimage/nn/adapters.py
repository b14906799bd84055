"""Adds the deltas of adapters to the layers of a loaded model: a transformation that follows quantising.

Deltas are merged into the weight of a plain float layer, always from the checkpoint's weight: nothing is ever added to
or subtracted from a merged weight, so without deltas the layer holds the original bits. A layer of another kind
(quantised, or widened when used) is wrapped, and its deltas are computed at run time. Vectors (the weights of norms,
biases) are merged in models of every kind.

Shapes: x (…, I), y (…, O), weights (O, I).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from zimage.nn.branches import Beside, Stack, beside
from zimage.nn.deltas import Decomposed
from zimage.nn.layers import PIECE, BlockLinear
from zimage.nn.packed import Packed, decoded, is_packed

UNADAPTED = "unadapted"  # attribute of a module: its vectors as they were loaded


class AdaptedLinear(nn.Module):
    """A linear layer of any kind with adapters: y = base(x + Σ before(x)) + Σ branch(x) + Σ after(W · x)."""

    def __init__(self, base: nn.Module, parts: Beside):
        super().__init__()
        self.base, self.branches = base, nn.ModuleList(parts.branches)
        self.before, self.after = nn.ModuleList(parts.before), nn.ModuleList(parts.after)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def bias(self) -> Tensor | None:
        bias = self.base.bias
        return bias if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(_beside_dtype(x.dtype))
        moved = wide
        for module in self.before:
            moved = moved + module(wide)
        out = first = self.base(moved.to(x.dtype)).to(wide.dtype)
        for branch in self.branches:
            out = out + branch(wide)
        if self.after:
            plain = self.base(x).to(wide.dtype) if self.before else first
            product = plain if self.bias is None else plain - self.bias
            for module in self.after:
                out = out + module(product)
        return out.to(x.dtype)


def _beside_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is computed beside a layer of this dtype: fp16 could overflow in between."""
    return torch.float32 if dtype is torch.float16 else dtype


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Path → (O, I) of every linear layer; the model may be on meta."""
    layers = {path: module for path, module in model.named_modules() if hasattr(module, "in_features")}
    return {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}


def vector_sizes(model: nn.Module) -> dict[str, int]:
    """Name → length of every weight of a norm and every bias; the model may be on meta."""
    return {name: len(weight) for name, weight in model.named_parameters() if weight.ndim == 1}


def is_plain(model: nn.Module, path: str) -> bool:
    """Whether deltas are merged into the layer at `path`: a Linear whose weight stays in memory as it is used."""
    return type(model.get_submodule(path)) in (nn.Linear, BlockLinear)


def adapt(
    model: nn.Module,
    path: str,
    stack: Stack,
    original: Callable[[], Tensor | Packed],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Make these the only deltas of the layer at `path`; an empty stack restores the layer as it was loaded.

    `original` reads the layer's weight from the checkpoint; `dtype` is that of the activations.
    """
    layer = model.get_submodule(path)
    base = layer.base if isinstance(layer, AdaptedLinear) else layer
    if is_plain(model, path):
        stored = original()  # packed, if a GPU cannot widen it: then it was decoded while it was loaded
        weight = decoded(stored, torch.float32, device) if is_packed(stored) else stored.to(device)
        held = base.get_parameter("weight").dtype
        base.weight = nn.Parameter(merged(weight, stack, held), requires_grad=False)
        return
    if not stack:
        _replace(model, path, base)
        return
    like = torch.empty(0, dtype=_beside_dtype(dtype), device=device)
    parts = beside(stack, lambda delta: moved_norms(original(), delta, device), like)
    _replace(model, path, AdaptedLinear(base, parts))


def adapt_vector(
    model: nn.Module,
    name: str,
    stack: Sequence[tuple[Tensor, float]],
    original: Callable[[], Tensor],
    device: torch.device,
) -> None:
    """Make these the only differences, each with its strength, of a norm's weight or a layer's bias.

    An empty stack restores the very parameter that was loaded, or its value where that was left in its file.
    """
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    owner = layer.base if isinstance(layer, AdaptedLinear) else layer
    kept: dict[str, nn.Parameter] = vars(owner).setdefault(UNADAPTED, {})
    loaded = kept.setdefault(leaf, getattr(owner, leaf))
    if not stack:
        del kept[leaf]
        if not hasattr(loaded, "wanted"):  # or it is brought only while its block is streamed
            setattr(owner, leaf, loaded)
            return
    held = getattr(loaded, "wanted", loaded.dtype)
    value = original().to(device=device, dtype=torch.promote_types(held, torch.float32), copy=True)
    for difference, strength in stack:
        value.add_(difference.to(value), alpha=strength)
    setattr(owner, leaf, nn.Parameter(value.to(held), requires_grad=False))


def merged(original: Tensor, stack: Stack, dtype: torch.dtype) -> Tensor:
    """W + Σ strength · ΔW, computed in fp32 or wider and rounded once; without deltas `original` itself if possible."""
    if not stack:
        return original.to(dtype).contiguous()
    weight = original.to(torch.promote_types(dtype, torch.float32))
    total = weight.clone()
    for delta, strength in stack:
        total.add_(delta.change(weight), alpha=strength)
    return total.to(dtype)


def moved_norms(weight: Tensor | Packed, delta: Decomposed, device: torch.device) -> Tensor:
    """‖W + ΔW‖ of each row (O, 1) or each column (1, I), fp32, for the magnitudes of a DoRA; never 0.

    A few rows at a time are decoded and multiplied out.
    """
    pieces = _moved(weight, delta, device)
    if delta.per_row:
        norms = torch.cat([piece.norm(dim=1, keepdim=True) for piece in pieces])
    else:
        norms = sum((piece.square().sum(dim=0, keepdim=True) for piece in pieces), torch.zeros(())).sqrt()
    return norms.clamp_min(torch.finfo(torch.float32).tiny)


def _moved(weight: Tensor | Packed, delta: Decomposed, device: torch.device) -> Iterator[Tensor]:
    """W + ΔW in pieces of whole rows, fp32."""
    out, columns = delta.shape
    step = max(1, PIECE // columns)
    for i in range(0, out, step):
        end = min(i + step, out)
        rows = weight.rows(i, end).to(device).decode() if is_packed(weight) else weight[i:end].to(device).float()
        yield rows + delta.inner.rows(i, end).matrix(rows)


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, layer)
