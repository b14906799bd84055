"""The one attention call of every model here.

Shapes: B batch, L tokens, H query heads, G key/value heads, D head size.
"""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q·kᵀ/√D)·v with q (B, L, H, D) and k, v (B, L, G, D), G dividing H; returns (B, L, H, D).

    `mask` is boolean, broadcastable to (B, H, L, L), True where a key may be seen. Pass None when all sequences
    have one length: the unmasked kernels are much faster.
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
