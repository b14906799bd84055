"""Solvers against formulas in float64 that are written here otherwise, orders of convergence, and moments of noise.

The model is the exact one of pictures whose values are normal, N(MEAN, SPREAD²) each: at noise level σ they are
N((1 − σ)·MEAN, (1 − σ)²·SPREAD² + σ²), the clean estimate is linear in x, and a path of the ODE keeps its quantile.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from zimage import flow
from zimage.flow.multistep import er_sde

MEAN, SPREAD = 0.7, 0.6
DRAWING = [name for name, solver in flow.SOLVERS.items() if solver.draws]


def deviation(sigma: float) -> float:
    return math.hypot((1 - sigma) * SPREAD, sigma)


def clean(x, sigma: float):
    """The mean of pictures, given x."""
    return MEAN + (1 - sigma) * SPREAD**2 / deviation(sigma) ** 2 * (x - (1 - sigma) * MEAN)


def on_path(sigma: float, quantile):
    """x of the ODE's path that holds this many deviations from the mean."""
    return (1 - sigma) * MEAN + deviation(sigma) * quantile


SILENCE = torch.zeros(10_000)  # no noise in any step


def run(
    step: Callable,
    sigmas: Tensor,
    x: Tensor,
    noises: Sequence[Tensor] | Tensor = SILENCE,
    first: int = 0,
    past: flow.Past = (),
    model=clean,
) -> list[Tensor]:
    """x before every step, and at the end."""
    found, levels = [x], sigmas.tolist()

    def velocity(x: Tensor, k: int) -> Tensor:
        return (x - model(x, levels[k])) / levels[k]

    for i in range(first, len(levels) - 1):
        x, past = step(x, i, sigmas, velocity, lambda: noises[i], past)  # noqa: B023
        found.append(x)
    return found


# ------------------------------------------------------------------ formulas


def bent(x, sigma: float):
    """A model that is not linear, on tensors and arrays."""
    return np.tanh(1.3 * np.asarray(x)) * (1 - 0.4 * sigma**2) + 0.2 * np.cos(3 * sigma)


