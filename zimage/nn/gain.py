"""How much a linear layer can enlarge its input: bounds for a dtype that overflows early.

By the inequality of Cauchy and Schwarz, an output y_j = Σ w_jk · x_k and every partial sum of it stay within
‖w_j‖₂ · ‖x‖₂, and the whole output within ‖W‖_F · ‖x‖₂. Biases are not part of either.

Shapes: weights (O, I).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zimage.nn.adapters import AdaptedLinear
from zimage.nn.layers import PIECE
from zimage.nn.packed import PackedLinear
from zimage.nn.quant import QuantisedLinear

MEASURED = "gain"  # attribute of a weight: what was measured, since it is never changed in place


class Gain(NamedTuple):
    """Bounds of a linear map: of one output, and of the norm of all outputs, for an input of norm 1."""

    row: float
    whole: float

    def __add__(self, other: "Gain") -> "Gain":  # type: ignore[override]
        return Gain(self.row + other.row, self.whole + other.whole)


@torch.no_grad()
def gain(layer: nn.Module, device: torch.device) -> Gain:
    """The gain of a linear layer of any kind, measured on `device` when first asked for."""
    if isinstance(layer, AdaptedLinear):
        return _adapted(layer, device)
    holder = layer if isinstance(layer, PackedLinear | QuantisedLinear) else layer.get_parameter("weight")
    if MEASURED not in vars(holder):
        vars(holder)[MEASURED] = _of_norms(_row_norms(layer, device))
    return vars(holder)[MEASURED]


def sides(layer: nn.Module) -> tuple[int, int]:
    """(O, I) of a linear layer of any kind."""
    outputs, inputs = layer.out_features, layer.in_features
    assert isinstance(outputs, int)
    assert isinstance(inputs, int)
    return outputs, inputs


def _adapted(layer: AdaptedLinear, device: torch.device) -> Gain:
    """y = W · (x + before(x)) + branch(x) + after(W · x): the sums of the bounds of all terms."""
    outputs, inputs = sides(layer)
    base, moved = gain(layer.base, device), 1.0 + sum(_of_map(m, inputs, device).whole for m in layer.before)
    total = Gain(base.row * moved, base.whole * moved)
    for branch in layer.branches:
        total += _of_map(branch, inputs, device)
    for module in layer.after:
        row, whole = _of_map(module, outputs, device)
        total += Gain(row * base.whole, whole * base.whole)
    return total


def _row_norms(layer: nn.Module, device: torch.device) -> Tensor:
    """‖row‖ (O,) of a layer's weight, of the numbers that are multiplied."""
    if isinstance(layer, PackedLinear | QuantisedLinear):
        return torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in _decoded(layer)])
    weight = layer.get_parameter("weight")
    used = vars(weight).get("wanted", weight.dtype)  # of a weight that was left in its file
    sums = torch.promote_types(used, torch.float32)
    return torch.linalg.vector_norm(weight.to(device).to(used), dim=1, dtype=sums)


def _decoded(layer: PackedLinear | QuantisedLinear) -> Iterator[Tensor]:
    """The rows of a layer's weight in fp32, a few at a time."""
    step = max(1, PIECE // layer.in_features)
    for i in range(0, layer.out_features, step):
        end = min(i + step, layer.out_features)
        if isinstance(layer, PackedLinear):
            yield layer.packed.rows(i, end).decode(torch.float32)
        else:
            yield layer.weight[i:end].float() * layer.scale[:, i:end].t()


def _of_map(module: nn.Module, inputs: int, device: torch.device) -> Gain:
    """The gain of a linear map without a weight of its own, from what it makes of each unit vector."""
    squares = torch.zeros((), device=device)
    for unit_vectors in torch.eye(inputs, device=device).split(256):
        squares = squares + module(unit_vectors).square().sum(dim=0)
    return _of_norms(squares.sqrt())


def _of_norms(rows: Tensor) -> Gain:
    """From the norm of every row."""
    return Gain(*torch.stack((rows.amax(), torch.linalg.vector_norm(rows))).tolist())
