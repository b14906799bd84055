"""Shortens captions that are longer than the model was trained for.

Shapes: L tokens, L′ the limit, C caption width. Computed in fp32 or wider, returned in the caption's dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from zimage.errors import RequestError, quoted

WINDOW = 2  # neighbours on each side that a token is compared with
FLOOR = 0.1  # the lowest importance

# mode → what happens to a caption that is too long
MODES = {
    "none": "all are kept, more than the model was trained for",
    "truncate": "the first {limit} are kept and the last {rest} dropped",
    "interpolate": "resampled linearly to {limit}",
    "pool": "averaged to {limit}",
    "attention_pool": "averaged to {limit}, weighted by how much each differs from its neighbours",
}


def compress(caption: Tensor, limit: int, mode: str) -> Tensor:
    """A caption (L, C) with at most `limit` rows; one that fits is returned as it is, as is any with mode "none".

    Raises RequestError for an unknown mode or a limit below 1.
    """
    _check(limit, mode)
    if len(caption) <= limit or mode == "none":
        return caption
    if mode == "truncate":
        return caption[:limit]
    rows = caption if caption.dtype == torch.float64 else caption.float()
    shorten = {"interpolate": _interpolate, "pool": _pool, "attention_pool": _attention_pool}[mode]
    return shorten(rows, limit).to(caption.dtype)


def describe(tokens: int, limit: int, mode: str) -> str:
    """One line on the length of a prompt and on what will happen to it."""
    _check(limit, mode)
    if tokens <= limit:
        return f"{tokens} of at most {limit} tokens"
    return f"{tokens} tokens, {tokens - limit} past the limit: " + MODES[mode].format(limit=limit, rest=tokens - limit)


def importance(rows: Tensor) -> Tensor:
    """(L,) of rows (L, C): one minus the mean cosine with the neighbours within ±2, shifted to a minimum of 0.1."""
    unit = F.normalize(rows, dim=-1)  # a row of zeros stays zero: its cosine with every row is 0
    total, count = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    for distance in range(1, WINDOW + 1):
        cosine = (unit[distance:] * unit[:-distance]).sum(-1)
        for side in (slice(distance, None), slice(None, -distance)):
            total[side] += cosine
            count[side] += 1
    score = 1 - total / count.clamp(min=1)
    return score - score.min() + FLOOR


def _interpolate(rows: Tensor, limit: int) -> Tensor:
    """Row i of L′ is interpolated at i·(L − 1)/(L′ − 1); the first and the last row stay."""
    return F.interpolate(rows.T[None], limit, mode="linear", align_corners=True)[0].T.contiguous()


def _pool(rows: Tensor, limit: int) -> Tensor:
    """Row i of L′ is the mean of rows ⌊i·L/L′⌋ … ⌈(i + 1)·L/L′⌉ − 1."""
    return F.adaptive_avg_pool1d(rows.T[None], limit)[0].T.contiguous()


def _attention_pool(rows: Tensor, limit: int) -> Tensor:
    """Row i of L′ is the mean of rows ⌊i·r⌋ … ⌊(i + 1)·r⌋, r = L/L′, weighted by the softmax of their importance."""
    length, ratio = len(rows), len(rows) / limit
    starts = torch.tensor([int(i * ratio) for i in range(limit)])
    ends = torch.tensor([min(int((i + 1) * ratio) + 1, length) for i in range(limit)])
    index = starts[:, None] + torch.arange(int((ends - starts).max()))  # (L′, longest region)
    outside = (index >= ends[:, None]).to(rows.device)
    index = index.clamp(max=length - 1).to(rows.device)
    weights = importance(rows)[index].masked_fill(outside, -torch.inf).softmax(-1)
    return torch.einsum("ir,irc->ic", weights, rows[index])


def _check(limit: int, mode: str) -> None:
    if mode not in MODES:
        raise RequestError(f"long prompt mode {quoted(mode)} does not exist; use one of {', '.join(MODES)}")
    if limit < 1:
        raise RequestError(f"the limit is {limit} tokens; the minimum is 1")
