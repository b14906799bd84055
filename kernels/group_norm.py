"""Group normalisation whose statistics may come from elsewhere, so that a map can be normalised strip by strip.

Shapes: B batch, C channels, G groups, H × W positions; maps lie in memory with the channels innermost.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,), fp32, of every channel of a map (B, C, H, W) over all its positions."""
    values = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B·H·W, C), without a copy
    mean = values.mean(dim=0, dtype=torch.float32)
    # About a value near the mean: a plain mean of squares would lose the variance of channels far from zero.
    spread = values.float() - mean
    return mean, spread.square_().mean(dim=0)


def normalise(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(weight · (x − mean) / √(variance + eps) + bias) per channel of x (B, C, H, W), in fp32 inside.

    With the statistics of a channel's group this is GroupNorm (Wu & He 2018) followed by SiLU.
    """
    return F.silu(F.batch_norm(x, mean, variance, weight, bias, eps=eps), inplace=True)
