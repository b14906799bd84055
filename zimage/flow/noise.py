"""Random numbers of a run, drawn on the CPU from the seed of each image.

Bits depend neither on the device nor on what else is drawn in a batch.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def stream(seed: int, purpose: str) -> torch.Generator:
    """Random numbers on the CPU for one purpose of an image, apart from those of its noise and of other purposes.

    Their seed is 63 bits of SHA-256 of both, so that neighbouring seeds and purposes have nothing in common.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def start_noise(seed: int, channels: int, h: int, w: int) -> Tensor:
    """(1, C, h, w) fp32 drawn on the CPU, so that a seed gives the same noise on every device and in every batch."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, h, w), generator=generator, dtype=torch.float32)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """From a (weight 0) to b (weight 1) on the arc between them: (sin((1 − w)·θ)·a + sin(w·θ)·b) / sin θ, fp32.

    θ is the angle between the whole tensors. A mean of two noises would be too weak; on the arc they keep their norm,
    and so what comes out is as likely a noise as both (Shoemake 1985; White 2016, section 2). Where the angle is 0 or π
    no arc is named, and a straight line is taken.
    """
    if weight in (0, 1):
        return b if weight else a
    x, y = a.double(), b.double()
    cosine = float((x * y).sum() / (x.norm() * y.norm()))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return ((1 - weight) * x + weight * y).to(a.dtype)
    shares = (math.sin((1 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle))
    return (shares[0] * x + shares[1] * y).to(a.dtype)


class StepNoise:
    """The noise that random solvers add, one stream per image.

    An image's stream is that of its start noise, continued: one draw for each step that runs, so that nothing of it
    need be saved to go on from a step.
    """

    def __init__(self, seeds: Sequence[int], like: Tensor, first: int):
        """For latents of the shape of `like` (B, C, h, w), one seed each, and a run that begins with step `first`."""
        self._like, self._next = like, first
        self._streams = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._draw()

    def at(self, step: int) -> Tensor:
        """That of a step (B, C, h, w), on the device of the latents; steps are asked for in their order."""
        while self._next < step:
            self._draw()
            self._next += 1
        self._next += 1
        return self._draw().to(self._like.device)

    def _draw(self) -> Tensor:
        shape = (1, *self._like.shape[1:])
        return torch.cat([torch.randn(shape, generator=own, dtype=torch.float32) for own in self._streams])
