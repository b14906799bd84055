"""Variety between seeds: captions that differ a little from seed to seed in the first steps of a run.

    e′ = e + s·std(e)·m·u      m = 0 or 1, equally likely; u uniform from −1 to 1; s = S/3 for a variety of S

A model that was distilled to few steps draws much the same picture from every noise. The first steps decide on the
composition: there, each seed has a caption of its own, and the plain one brings the picture back to the prompt in all
that follow. S = 1 is what the remedies in use for Z-Image Turbo add (SeedVarianceEnhancer: ±15 to ±30 on half of the
entries). The idea is older: Sadat et al. 2023 (CADS), who fade the noise out instead. What it does to the demo, whose
seeds differ anyway: bench/README.md.

Shapes: L caption tokens, C caption width.
"""

import torch
from torch import Tensor

from zimage.flow.noise import stream

PART = 5  # of so many of the steps that run, the first: a step counts that begins in it, as with other programs
SCALE = 1 / 3  # s at S = 1


def varied(caption: Tensor, seed: int, variety: float) -> Tensor:
    """A caption (L, C) as one seed sees it at first, on the CPU, in its own dtype. The bits depend on nothing else."""
    own, draws = caption.cpu().float(), stream(seed, "variety")
    chosen = torch.rand(own.shape, generator=draws) < 0.5
    noise = 2 * torch.rand(own.shape, generator=draws) - 1
    deviation = float(own.double().std(correction=0))  # so that its fp32 does not depend on the order of the sum
    return (own + SCALE * variety * deviation * chosen * noise).to(caption.dtype)


def varied_steps(first: int, steps: int) -> range:
    """The steps from number `first` on in which captions are varied: those that begin in the first fifth."""
    return range(first, first + -(-(steps - first) // PART))
