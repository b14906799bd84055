"""The flow-matching sampler as pure functions. σ is the noise level: 1 = pure noise, 0 = clean.

A sample at σ is x_σ = (1 − σ)·x₀ + σ·ε, its velocity dx/dσ = ε − x₀ (rectified flow: Liu et al. 2022,
Lipman et al. 2022).
"""

from zimage.flow.guidance import AVERAGE, METHODS, NEGATIVE, PROMPT, SKIPPED, Guidance, guidance_at, guide
from zimage.flow.noise import StepNoise, slerp, start_noise, stream
from zimage.flow.schedules import SCHEDULES, exact, sigmas
from zimage.flow.solvers import SOLVERS, Solver
from zimage.flow.starts import (
    Start,
    first_step,
    first_steps,
    keep_outside,
    latent_mask,
    noised,
    soft_latent_mask,
    start,
    steps_between,
)
from zimage.flow.steps import Past, euler_step
from zimage.flow.variety import varied, varied_steps

__all__ = [
    "AVERAGE",
    "METHODS",
    "NEGATIVE",
    "PROMPT",
    "SCHEDULES",
    "SKIPPED",
    "SOLVERS",
    "Guidance",
    "Past",
    "Solver",
    "Start",
    "StepNoise",
    "euler_step",
    "exact",
    "first_step",
    "first_steps",
    "guidance_at",
    "guide",
    "keep_outside",
    "latent_mask",
    "noised",
    "sigmas",
    "slerp",
    "soft_latent_mask",
    "start",
    "start_noise",
    "steps_between",
    "stream",
    "varied",
    "varied_steps",
]
