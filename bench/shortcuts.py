"""Candidates for fewer evaluations that are measured, and are not in the library since they lose: `bench.fewer`.

Both replace the function that evaluates a model, as solvers of `zimage.flow` call it: `evaluate(x, i)` is
the velocity (B, C, h, w) at level i of `sigmas`.

**MeanCache** (Gao et al. 2026, arXiv 2601.19961) evaluates some of a run's steps; in the others the mean velocity of
the step is extrapolated from the run itself. With u the mean velocity between levels a and c of the last K steps,

    J = (v_a − u) / (σ_c − σ_a),        v̂ = v_last − J · (σ′ − σ)

where v are the velocities that were used, evaluated or not. For K = 1, u = v_a and J = 0: the last velocity again,
which is Euler's step over a longer way. Which steps are evaluated and how far each gap looks back, the authors found on
Z-Image's Base at 50 steps, by a shortest path over measured errors; `EVALUATED` and `LOOKS_BACK` are their lists.

**Half size** evaluates the first steps on a picture of half the width and height. A latent's low frequencies, with
orthonormal DCT coefficients X = (1 − σ)·X₀ + σ·E, make a small one with coefficients X/(2 − σ): its clean part is that
of the picture at half size, X₀/2, its noise is standard normal, and its level τ is σ/(2 − σ), since

    X/(2 − σ) = (1 − τ)·X₀/2 + τ·E

The clean estimate of the small one, enlarged, is that of the whole; frequencies above it count as pure noise. So the
noise of the seed stays where it is, and nothing new is drawn when the size changes.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Evaluate = Callable[[Tensor, int], Tensor]
At = Callable[[Tensor, float], Tensor]  # (latents, σ) → velocity
STEPS = 50  # of the run that the lists are made for

EVALUATED: Mapping[int, tuple[int, ...]] = {
    25: (0, 1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 15, 16, 17, 18, 20, 22, 29, 37, 42, 45, 47, 48, 49),
    20: (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 30, 38, 43, 46, 48, 49),
    17: (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 19, 27, 35, 43, 46, 48, 49),
    15: (0, 1, 2, 3, 5, 7, 10, 12, 17, 25, 33, 41, 45, 48, 49),
    13: (0, 1, 2, 3, 5, 9, 15, 22, 29, 36, 43, 47, 49),
}
LOOKS_BACK: Mapping[int, tuple[int, ...]] = {  # K of the gap behind each of them; 0: there is none
    25: (0, 0, 0, 0, 0, 0, 2, 2, 0, 0, 0, 2, 0, 0, 0, 5, 5, 1, 1, 1, 5, 5, 0, 0),
    20: (0, 0, 0, 0, 2, 2, 2, 2, 2, 5, 4, 5, 5, 1, 1, 1, 5, 2, 0),
    17: (0, 0, 0, 0, 2, 2, 2, 2, 2, 1, 1, 1, 1, 5, 2, 0),
    15: (0, 0, 0, 2, 2, 2, 2, 1, 1, 1, 1, 5, 4, 0),
    13: (0, 0, 0, 2, 1, 1, 1, 1, 1, 1, 5, 2),
}


def extrapolated(budget: int) -> dict[int, int]:
    """The steps of 50 that MeanCache does not evaluate at this budget, each with its K."""
    here = EVALUATED[budget]
    gaps = zip(here[:-1], here[1:], LOOKS_BACK[budget], strict=True)
    return {step: k for first, last, k in gaps for step in range(first + 1, last)}


class MeanCache:
    """An `evaluate` for Euler's solver that extrapolates in some steps; it remembers the run that it is used in."""

    def __init__(self, evaluate: Evaluate, sigmas: Tensor, skipped: Mapping[int, int]):
        self.evaluate, self.sigmas, self.skipped = evaluate, sigmas.tolist(), skipped
        self.latents: list[Tensor] = []
        self.velocities: list[Tensor] = []

    def __call__(self, x: Tensor, i: int) -> Tensor:
        self.latents.append(x)
        velocity = self._mean(i) if i in self.skipped else self.evaluate(x, i)
        self.velocities.append(velocity)
        return velocity

    def _mean(self, i: int) -> Tensor:
        first = max(0, i - self.skipped[i])
        way = self.sigmas[i] - self.sigmas[first]
        mean = (self.latents[i] - self.latents[first]) / way
        slope = (self.velocities[first] - mean) / way
        return self.velocities[-1] - slope * (self.sigmas[i + 1] - self.sigmas[i])


def dct_matrix(n: int) -> Tensor:
    """(n, n) fp32: the orthonormal DCT-II, row k the wave of frequency k."""
    k, at = torch.arange(n).double()[:, None], torch.arange(n).double() + 0.5
    waves = torch.cos(math.pi * k * at / n) * math.sqrt(2 / n)
    waves[0] /= math.sqrt(2)
    return waves.float()


def resized(x: Tensor, h: int, w: int) -> Tensor:
    """(B, C, h, w) with the same DCT coefficients: those above are cut off, or are 0 where there were none."""
    before, (rows, columns) = x.shape[-2:], (min(h, x.shape[-2]), min(w, x.shape[-1]))
    coefficients = dct_matrix(before[0]) @ x @ dct_matrix(before[1]).T
    kept = torch.zeros(*x.shape[:2], h, w)
    kept[..., :rows, :columns] = coefficients[..., :rows, :columns]
    return dct_matrix(h).T @ kept @ dct_matrix(w)


class HalfSize:
    """An `evaluate` that takes its first `steps` evaluations at half size, by the velocity `small` there."""

    def __init__(self, evaluate: Evaluate, small: At, sigmas: Tensor, steps: int):
        self.evaluate, self.small, self.sigmas, self.steps = evaluate, small, sigmas.tolist(), steps

    def __call__(self, x: Tensor, i: int) -> Tensor:
        if i >= self.steps:
            return self.evaluate(x, i)
        (h, w), sigma = x.shape[-2:], self.sigmas[i]
        level = sigma / (2 - sigma)
        reduced = resized(x, h // 2, w // 2) / (2 - sigma)
        clean = reduced - level * self.small(reduced, level)
        return (x - 2 * resized(clean, h, w)) / sigma
