"""Where denoising begins: at pure noise, or at a picture mixed with it; and what a mask keeps.

Shapes: latents (B, C, h, w) fp32; masks (1, 1, h, w), 1 = repaint … 0 = keep.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zimage.errors import RequestError

SHIFTED = 1e-5  # how far from 1 the first level of a schedule may be by the rounding of its shift


def first_step(steps: int, strength: float) -> int:
    """The step at which a render that starts from a picture begins: int(N − min(N·s, N)), so that ⌈N·s⌉ steps run.

    Computed in the reference's order, so that products such as 100 · 0.29 = 28.999… round as they do there. If no step
    would be left (a strength below the last bits of N), the last one runs.
    """
    if steps < 1 or not 0 < strength <= 1:
        raise RequestError(f"strength {strength:g} must be above 0 and at most 1, and steps = {steps} at least 1")
    return min(int(steps - min(steps * strength, steps)), steps - 1)


def steps_between(first: int, steps: int, start: float, end: float) -> list[int]:
    """The steps from number `first` on that lie wholly between two fractions of all that run, as diffusers has it.

    With n = steps − first, step first + k is one where start ≤ k/n and (k + 1)/n ≤ end.
    """
    n = steps - first
    return [first + k for k in range(n) if start <= k / n and (k + 1) / n <= end]


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_σ = (1 − σ)·x₀ + σ·ε in fp32; at σ = 0 and 1 it is `clean` and `noise` to the bit."""
    sigma = sigma.to(clean.device)
    return (1 - sigma) * clean + sigma * noise


def keep_outside(latents: Tensor, clean: Tensor, noise: Tensor, mask: Tensor, sigma: Tensor) -> Tensor:
    """m·x + (1 − m)·x_σ: after a step to σ, what is outside the mask goes back to the picture at that noise level.

    After the last step σ is 0, and the picture itself stands outside the mask.
    """
    return (1 - mask) * noised(clean, noise, sigma) + mask * latents


def latent_mask(mask: Tensor, h: int, w: int) -> Tensor:
    """A mask (1, 1, H, W) at the latents' size (1, 1, h, w): the nearest value, which is each cell's upper left."""
    return F.interpolate(mask, (h, w), mode="nearest")


def soft_latent_mask(mask: Tensor, h: int, w: int) -> Tensor:
    """The same for a mask by value: each cell's largest, so that nothing of what is to be repainted stays."""
    return F.adaptive_max_pool2d(mask, (h, w))


def first_steps(mask: Tensor, steps: int) -> Tensor:
    """(1, 1, h, w): the step, from 0 on, from which each cell of a mask is repainted; `steps`, so never, where it is 0.

    A mask by value ("differential diffusion": Levin & Fried 2023): of N steps, step i repaints the cells whose value m
    exceeds 1 − (i + 1) / N, the share of the steps that are left after it. i + 1 > N − N·m holds from ⌊N − N·m⌋ on,
    which is `first_step(N, m)`: each cell is drawn as by image to image at strength m. Values count in hundredths: grey
    128 of 255 is 0.5, and not a 251st more, which at 8 steps would run a fifth one.
    """
    values = (mask.double() * 100).round() / 100
    first = (steps - (steps * values).clamp(max=steps)).floor()
    return torch.where(values > 0, first.clamp(max=steps - 1), float(steps))


class Start(NamedTuple):
    """Where denoising begins: `latents` (B, C, h, w) before step number `step`.

    `clean` latents belong to the picture that a render starts from, as does `begins` (1, 1, h, w): the step from which
    each cell is repainted, where there is a mask.
    """

    latents: Tensor
    step: int
    noise: Tensor
    clean: Tensor | None = None
    begins: Tensor | None = None

    def to(self, device: torch.device) -> "Start":
        """The same on a device, in fp32."""
        latents = self.latents.to(device, torch.float32)
        noise = latents if self.noise is self.latents else self.noise.to(device, torch.float32)
        clean, begins = (x if x is None else x.to(device, torch.float32) for x in (self.clean, self.begins))
        return Start(latents, self.step, noise, clean, begins)

    def kept(self, latents: Tensor, step: int, sigma: Tensor) -> Tensor:
        """The latents after `step`, at σ: cells that are not repainted yet go back to the picture at that level."""
        if self.clean is None or self.begins is None:
            return latents
        return keep_outside(latents, self.clean, self.noise, (self.begins <= step).float(), sigma)


def start(
    noise: Tensor, sigmas: Tensor, strength: float = 1.0, clean: Tensor | None = None, mask: Tensor | None = None
) -> Start:
    """Noise (B, C, h, w) alone, or mixed with clean latents at the noise level at which `strength` begins.

    Where a run from noise alone begins below level 1, nothing is known of the picture, and its latents are σ₀·noise.

    With a mask, the first of its cells begins there, and the values are shares of the steps that remain. Steps before
    any cell is repainted are left out; the last one always runs.
    """
    if clean is None:
        begun = noise if abs(sigmas[0] - 1) < SHIFTED else sigmas[0] * noise
        return Start(begun, 0, noise)
    clean = clean.contiguous()  # like the noise: another order in memory may change the last bits of a decode
    steps = len(sigmas) - 1
    first, begins = first_step(steps, strength), None
    if mask is not None:
        begins = first + first_steps(mask, steps - first)
        first = min(int(begins.min()), steps - 1)
    return Start(noised(clean, noise, sigmas[first]), first, noise, clean, begins)
