"""Solvers: one step of a run, from a noise level to the next, each a pure function with its equation and order.

A run goes down the noise levels σ₀ > σ₁ > … > σ_N = 0. Step i takes x at σᵢ to x at σᵢ₊₁; the model gives the velocity
v = dx/dσ, and with it the clean estimate D = x − σ·v.

    step(x, i, sigmas, evaluate, noise, past) → x′, past′

`evaluate(x, i)` is the model's velocity (B, C, h, w) of x at σᵢ; `noise()` is standard normal noise of this step, like
x; `past` are tensors like x that the solver wants to see again in the next step: what it returned in the last one, and
() in the first. Nothing else is remembered, so that a run may be left after any step and continued from there.

Shapes: x (B, C, h, w) fp32; sigmas (N + 1,) fp32 on the CPU.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Evaluate = Callable[[Tensor, int], Tensor]
Past = tuple[Tensor, ...]
Step = Callable[[Tensor, int, Tensor, Evaluate, Callable[[], Tensor], Past], tuple[Tensor, Past]]


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x += (σ′ − σ)·v, in fp32."""
    return latents + (sigma_next - sigma).to(latents.device) * velocity


def euler(
    x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate, noise: Callable[[], Tensor], past: Past
) -> tuple[Tensor, Past]:
    """x′ = x + (σ′ − σ)·v. Order 1."""
    return euler_step(x, evaluate(x, i), sigmas[i], sigmas[i + 1]), ()


def heun(
    x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate, noise: Callable[[], Tensor], past: Past
) -> tuple[Tensor, Past]:
    """x′ = x + (σ′ − σ)·(v(x, σ) + v(x̃, σ′)) / 2 with Euler's x̃; at σ′ = 0 Euler's step itself. Order 2 (Heun 1900)."""
    velocity = evaluate(x, i)
    ahead = euler_step(x, velocity, sigmas[i], sigmas[i + 1])
    if sigmas[i + 1] == 0:
        return ahead, ()
    return euler_step(x, (velocity + evaluate(ahead, i + 1)) / 2, sigmas[i], sigmas[i + 1]), ()


def _once(i: int, steps: int) -> tuple[int, ...]:
    return (i,)


class Solver(NamedTuple):
    """A row of the table: the step, and `levels(i, N)`: the noise levels at which step i of N evaluates the model."""

    step: Step
    levels: Callable[[int, int], tuple[int, ...]] = _once
    draws: bool = False  # whether it adds noise


def _twice(i: int, steps: int) -> tuple[int, ...]:
    return (i, i + 1) if i + 1 < steps else (i,)


SOLVERS: dict[str, Solver] = {"euler": Solver(euler), "heun": Solver(heun, _twice)}
