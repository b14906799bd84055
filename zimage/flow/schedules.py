"""Noise schedules: which noise levels a run goes through, falling from 1 to 0."""

import torch
from torch import Tensor

from zimage.errors import RequestError


def sigmas(steps: int = 8, shift: float = 3.0) -> Tensor:
    """(steps + 1,) fp32 falling from 1 to 0: σ = shift·s / (1 + (shift − 1)·s) at s = 1 … 1/steps, then 0.

    Each step is one model evaluation. A larger shift spends more of them near pure noise (Esser et al. 2024, eq. 23).
    Computed in fp32 throughout, for the reference's bits.
    """
    if steps < 1 or shift <= 0:
        raise RequestError(f"steps = {steps} and shift = {shift} must be at least 1 and above 0, respectively")
    s = torch.linspace(1, 1 / steps, steps)
    return torch.cat((shift * s / (1 + (shift - 1) * s), torch.zeros(1)))
