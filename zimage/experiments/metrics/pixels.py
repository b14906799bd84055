"""PSNR and SSIM of two pictures of one size.

Shapes: pictures are "RGB"; levels (3, H, W) float64 from 0 to 255.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PEAK = 255.0  # of a level
IDENTICAL = 200.0  # dB; of different pictures of at most 2³⁰ levels the largest PSNR is 138 dB
TAPS, SIGMA = 11, 1.5
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def levels(picture: Image.Image) -> Tensor:
    """An "RGB" picture → (3, H, W) float64, 0 to 255."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).double()


def psnr(one: Tensor, other: Tensor) -> float:
    """10·log₁₀(255² / MSE) of two levels (3, H, W), in dB; IDENTICAL for equal ones, since records hold no infinity."""
    error = (one - other).square().mean().item()
    return 10 * math.log10(PEAK**2 / error) if error else IDENTICAL


def ssim(one: Tensor, other: Tensor) -> float | None:
    """Mean structural similarity of two levels (3, H, W), 1 for equal ones; None for a side below 11.

    Per channel and window, of weighted means μ, variances σ² and covariance:
    (2·μ₁·μ₂ + C₁)·(2·σ₁₂ + C₂) / ((μ₁² + μ₂² + C₁)·(σ₁² + σ₂² + C₂)), at all places where the window lies inside.
    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", 2004: a window of 11 × 11, σ = 1.5. They take
    grey pictures; of colours the channels' mean is usual.
    """
    if min(one.shape[1:]) < TAPS:
        return None
    return float(torch.stack([_similarity(a, b) for a, b in zip(one, other, strict=True)]).mean())


def _similarity(one: Tensor, other: Tensor) -> Tensor:
    """The mean over one channel (H, W)."""
    maps = torch.stack([one, other, one * one, other * other, one * other])
    mean_1, mean_2, square_1, square_2, product = _blurred(maps)
    variances = (square_1 - mean_1**2) + (square_2 - mean_2**2)
    alike = (2 * mean_1 * mean_2 + C1) * (2 * (product - mean_1 * mean_2) + C2)
    return (alike / ((mean_1**2 + mean_2**2 + C1) * (variances + C2))).mean()


def _blurred(maps: Tensor) -> Tensor:
    """(N, H, W) → (N, H − 10, W − 10), weighted by the Gaussian window, whose axes are independent."""
    places = torch.arange(TAPS, dtype=maps.dtype) - TAPS // 2
    weights = torch.exp(-(places**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    rows = F.conv2d(maps[:, None], weights.view(1, 1, -1, 1))
    return F.conv2d(rows, weights.view(1, 1, 1, -1))[:, 0]
