"""Rotary position embedding on interleaved pairs, the DiT's form (Qwen3 rotates halves: see `zimage.text.qwen3`).

Shapes: B batch, L tokens, H heads, D head size.
"""

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x₂ₖ, x₂ₖ₊₁) of `x` (B, L, H, D) by its angle; `cos`, `sin` (B or 1, L, D/2) fp32.

    The rotation runs in fp32, as the reference's does, and the result is cast back to x's dtype.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, L, H, D/2)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
