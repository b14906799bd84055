"""Attention over ranks by two all-to-alls (DeepSpeed-Ulysses: Jacobs et al. 2023).

Shapes: B batch, L tokens, l_r those of rank r, H heads, h_r those of rank r, D head size.

    q, k, v (B, l_r, H, D) of a rank's tokens  ─ all-to-all ─→  (B, L, h_r, D) of its heads
    attention, by the backend that the model has on one rank
    (B, L, h_r, D)  ─ all-to-all ─→  (B, l_r, H, D)

Heads do not see one another, so a rank's attention is that of one rank on fewer heads: tokens lie in the order of one
rank, and its mask holds for them.
"""

import torch
from torch import Tensor

from zimage.nn.attention import Attend, Padding
from zimage.parallel.layout import Layout, Split
from zimage.parallel.ranks import Ranks

KIND = "attention"  # of traffic


def divided_attention(
    ranks: Ranks, layout: Layout, attend: Attend, q: Tensor, k: Tensor, v: Tensor, padding: Padding | None = None
) -> Tensor:
    """`attend` of whole sequences of which q, k and v (B, l_r, H, D) are this rank's tokens; returns (B, l_r, H, D)."""
    split = layout.split(ranks.rank, q.shape[1])
    q, k, v = to_heads(ranks, layout, split, torch.stack((q, k, v)))
    return to_tokens(ranks, layout, split, attend(q, k, v, padding))


def to_heads(ranks: Ranks, layout: Layout, split: Split, x: Tensor) -> Tensor:
    """(3, B, l_r, H, D) → (3, B, L, h_r, D)"""
    (_, B, _, _, D), own = x.shape, layout.heads[ranks.rank]
    shapes = [(3, B, length, own, D) for length in split.lengths]
    return split.whole(ranks.exchange(KIND, x.split(layout.heads, dim=3), shapes), dim=2)


def to_tokens(ranks: Ranks, layout: Layout, split: Split, x: Tensor) -> Tensor:
    """(B, L, h_r, D) → (B, l_r, H, D)"""
    (B, _, _, D), own = x.shape, split.lengths[ranks.rank]
    shapes = [(B, own, heads, D) for heads in layout.heads]
    return torch.cat(ranks.exchange(KIND, split.parts(x), shapes), dim=2)
