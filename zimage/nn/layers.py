"""Layers that more than one model uses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.kernels.half_product import half_product
from zimage.kernels.rms_norm import HALF, rms_norm

PIECE = 2 << 20  # values widened at a time: small enough to stay in a CPU's cache until they are multiplied
GPU_PIECE = 64 << 20  # on a GPU, whose launches cost time: every matrix but the embeddings is widened as a whole


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class NarrowLinear(nn.Linear):
    """A Linear for few rows at a time, as a text encoder has: the same products, the weight as their left factor.

    Half-precision products on a CPU repack their right factor every time. A weight of 50 MB times 24 tokens is a
    quarter faster if the tokens are repacked instead (21 and 27 GB/s of weights read).
    """

    ROWS = 64  # with more rows there is nothing to gain

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if x.device.type != "cpu" or x.dtype not in HALF or rows > self.ROWS or self.bias is not None:
            return super().forward(x)
        return narrow_product(x, self.weight)


class BlockLinear(nn.Linear):
    """A Linear of a transformer block, without bias: the layers that hold and multiply fp16 where the DiT does.

    Their input is held in a unit in which no sum overflows: see `zimage.dit.units`.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return half_product(x, self.weight) if x.dtype is torch.float16 else super().forward(x)


class StreamedLinear(BlockLinear):
    """A Linear whose weight is in memory only while its block runs: changes would be lost, so LoRAs add a branch."""


class WideningLinear(nn.Linear):
    """A Linear whose weight stays as stored (bf16) and is widened to the input's dtype when used.

    For models that compute in fp32 only: the values of a model cast to fp32, at half its memory. Inference only.
    """

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        out = widened_product(x, self.weight)
        return out if self.bias is None else out + self.bias


class TokenEmbedding(nn.Embedding):
    """An Embedding that is not initialised on meta: drawing numbers there imports torch's compiler (seconds)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def logits(self, x: Tensor) -> Tensor:
        """Products (..., tokens) of x (..., C) with every token's row: an output head tied to the embeddings."""
        return narrow_product(x, self.weight) if self.weight.dtype == x.dtype else widened_product(x, self.weight)


def narrow_product(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ of x (..., C) and weight (out, C), the weight as left factor; transposed in memory."""
    return (weight @ x.reshape(-1, x.shape[-1]).t()).t().view(*x.shape[:-1], -1)


def rows_at_a_time(columns: int, device: torch.device) -> int:
    """How many rows of a matrix are widened at a time in products on `device`."""
    return max(1, (PIECE if device.type == "cpu" else GPU_PIECE) // columns)


def widened_product(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ in x's dtype, of weight (out, C) in another, which is widened as a whole or a few rows at a time."""
    rows = rows_at_a_time(weight.shape[1], x.device)
    if rows >= len(weight):
        return F.linear(x, weight.to(x.dtype))
    scratch = x.new_empty(rows, weight.shape[1])
    return torch.cat([F.linear(x, scratch[: len(piece)].copy_(piece)) for piece in weight.split(rows)], dim=-1)
