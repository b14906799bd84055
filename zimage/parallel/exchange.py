"""Attention over ranks by two all-to-alls (DeepSpeed-Ulysses: Jacobs et al. 2023).

Shapes: B batch, L tokens, l_r those of rank r, H heads, h_r those of rank r, D head size.

    q, k, v (B, l_r, H, D) of a rank's tokens  ─ all-to-all ─→  (B, L, h_r, D) of its heads
    attention, by the backend that the model has on one rank
    (B, L, h_r, D)  ─ all-to-all ─→  (B, l_r, H, D)

Heads do not see one another, so a rank's attention is that of one rank on fewer heads: tokens lie in the order of one
rank, and its mask holds for them.
"""

from collections.abc import Sequence

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
    return to_tokens(ranks, layout, split, attend(*to_heads(ranks, layout, split, (q, k, v)), padding))


def to_heads(ranks: Ranks, layout: Layout, split: Split, given: Sequence[Tensor]) -> list[Tensor]:
    """Each (B, l_r, H, D) → (B, L, h_r, D), all of them in one exchange."""
    (B, _, _, D), own, count = given[0].shape, layout.heads[ranks.rank], len(given)
    cut = zip(*(x.split(layout.heads, dim=2) for x in given), strict=True)
    shapes = [(B, length, own, D) for length in split.lengths for _ in given]
    found = ranks.exchange(KIND, [part for parts in cut for part in parts], shapes)
    return [split.whole(found[i::count]) for i in range(count)]


def to_tokens(ranks: Ranks, layout: Layout, split: Split, x: Tensor) -> Tensor:
    """(B, L, h_r, D) → (B, l_r, H, D)"""
    (B, _, _, D), own = x.shape, split.lengths[ranks.rank]
    shapes = [(B, own, heads, D) for heads in layout.heads]
    return torch.cat(ranks.exchange(KIND, split.parts(x), shapes), dim=2)
