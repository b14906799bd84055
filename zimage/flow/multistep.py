"""Solvers that remember: they also know D₋, the clean estimate of the last step, which began at σ₋ = σᵢ₋₁.

They take D for a polynomial in one of three variables over the noise levels: t = −log σ, λ = log((1 − σ)/σ), or the
ratio ρ = σ/(1 − σ) of noise to picture; h and h₋ are the lengths of this step and of the last in it. At σ = 1, which is
noise alone, λ is −∞ and ρ is ∞: formulas take their limits there, so that such a step counts as infinitely long. The
first step has no past and is of order 1; the last one, to σ′ = 0, gives D itself in all of them.

The order of a solver is that of the error at the end of a run without noise, in the lengths of its steps.

Shapes and arguments as in `flow/steps.py`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zimage.flow.steps import Draw, Evaluate, Past, Stepped, estimate, towards

# Where diffusers' UniPC begins instead of at σ = 1: 1 − 1e-6, as fp32 holds it. λ is there −13.8.
NEARLY_ONE = torch.tensor(1 - 1e-6, dtype=torch.float32).item()
INTERVALS = 200  # of Simpson's rule; errors are below 1e-9 of the integrals
Growth = Callable[[Tensor], Tensor]


def dpmpp_2m(x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate, noise: Draw, past: Past) -> Stepped:
    """DPM-Solver++(2M): Euler's step with D̂ = D + (h/h₋)·(D − D₋)/2 in the place of D, in λ. Order 2.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2; diffusers' DPMSolverMultistepScheduler ("midpoint").
    """
    clean, sigma, after = estimate(x, i, sigmas, evaluate)
    if after == 0:
        return clean, ()
    return towards(_middle(clean, past, sigmas.tolist(), i), x, after / sigma), (clean,)


def dpmpp_2m_sde(x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate, noise: Draw, past: Past) -> Stepped:
    """SDE-DPM-Solver++(2M): x′ = (σ′/σ)·e·x + (1 − σ′)·(1 − e²)·D̂ + σ′·√(1 − e²)·ε with e = exp(−h) and D̂ as above.

    Source: the same paper, section 6; diffusers' DPMSolverMultistepScheduler ("sde-dpmsolver++", "midpoint").
    """
    clean, sigma, after = estimate(x, i, sigmas, evaluate)
    if after == 0:
        return clean, ()
    decay = after / sigma * (1 - sigma) / (1 - after)
    mean = (after / sigma * decay) * x + ((1 - after) * (1 - decay**2)) * _middle(clean, past, sigmas.tolist(), i)
    return mean + (after * math.sqrt(1 - decay**2)) * noise(), (clean,)


def _middle(clean: Tensor, past: Past, levels: Sequence[float], i: int) -> Tensor:
    """D̂, which is D in the middle of a step, by the line through D₋ and D in λ; D where nothing is known before it."""
    if not past:
        return clean
    h, before = _log_ratio(levels[i + 1]) - _log_ratio(levels[i]), _log_ratio(levels[i]) - _log_ratio(levels[i - 1])
    return clean + (h / before / 2) * (clean - past[0])


def _log_ratio(sigma: float) -> float:
    """λ, half the logarithm of the signal-to-noise ratio."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


def res_multistep(x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate, noise: Draw, past: Past) -> Stepped:
    """The exponential multistep in t, where dx/dt = D − x: x′ = e⁻ʰ·x + h·φ₁(−h)·D + h²·φ₂(−h)·(D − D₋)/h₋. Order 2.

    φ₁(z) = (eᶻ − 1)/z and φ₂(z) = (φ₁(z) − 1)/z, so that h·φ₁(−h) = 1 − e⁻ʰ and h²·φ₂(−h) = h − (1 − e⁻ʰ); e⁻ʰ = σ′/σ.
    Source: Zhang et al. 2023 (arXiv 2308.02157); ComfyUI's sampler of this name.
    """
    clean, sigma, after = estimate(x, i, sigmas, evaluate)
    if after == 0:
        return clean, ()
    stepped = towards(clean, x, after / sigma)
    if past:
        h, before = math.log(sigma / after), math.log(sigmas[i - 1].item() / sigma)
        stepped = stepped + ((h + math.expm1(-h)) / before) * (clean - past[0])
    return stepped, (clean,)


# ------------------------------------------------------------------ UniPC


def unipc(x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate, noise: Draw, past: Past) -> Stepped:
    """UniPC of two steps, B(h) = eʰ − 1, in λ: `dpmpp_2m`, but a step first corrects the last one by where it led to.

    The evaluation that corrects a step is the one that begins the next. The correction is added to x, so that what a
    mask put back stays where it is. σ = 1 is taken for NEARLY_ONE. Order 3.

    Source: Zhao et al. 2023 (arXiv 2302.04867); diffusers' UniPCMultistepScheduler ("bh2").
    """
    levels = [_nearly(sigmas), *sigmas[1:].tolist()]
    clean = x - levels[i] * evaluate(x, i)
    if levels[i + 1] == 0:
        return clean, ()
    x = x + _correction(clean, past, levels, i) if past else x
    return towards(_middle(clean, past, levels, i), x, levels[i + 1] / levels[i]), (clean, *past[:1])


