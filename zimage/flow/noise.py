"""Random numbers of a run, drawn on the CPU from the seed of each image.

Bits depend neither on the device nor on what else is drawn in a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def start_noise(seed: int, channels: int, h: int, w: int) -> Tensor:
    """(1, C, h, w) fp32 drawn on the CPU, so that a seed gives the same noise on every device and in every batch."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, h, w), generator=generator, dtype=torch.float32)


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
        return torch.cat([torch.randn(shape, generator=stream, dtype=torch.float32) for stream in self._streams])