def model(x: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(bent(x.numpy(), sigma))


def reference(name: str, sigmas: np.ndarray, x: np.ndarray, noises: np.ndarray) -> np.ndarray:
    """A run by the formulas below."""
    estimates: list[np.ndarray] = []
    for i in range(len(sigmas) - 1):
        estimates.append(bent(x, sigmas[i]))
        x = FORMULAS[name](x, sigmas, i, estimates, noises[i]) if sigmas[i + 1] > 0 else estimates[-1]
    return x


def ancestral(x, sigmas, i, estimates, noise):
    """As shares: the part of x that stays noise is (σ′/σ)² of it, the rest is brought back to σ′ by its variance."""
    s, t = sigmas[i : i + 2]
    epsilon = x + (1 - s) * (x - estimates[-1]) / s  # the noise in x: x = (1 − σ)·D + σ·ε
    low = t * t / s
    below = (1 - low) * estimates[-1] + low * epsilon
    kept = (1 - t) / (1 - low)
    return kept * below + noise * np.sqrt(t**2 - kept**2 * low**2)


def exponential(x, sigmas, i, estimates, noise):
    """dx/dt = D(t) − x with D the line through the last two estimates, integrated numerically over t."""
    t, end = -np.log(sigmas[i]), -np.log(sigmas[i + 1])
    slope = 0 * x if i == 0 else (estimates[-1] - estimates[-2]) / (t + np.log(sigmas[i - 1]))
    nodes, weights = gauss(t, end)
    kernel = weights * np.exp(nodes - end)
    return np.exp(t - end) * x + kernel.sum() * estimates[-1] + (kernel * (nodes - t)).sum() * slope


def solver_sde(x, sigmas, i, estimates, noise):
    """In numbers of picture and noise: with λ = log(α/σ), as in the paper's table of updates."""
    alpha, lam = 1 - sigmas, lambda k: np.inf * (k - 1) if k in (0,) else np.log((1 - sigmas[k]) / sigmas[k])
    h = lam(i + 1) - lam(i) if i else np.inf
    slope = 0 * x if i < 2 else (estimates[-1] - estimates[-2]) / (lam(i) - lam(i - 1))
    ahead = estimates[-1] + (0 if i < 2 else h / 2 * slope)
    gone = 1 - np.exp(-2 * h)
    kept = 0 if i == 0 else sigmas[i + 1] / sigmas[i] * np.exp(-h)
    return kept * x + alpha[i + 1] * gone * ahead + sigmas[i + 1] * np.sqrt(gone) * noise


def extended(x, sigmas, i, estimates, noise):
    """In x/α, over ρ = σ/α, with integrals by Gauss's rule over σ."""
    with np.errstate(divide="ignore"):
        alpha, rho = 1 - sigmas, sigmas / (1 - sigmas)
    phi = lambda r: r * (np.exp(r**0.3) + 10)  # noqa: E731
    if i == 0:  # from ρ = ∞, where φ(ρ′)/φ(ρ) = 0
        return alpha[1] * estimates[-1] + alpha[1] * rho[1] * noise
    here, there = rho[i], rho[i + 1]
    r = phi(there) / phi(here)
    nodes, weights = gauss(sigmas[i + 1], sigmas[i])
    points, weights = nodes / (1 - nodes), weights / (1 - nodes) ** 2 / phi(nodes / (1 - nodes))
    y = r * x / alpha[i] + (1 - r) * estimates[-1]
    slope = lambda k: 0 * x if k < 2 else (estimates[k] - estimates[k - 1]) / (rho[k] - rho[k - 1])  # noqa: E731
    y = y + (there - here + phi(there) * weights.sum()) * slope(i)
    if i >= 3:
        second = (slope(i) - slope(i - 1)) / ((rho[i] - rho[i - 2]) / 2)
        y = y + ((there - here) ** 2 / 2 + phi(there) * (weights * (points - here)).sum()) * second
    return alpha[i + 1] * (y + np.sqrt(there**2 - (here * r) ** 2) * noise)


GAUSS = np.polynomial.legendre.leggauss(100)


def gauss(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = GAUSS
    return (high - low) / 2 * nodes + (high + low) / 2, (high - low) / 2 * weights


FORMULAS = {
    "euler_ancestral": ancestral,
    "res_multistep": exponential,
    "dpmpp_2m_sde": solver_sde,
    "er_sde": extended,
}


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 30])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_whole_run_is_that_of_the_formula(name, steps, shift):
    sigmas, generator = flow.sigmas(steps, shift), torch.Generator().manual_seed(steps)
    x, *noises = torch.randn(steps + 1, 1, 4, 5, 6, generator=generator, dtype=torch.float64)
    expected = reference(name, sigmas.double().numpy(), x.numpy(), torch.stack(noises).numpy())
    *_, found = run(flow.SOLVERS[name].step, sigmas, x, noises, model=model)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9)
    half = [noise.float() for noise in noises]
    *_, single = run(flow.SOLVERS[name].step, sigmas, x.float(), half, model=model)
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ------------------------------------------------------------------ orders


def constant(ratio: Tensor) -> Tensor:
    return torch.ones_like(ratio)


def er_ode(*arguments):
    """ER-SDE with φ(ρ) = ρ, which adds no noise."""
    return er_sde(*arguments, growth=constant)


ORDERS = {"euler": 1, "heun": 2, "dpmpp_2m": 2, "res_multistep": 2, "er_ode": 2, "unipc": 3}


def remembered(name: str, sigmas: Tensor, quantile: Tensor) -> flow.Past:
    """What a solver would see in step 2 of an exact run."""
    before, last = (clean(on_path(s, quantile), s) for s in sigmas[:2].tolist())
    if name == "er_ode":
        ratios = (sigmas[:2] / (1 - sigmas[:2])).tolist()
        return last, (last - before) / (ratios[1] - ratios[0])
    return {"unipc": (last, before), "dpmpp_2m": (last,), "res_multistep": (last,)}.get(name, ())


