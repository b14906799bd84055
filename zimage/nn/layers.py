"""Layers that more than one model uses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class WideningLinear(nn.Linear):
    """A Linear whose weight stays as stored (bf16) and is widened to the input's dtype when used.

    For processors that compute in fp32 only: the same values as a model cast to fp32, at half its memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class TokenEmbedding(nn.Embedding):
    """An Embedding not initialised on meta, where drawing normal numbers imports torch's compiler for seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
