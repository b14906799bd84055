"""Root-mean-square normalisation over the last dimension."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension (Zhang & Sennrich 2019), in fp32 inside."""
    return F.rms_norm(x, weight.shape, weight, eps)
