"""Noise schedules: which noise levels a run goes through, falling from 1 to 0.

All begin at 1 and end with 0. The plain one is linear in time and then shifted; of the others, some choose anew how the
levels lie between its first and its last above 0, with r = 0 … 1 over the N steps:

    simple            σ = shift·s / (1 + (shift − 1)·s), s = 1 … 1/N        Esser et al. 2024, eq. 23
    normal            the same with s = 1 … 1/1000: the last step is short   ComfyUI's and Forge's
    beta              σ_N + Q(1 − r)·(σ₁ − σ_N), Q quantiles of Beta(.6, .6)  Lee et al. 2024
    beta_shifted      the simple σ of s = Q(1 − k/N), k = 0 … N − 1          ComfyUI and Forge call it beta
    karras            (σ₁^⅐ + r·(σ_N^⅐ − σ₁^⅐))⁷                            Karras et al. 2022, eq. 5
    exponential       σ₁^(1 − r) · σ_N^r
    kl_optimal        tan((1 − r)·atan σ₁ + r·atan σ_N)                     Sabour et al. 2024, section 3
    linear_quadratic  slow and linear, then quadratic in time; shifted      Polyak et al. 2024

Each step is one model evaluation of a first-order solver. A larger shift spends more of them near pure noise. What is
linear in time is computed in fp32, what lies between two levels in fp64 and then rounded, for the reference's bits.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zimage.errors import RequestError, quoted

Levels = Callable[[int, float], Tensor]  # (steps, shift) → (steps,) fp32, the levels above 0
Curve = Callable[[float, float, float], float]  # (r, σ₁, σ_N) → σ

RHO = 7.0
BETA = 0.6  # both parameters of the beta distribution
MEDIAN = math.nextafter(0.5, 1)  # as the reference's library rounds it, which decides ties in fp32
LAST_TIME = 1 / 1000  # of the thousand times that the model was trained with
ROUNDING = 0.01  # the most by which that of a small shift, below about 1e-6, may move the first level from 1
THRESHOLD = 0.025  # the noise that the linear half of linear_quadratic takes away


def sigmas(steps: int = 8, shift: float = 3.0, schedule: str = "simple") -> Tensor:
    """(steps + 1,) fp32 falling from 1 to 0, by a row of `SCHEDULES`. Raises RequestError."""
    if steps < 1 or shift <= 0:
        raise RequestError(f"steps = {steps} and shift = {shift} must be at least 1 and above 0, respectively")
    if abs(float(shifted(torch.ones(1), shift)) - 1) > ROUNDING:
        text = f"shift {shift:g} is so small that rounding moves the first noise level away from 1; pass a larger one"
        raise RequestError(text, fields=("shift",))
    return torch.cat((SCHEDULES[schedule](steps, shift), torch.zeros(1)))


def shifted(s: Tensor, shift: float) -> Tensor:
    """σ = shift·s / (1 + (shift − 1)·s) in fp32."""
    return shift * s / (1 + (shift - 1) * s)


def simple(steps: int, shift: float) -> Tensor:
    """Linear in time, then shifted."""
    return shifted(torch.linspace(1, 1 / steps, steps), shift)


def normal(steps: int, shift: float) -> Tensor:
    """Linear in time down to the last of the trained times, then shifted."""
    return shifted(torch.linspace(1, LAST_TIME if steps > 1 else 1, steps), shift)


def linear_quadratic(steps: int, shift: float) -> Tensor:
    """The first half of the steps falls linearly by `THRESHOLD`, the rest quadratically to 0; then shifted.

    With m of N steps in the first half, 1 − s = a·i² + b·i + c from i = m on, such that the curve goes on from there
    with the same value, and reaches 1 at i = N with a slope that fits.
    """
    m = steps // 2
    if m == 0:
        return torch.ones(1)
    left, rest = m - THRESHOLD * steps, steps - m
    a, b = left / (m * rest**2), THRESHOLD / m - 2 * left / rest**2
    gone = [i * THRESHOLD / m if i < m else a * i**2 + b * i + a * m**2 for i in range(steps)]
    return shifted(torch.tensor([1 - g for g in gone]), shift)


def beta_shifted(steps: int, shift: float) -> Tensor:
    """Quantiles of a beta distribution as times, then shifted."""
    return shifted(torch.tensor([beta_quantile(1 - k / steps) for k in range(steps)]), shift)


def between(curve: Curve) -> Levels:
    """The levels that a curve gives between the first and the last of the simple schedule."""

    def levels(steps: int, shift: float) -> Tensor:
        ends = simple(steps, shift)
        first, last = float(ends[0]), float(ends[-1])
        r = 1 / max(1, steps - 1)  # its multiples, and not fractions k/(N − 1), so that ties fall as in the reference
        ramp = [k * r for k in range(steps - 1)] + [float(steps > 1)]
        return torch.tensor([curve(r, first, last) for r in ramp])

    return levels


def _karras(r: float, first: float, last: float) -> float:
    high, low = first ** (1 / RHO), last ** (1 / RHO)
    return (high + r * (low - high)) ** RHO


def _exponential(r: float, first: float, last: float) -> float:
    return math.exp((1 - r) * math.log(first) + r * math.log(last))


def _kl_optimal(r: float, first: float, last: float) -> float:
    return math.tan((1 - r) * math.atan(first) + r * math.atan(last))


def _beta(r: float, first: float, last: float) -> float:
    return last + beta_quantile(1 - r) * (first - last)


def beta_quantile(p: float, a: float = BETA) -> float:
    """The x below which a share p of the distribution Beta(a, a) lies, to the last bits of fp64; 0 < a < 1.

    Newton's method in u = x^a, in which F(x) = x^a / (a·B) · ₂F₁(a, 1 − a; a + 1; x) (DLMF 8.17.7) is convex and nearly
    a straight line; above one half by the distribution's symmetry.
    """
    if p == 0.5:
        return MEDIAN
    if p > 0.5:
        return 1 - beta_quantile(1 - p, a)
    wanted = p * a * math.gamma(a) ** 2 / math.gamma(2 * a)
    u = wanted
    for _ in range(8):
        x = u ** (1 / a)
        u -= (u * _series(x, a) - wanted) * (1 - x) ** (1 - a)
    return float(u ** (1 / a))


def _series(x: float, a: float) -> float:
    """₂F₁(a, 1 − a; a + 1; x) = Σ (1 − a)ₖ/k! · a/(a + k) · xᵏ, for x below 0.6."""
    total, term, k = 0.0, 1.0, 0
    while term > 1e-17:
        total += term * a / (a + k)
        k += 1
        term *= x * (k - a) / k
    return total


def exact(levels: Sequence[float]) -> Tensor:
    """Levels as they are, (N + 1,) fp32. Raises RequestError unless they fall from 1 or less to 0."""
    try:
        found = torch.as_tensor(levels, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError):
        raise RequestError(f"sigmas {quoted(levels)} should be numbers", fields=("sigmas",)) from None
    is_run = found.ndim == 1 and len(found) > 1
    if not (is_run and 0 < found[0] <= 1 and found[-1] == 0 and (found[:-1] > found[1:]).all()):
        raise RequestError(f"sigmas {quoted(levels)} should fall from 1 or less to 0", fields=("sigmas",))
    return found


SCHEDULES: dict[str, Levels] = {
    "simple": simple,
    "normal": normal,
    "beta": between(_beta),
    "beta_shifted": beta_shifted,
    "karras": between(_karras),
    "exponential": between(_exponential),
    "linear_quadratic": linear_quadratic,
    "kl_optimal": between(_kl_optimal),
}