@pytest.mark.parametrize("begun", [False, True], ids=["from nothing", "with an exact past"])
@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_with_the_order(name, begun):
    """From σ = 0.9 to 0.2, on levels that are even in no variable. A first step of order 1 leaves the order as it is,
    since it is one step only, and UniPC corrects its own.
    """
    step, errors = er_ode if name == "er_ode" else flow.SOLVERS[name].step, []
    quantile = torch.tensor([0.4, -1.1], dtype=torch.float64)
    for steps in (80, 160, 320):
        k = torch.arange(-2, steps + 1, dtype=torch.float64) / steps
        sigmas = 0.9 - 0.6 * k - 0.1 * k**2
        past = remembered(name, sigmas, quantile) if begun else ()
        *_, end = run(step, sigmas, on_path(0.9, quantile), first=2, past=past)
        errors.append(float((end - on_path(0.2, quantile)).abs().max()))
    slopes = [math.log2(before / after) for before, after in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(ORDERS[name], abs=0.15), slopes


# ------------------------------------------------------------------ noise


def moments(name: str, sigmas: Tensor, first: int = 0, model=clean) -> tuple[Tensor, Tensor]:
    """(mean, variance) of x before every step and at the end, exactly, where the model is linear in x.

    Many runs at once: one without any noise, which is the mean, and one for each draw, with that noise alone, which is
    its share; the first draw is the start's.
    """
    steps, start = len(sigmas) - 1, float(sigmas[first])
    alone = torch.eye(steps + 2, dtype=torch.float64)[1:]
    x = (1 - start) * MEAN + start * alone[0]
    found = torch.stack(run(flow.SOLVERS[name].step, sigmas, x, alone[1:], first, model=model))
    return found[:, 0], ((found[:, 1:] - found[:, :1]) ** 2).sum(1)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("name", DRAWING)
def test_a_single_picture_is_reached_with_the_noise_of_its_level(name, first):
    """Where D is known, x is (1 − σ)·D + σ·ε with an ε of variance 1 at every level, whatever the steps."""
    sigmas = flow.sigmas(8, 3.0)
    mean, variance = moments(name, sigmas, first, lambda x, sigma: 0 * x + MEAN)
    levels = sigmas[first:].double()
    torch.testing.assert_close(mean, (1 - levels) * MEAN, rtol=0, atol=1e-12)
    torch.testing.assert_close(variance, levels**2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in DRAWING if name != "lcm"])
def test_with_many_steps_the_pictures_have_their_distribution(name):
    """Mean and deviation at every level; the error falls at least as the lengths of the steps do."""
    errors = []
    for steps in (200, 400):
        sigmas = flow.sigmas(steps, 3.0)
        mean, variance = moments(name, sigmas)
        levels = sigmas.double()
        exact = torch.hypot((1 - levels) * SPREAD, levels)
        errors.append(float(torch.maximum((mean - (1 - levels) * MEAN).abs(), (variance.sqrt() - exact).abs()).max()))
    assert errors[1] <= 0.01
    assert errors[1] <= 0.6 * errors[0]


def test_lcm_keeps_less_of_the_spread_with_every_step():
    """Each step draws D, whose deviation is a share of x's, and noises it anew."""
    sigmas, mean, spread = flow.sigmas(6, 3.0), 0.0, 1.0
    means, variances = moments("lcm", sigmas)
    for i, (s, t) in enumerate(itertools.pairwise(sigmas.tolist()), 1):
        mean, spread = (1 - t) * clean(mean, s), math.hypot((1 - t) * spread * (clean(1, s) - clean(0, s)), t)
        assert float(means[i]) == pytest.approx(mean, abs=1e-12)
        assert float(variances[i]) == pytest.approx(spread**2, abs=1e-12)
    assert spread < 0.8 * SPREAD


def test_noise_of_steps_is_normal_and_every_draw_another():
    noise = flow.StepNoise((3, 4), torch.zeros(2, 16, 32, 32), 0)
    draws = torch.cat([noise.at(0), noise.at(1), torch.cat([flow.start_noise(seed, 16, 32, 32) for seed in (3, 4)])])
    rows = draws.flatten(1)
    assert (rows.mean(1).abs() < 0.03).all()
    assert ((rows.std(1) - 1).abs() < 0.03).all()
    torch.testing.assert_close(torch.corrcoef(rows), torch.eye(6), rtol=0, atol=0.03)