def _nearly(sigmas: Tensor) -> float:
    """The first noise level; where it is 1, one at which λ is finite, and above the second in any case."""
    first, second = sigmas[:2].tolist()
    return first if first < 1 else max(NEARLY_ONE, (1 + second) / 2)


def _correction(clean: Tensor, past: Past, levels: Sequence[float], i: int) -> Tensor:
    """What is added to x at the start of step i, now that D is known there: the corrector's step less the predictor's.

    Both are (1 − σ′/σ) times a mean of slopes of D over the last step. The corrector's mean solves, for one slope up to
    it and one of it, Σρ = b₁ and Σρ·r = b₂ (the paper's theorem 3.1); after the run's first step it is a half.
    """
    share, change = 1 - levels[i] / levels[i - 1], clean - past[0]
    if len(past) == 1:
        return (share / 2) * change
    h = _log_ratio(levels[i]) - _log_ratio(levels[i - 1])
    r = (_log_ratio(levels[i - 2]) - _log_ratio(levels[i - 1])) / h
    grown = math.expm1(-h)
    b1 = (-grown / h - 1) / grown
    b2 = 2 * ((grown / h + 1) / h - 0.5) / grown
    before = (b1 - b2) / (1 - r)
    return (share * (b1 - before)) * change + (share * (before - 0.5) / r) * (past[1] - past[0])


# ------------------------------------------------------------------ ER-SDE


def noise_growth(ratio: Tensor) -> Tensor:
    """g(ρ) = exp(ρ^0.3) + 10, which the authors of ER-SDE recommend."""
    return torch.exp(ratio**0.3) + 10


def er_sde(
    x: Tensor,
    i: int,
    sigmas: Tensor,
    evaluate: Evaluate,
    noise: Draw,
    past: Past,
    growth: Growth = noise_growth,
) -> Stepped:
    """ER-SDE-Solver-3, in ρ, with noise by φ(ρ) = ρ·g(ρ); g is `growth`, and a constant g adds no noise. Order 2.

    x′ = q·(σ′/σ)·x + (1 − σ′ − q·σ′/ρ)·D + (1 − σ′)·(w₁·D₁ + w₂·D₂) + σ′·√(1 − q²)·ε with q = g(ρ′)/g(ρ), the slope
    D₁ = (D − D₋)/(ρ − ρ₋) from the second step on, D₂ = 2·(D₁ − D₁₋)/(ρ − ρ₋₋) from the third, and `_weights` for w.
    Source: Cui et al. 2023 (arXiv 2309.06169), whose code sums the integrals over 200 points from the left.
    """
    clean, sigma, after = estimate(x, i, sigmas, evaluate)
    if after == 0:
        return clean, ()
    ratio, below = _ratio(sigma), _ratio(after)
    q = (growth(torch.tensor(below, dtype=torch.float64)) / growth(torch.tensor(ratio, dtype=torch.float64))).item()
    slopes = _slopes(clean, past, [_ratio(level) for level in sigmas[: i + 1].tolist()])
    stepped = (q * after / sigma) * x + (1 - after - q * after / ratio) * clean
    weights = _weights(ratio, below, growth)
    for k, slope in enumerate(slopes):
        stepped = stepped + ((1 - after) * weights[k]) * slope
    return stepped + (after * math.sqrt(1 - q**2)) * noise(), (clean, *slopes[:1])


def _ratio(sigma: float) -> float:
    """ρ, the ratio of noise to picture."""
    return sigma / (1 - sigma) if sigma < 1 else math.inf


def _slopes(clean: Tensor, past: Past, ratios: Sequence[float]) -> Past:
    """As many of D₁ and D₂ as can be known; `ratios` are those of all steps so far."""
    if not past:
        return ()
    first = (1 / (ratios[-1] - ratios[-2])) * (clean - past[0])
    return (first,) if len(past) == 1 else (first, (2 / (ratios[-1] - ratios[-3])) * (first - past[1]))


def _weights(ratio: float, below: float, growth: Growth) -> tuple[float, float]:
    """w₁ = ρ′ − ρ + φ(ρ′)·∫ ds/φ(s) and w₂ = (ρ′ − ρ)²/2 + φ(ρ′)·∫ (s − ρ)/φ(s) ds, over s from ρ′ to ρ.

    By Simpson's rule in u = log s, where ds/φ(s) = du/g(s).
    """
    if ratio == math.inf:  # the first step, which knows no slopes
        return 0.0, 0.0
    u = torch.linspace(math.log(below), math.log(ratio), INTERVALS + 1, dtype=torch.float64)
    parts = torch.full_like(u, 2.0)
    parts[1::2], parts[0], parts[-1] = 4.0, 1.0, 1.0
    parts = parts * (math.log(ratio / below) / INTERVALS / 3) / growth(u.exp())
    scale = below * growth(torch.tensor(below, dtype=torch.float64))
    first = below - ratio + scale * parts.sum()
    second = (below - ratio) ** 2 / 2 + scale * ((u.exp() - ratio) * parts).sum()
    return first.item(), second.item()
