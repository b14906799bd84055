"""Guidance: one velocity from those of a prompt and of what it is steered away from, by methods as a table.

A noise level evaluates some branches: the prompt, the negative prompt, the prompt with layers of the model skipped. A
method says which, and how their velocities make one. Guidance counts from 0 everywhere: scale 0 is the prompt's own
velocity, and other programs' CFG is scale + 1.

Shapes: velocities (B, C, h, w) fp32.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Values: TypeAlias = Mapping[str, Any]  # of a method's parameters: numbers, and layers as a tuple
Velocities: TypeAlias = Mapping[str, Tensor]  # branch → velocity
Combined: TypeAlias = tuple[Tensor, Tensor | None]

PROMPT, NEGATIVE, SKIPPED = "prompt", "negative", "skipped"  # branches
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


def aligned(positive: Tensor, negative: Tensor) -> Tensor:
    """(B, 1, 1, 1): α = ⟨pos, neg⟩ / ‖neg‖², by which neg comes nearest to pos, sample by sample."""
    dims = tuple(range(1, positive.ndim))
    return (positive * negative).sum(dims, keepdim=True) / ((negative**2).sum(dims, keepdim=True) + 1e-8)


def projected(update: Tensor, onto: Tensor, eta: float) -> Tensor:
    """What of an update is orthogonal to `onto`, and `eta` of what is parallel, sample by sample."""
    direction = onto / _norm(onto).clamp(min=1e-12)
    parallel = (update * direction).sum(tuple(range(1, update.ndim)), keepdim=True) * direction
    return update - parallel + eta * parallel


def _norm(x: Tensor) -> Tensor:
    """(B, 1, 1, 1): the length of each sample."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


# ------------------------------------------------------------------ the table


def cfg(velocities: Velocities, scale: float, values: Values, average: Tensor | None) -> Combined:
    """pos + scale·(pos − neg)."""
    return guide(velocities[PROMPT], velocities[NEGATIVE], scale), None


def cfg_zero(velocities: Velocities, scale: float, values: Values, average: Tensor | None) -> Combined:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): pos + scale·(pos − α·neg) with α = ⟨pos, neg⟩ / ‖neg‖².

    In its first levels nothing is evaluated, and the velocity is zero.
    """
    positive, negative = velocities[PROMPT], velocities[NEGATIVE]
    return guide(positive, aligned(positive, negative) * negative, scale), None


def apg(velocities: Velocities, scale: float, values: Values, average: Tensor | None) -> Combined:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416): pos + scale·(u⊥ + eta·u∥).

    u is the running average pos − neg + momentum·u, of which nothing longer than the threshold is used (0: any length);
    u∥ is its part along pos. With eta 1, no threshold and no momentum it is classifier-free guidance. The paper takes
    clean estimates; here, as in diffusers, velocities.
    """
    positive = velocities[PROMPT]
    update = positive - velocities[NEGATIVE]
    if average is not None:
        update = update + values["momentum"] * average
    kept = update if _by_momentum(values) else None
    if values["threshold"] > 0:
        update = update * (values["threshold"] / _norm(update)).clamp(max=1)
    return positive + scale * projected(update, positive, values["eta"]), kept


def slg(velocities: Velocities, scale: float, values: Values, average: Tensor | None) -> Combined:
    """Skip-layer guidance (Stability AI 2024, with Stable Diffusion 3.5): cfg + its own scale·(pos − skipped).

    `skipped` is the prompt's velocity without some layers, which a part of the levels evaluate.
    """
    guided = guide(velocities[PROMPT], velocities[NEGATIVE], scale)
    if SKIPPED not in velocities:
        return guided, None
    return guided + values["scale"] * (velocities[PROMPT] - velocities[SKIPPED]), None


def _both(k: int, steps: int, values: Values) -> tuple[str, ...]:
    return (PROMPT, NEGATIVE)


def _none_at_first(k: int, steps: int, values: Values) -> tuple[str, ...]:
    return () if k < values["zero_init_steps"] else (PROMPT, NEGATIVE)


def _skipped_between(k: int, steps: int, values: Values) -> tuple[str, ...]:
    """Levels between two fractions of n, ends excluded, skip: ⌊start·n⌋ < k < ⌊stop·n⌋, as diffusers has it."""
    inside = int(values["start"] * steps) < k < int(values["stop"] * steps)
    return (PROMPT, NEGATIVE, SKIPPED) if inside and values["scale"] > 0 else (PROMPT, NEGATIVE)


def _never(values: Values) -> bool:
    return False


def _by_momentum(values: Values) -> bool:
    return bool(values["momentum"])


class Method(NamedTuple):
    """A row of the table: which branches level k of n evaluates, and how they combine.

    `combine` is given the velocities of these branches, the scale, which is above 0, the values of all parameters of
    the method, and what it returned beside the velocity at the last level where guidance was on: a tensor like it, or
    None.
    """

    combine: Callable[[Velocities, float, Values, Tensor | None], Combined]
    branches: Callable[[int, int, Values], tuple[str, ...]] = _both
    remembers: Callable[[Values], bool] = _never  # whether it wants to see again what it returned


METHODS: dict[str, Method] = {
    "cfg": Method(cfg),
    "cfg_zero": Method(cfg_zero, _none_at_first),
    "apg": Method(apg, remembers=_by_momentum),
    "slg": Method(slg, _skipped_between),
}


class Guidance(NamedTuple):
    """Guidance over a run: its scale, where it ends and how it is limited, the method and the values of this one."""

    scale: float = 0.0
    truncation: float = 1.0
    normalization: float = 0.0
    method: str = "cfg"
    values: Values = MappingProxyType({})

    def at(self, sigma: Tensor) -> float:
        """The scale at a noise level σ (): 0 where it is off. No level is past a truncation of 1."""
        return guidance_at(sigma, self.scale, self.truncation) if self.truncation < 1 else self.scale

    def branches(self, scale: float, k: int, steps: int) -> tuple[str, ...]:
        """What the model evaluates at level k, from 0, of the n that run, where the scale is this."""
        return METHODS[self.method].branches(k, steps, self.values) if scale > 0 else (PROMPT,)

    def combine(self, velocities: Velocities, scale: float, average: Tensor | None) -> Combined:
        """The guided velocity of those of one branch or more, and what the method wants to see again."""
        guided, average = METHODS[self.method].combine(velocities, scale, self.values, average)
        return limited(guided, velocities[PROMPT], self.normalization), average

    @property
    def is_partial(self) -> bool:
        """Whether levels evaluate this or that, depending on their number."""
        return METHODS[self.method].branches is not _both

    def remembers(self, sigma: Tensor) -> bool:
        """Whether something is carried from the evaluation at a noise level σ () on."""
        return self.at(sigma) > 0 and METHODS[self.method].remembers(self.values)

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that the branch with skipped layers goes without."""
        found: tuple[int, ...] = self.values.get("layers", ())
        return found
