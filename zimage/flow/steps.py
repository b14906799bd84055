"""One step of a run, from a noise level to the next: what a solver is given, and those that remember nothing.

A run goes down the noise levels σ₀ > σ₁ > … > σ_N = 0. Step i takes x at σ = σᵢ to x′ at σ′ = σᵢ₊₁; the model gives the
velocity v = dx/dσ, and with it the clean estimate D = x − σ·v.

    step(x, i, sigmas, evaluate, noise, past) → x′, past′

`evaluate(x, i)` is the model's velocity (B, C, h, w) of x at σᵢ; `noise()` is standard normal noise ε of this step,
like x; `past` are tensors like x that the solver wants to see again in the next step: what it returned in the last one,
and () in the first. Nothing else is remembered, so that a run may be left after any step and continued from there.

Shapes: x (B, C, h, w) fp32; sigmas (N + 1,) fp32 on the CPU. Coefficients are computed in float64. Every operation on
tensors is one that a GPU and a CPU round alike, at any place of a batch: products and sums, each rounded by itself.
"""

import math
from collections.abc import Callable

from torch import Tensor

Evaluate = Callable[[Tensor, int], Tensor]
Draw = Callable[[], Tensor]
Past = tuple[Tensor, ...]
Stepped = tuple[Tensor, Past]
Step = Callable[[Tensor, int, Tensor, Evaluate, Draw, Past], Stepped]


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x += (σ′ − σ)·v, in fp32."""
    return latents + (sigma_next - sigma).to(latents.device) * velocity


def estimate(x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate) -> tuple[Tensor, float, float]:
    """(D, σ, σ′) of step i."""
    sigma, after = sigmas[i : i + 2].tolist()
    return x - sigma * evaluate(x, i), sigma, after


def towards(clean: Tensor, x: Tensor, ratio: float) -> Tensor:
    """Euler's step written in D: (σ′/σ)·x + (1 − σ′/σ)·D, exact where D does not change."""
    return ratio * x + (1 - ratio) * clean


def euler(x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate, noise: Draw, past: Past) -> Stepped:
    """x′ = x + (σ′ − σ)·v. Order 1."""
    return euler_step(x, evaluate(x, i), sigmas[i], sigmas[i + 1]), ()


def heun(x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate, noise: Draw, past: Past) -> Stepped:
    """x′ = x + (σ′ − σ)·(v(x, σ) + v(x̃, σ′)) / 2 with Euler's x̃; at σ′ = 0 Euler's step itself. Order 2 (Heun 1900)."""
    velocity = evaluate(x, i)
    ahead = euler_step(x, velocity, sigmas[i], sigmas[i + 1])
    if sigmas[i + 1] == 0:
        return ahead, ()
    return euler_step(x, (velocity + evaluate(ahead, i + 1)) / 2, sigmas[i], sigmas[i + 1]), ()


def euler_ancestral(x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate, noise: Draw, past: Past) -> Stepped:
    """Euler's step to x↓ below σ′, at σ↓ = σ′²/σ, and back up with new noise: x′ = a·x↓ + √(σ′² − (a·σ↓)²)·ε.

    a = (1 − σ′)/(1 − σ↓) brings the picture's share back to 1 − σ′. Source: Song et al. 2021 (arXiv 2010.02502) in the
    form for rectified flow of ComfyUI and of diffusers' LTXEulerAncestralRFScheduler, at their eta = 1.
    """
    clean, sigma, after = estimate(x, i, sigmas, evaluate)
    if after == 0:
        return clean, ()
    down = after**2 / sigma
    scale = (1 - after) / (1 - down)
    spread = math.sqrt(after**2 - (scale * down) ** 2)
    return scale * towards(clean, x, down / sigma) + spread * noise(), ()


def lcm(x: Tensor, i: int, sigmas: Tensor, evaluate: Evaluate, noise: Draw, past: Past) -> Stepped:
    """x′ = (1 − σ′)·D + σ′·ε: all noise is new in each step. For models that were distilled to jump.

    Source: Luo et al. 2023 (arXiv 2310.04378); diffusers' FlowMatchLCMScheduler.
    """
    clean, _, after = estimate(x, i, sigmas, evaluate)
    return (clean if after == 0 else (1 - after) * clean + after * noise()), ()
