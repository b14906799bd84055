"""Guidance: one velocity from those of a prompt and of what it is steered away from, by methods as a table.

A noise level evaluates some branches: the prompt, the negative prompt. A method says which, and how their velocities
make one. Guidance counts from 0 everywhere: scale 0 is the prompt's own velocity, and other programs' CFG is scale + 1.

Shapes: velocities (B, C, h, w) fp32.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Value: TypeAlias = float | tuple[int, ...]  # of a method's parameter
Values: TypeAlias = Mapping[str, Value]
Velocities: TypeAlias = Mapping[str, Tensor]  # branch → velocity
Combined: TypeAlias = tuple[Tensor, Tensor | None]

PROMPT, NEGATIVE = "prompt", "negative"  # branches
AVERAGE = "average"  # what a method that remembers is given again, under this name


def guide(positive: Tensor, negative: Tensor, scale: float, normalization: float = 0.0) -> Tensor:
    """Classifier-free guidance pos + scale·(pos − neg) (Ho & Salimans 2022, counted from 0), in fp32.

    With normalization c > 0, a guided velocity longer than c · ‖pos‖ is scaled back to that length, sample by sample.
    """
    return limited(positive + scale * (positive - negative), positive, normalization)


def limited(guided: Tensor, positive: Tensor, normalization: float) -> Tensor:
    """A velocity scaled back to c · ‖pos‖ where it is longer, sample by sample; as it is where c = 0."""
    if normalization <= 0:
        return guided
    limit, length = normalization * _norm(positive), _norm(guided)
    return guided * torch.where(length > limit, limit / length, 1.0)


def guidance_at(sigma: Tensor, scale: float, truncation: float = 1.0) -> float:
    """The guidance scale at one noise level σ (): 0 once 1 − σ is past `truncation`.

    1 − σ is taken in thousandths and fp32, as the reference does, so that ties fall the same way.
    """
    return 0.0 if float((1000 - sigma * 1000) / 1000) > truncation else scale


def _norm(x: Tensor) -> Tensor:
    """(B, 1, 1, 1): the length of each sample."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


# ------------------------------------------------------------------ the table


def cfg(velocities: Velocities, scale: float, values: Values, average: Tensor | None) -> Combined:
    """pos + scale·(pos − neg)."""
    return guide(velocities[PROMPT], velocities[NEGATIVE], scale), None


def _both(k: int, steps: int, values: Values) -> tuple[str, ...]:
    return (PROMPT, NEGATIVE)


class Method(NamedTuple):
    """A row of the table: which branches level k of n evaluates, and how they combine.

    `combine` is given the branches' velocities, the scale above 0, the values of all parameters of the method, and what
    it returned beside the velocity at the last level where guidance was on: a tensor like it, or None.
    """

    combine: Callable[[Velocities, float, Values, Tensor | None], Combined]
    branches: Callable[[int, int, Values], tuple[str, ...]] = _both
    remembers: bool = False  # whether it wants to see again what it returned


METHODS: dict[str, Method] = {"cfg": Method(cfg)}


class Guidance(NamedTuple):
    """Guidance over a run: its scale, where it ends and how it is limited, the method and the values of this one."""

    scale: float = 0.0
    truncation: float = 1.0
    normalization: float = 0.0
    method: str = "cfg"
    values: Values = MappingProxyType({})

    def at(self, sigma: Tensor) -> float:
        """The scale at a noise level σ (): 0 where it is off."""
        return guidance_at(sigma, self.scale, self.truncation)

    def branches(self, scale: float, k: int, steps: int) -> tuple[str, ...]:
        """What the model evaluates at level k, from 0, of the n that run, where the scale is this."""
        return METHODS[self.method].branches(k, steps, self.values) if scale > 0 else (PROMPT,)

    def combine(self, velocities: Velocities, scale: float, average: Tensor | None) -> Combined:
        """The guided velocity of those of one branch or more, and what the method wants to see again."""
        guided, average = METHODS[self.method].combine(velocities, scale, self.values, average)
        return limited(guided, velocities[PROMPT], self.normalization), average
