"""Captions of pictures, mixed into the caption of a prompt.

    r(x) = √mean(x²) of a row      u(x) = x / r(x)      R_n = resampled to n rows
    v = u(R_n(u(picture)))         mixed(t, v, α) = (1 − α)·t + α·r(t)·v

A picture's tokens differ from a text's in scale, so they are normalised one by one and brought to the scale of the text
token that they are mixed with; the text keeps its own. No token is dropped: where a picture has more tokens than there
is room for, each of them has its share of the rows that it lies between. Several pictures are mixed in one after
another.

Shapes: L tokens of the text, N of a picture, C caption width. Computed in fp32 or wider, returned in the caption's
dtype.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from zimage.errors import RequestError, quoted
from zimage.text.compress import importance

TINY = 1e-6  # added to standard deviations, and to the mean square of rows
STYLE_FROM = 2 / 3  # of the dimensions: those behind are the ones that `style_only` mixes
SPARED = 0.8  # by how much the most important token of the text is spared


class Seen(NamedTuple):
    """The caption (N, C) of a picture, and its share of the mixture, from 0 (none) to 1 (all)."""

    caption: Tensor
    alpha: float


def blend(caption: Tensor, pictures: Sequence[Seen], mode: str, limit: int) -> Tensor:
    """The caption (L, C) of a text with those of pictures mixed in; as many rows as `blended_length` says.

    Pictures of alpha 0 leave its bits alone. `limit` is the caption length that the DiT was trained for. Raises
    RequestError for an unknown mode, and where `concat` has no room left.
    """
    used = [seen for seen in pictures if seen.alpha > 0]
    shares = _shares(mode, len(caption), [(len(seen.caption), seen.alpha) for seen in used], limit)
    if not used:
        return caption
    wide = torch.promote_types(caption.dtype, torch.float32)
    mixed = caption.to(wide)
    for seen, rows in zip(used, shares, strict=True):
        mixed = MODES[mode].mix(mixed, seen.caption.to(mixed), seen.alpha, rows)
    return mixed.to(caption.dtype)


def blended_length(mode: str, tokens: int, pictures: Sequence[tuple[int, float]], limit: int) -> int:
    """Rows of the blended caption of a text of so many tokens; each picture is (N, alpha). Raises as `blend` does."""
    shares = _shares(mode, tokens, [(count, alpha) for count, alpha in pictures if alpha > 0], limit)
    if mode == "concat":
        return tokens + sum(shares)
    return shares[-1] if shares else tokens


def describe_blend(mode: str, tokens: int, pictures: Sequence[tuple[int, float]], limit: int) -> str:
    """One line on what becomes of the tokens of a text and its pictures; empty where no picture has a share."""
    used = [(count, alpha) for count, alpha in pictures if alpha > 0]
    if not used:
        return ""
    length = blended_length(mode, tokens, used, limit)
    seen = " and ".join(f"{count:,}" for count, _ in used)
    return f"{mode}: {MODES[mode].told} ({seen} tokens seen, {tokens:,} of text: {length:,} in all)"


# ------------------------------------------------------------------ the modes


def interpolate(text: Tensor, seen: Tensor, alpha: float, rows: int) -> Tensor:
    """mixed(t, v, α): the picture's tokens are resampled to the text's; `rows` is the text's length."""
    return _mixed(text, _directions(seen, rows), alpha)


def linear(text: Tensor, seen: Tensor, alpha: float, rows: int) -> Tensor:
    """mixed(t, v, α) at the longer length of the two: t = R_n(r(text)) · u(R_n(u(text))), so none is averaged."""
    sizes, directions = resampled(_rms(text), rows), _directions(text, rows)
    stretched = text if rows == len(text) else sizes * directions
    return _mixed(stretched, _directions(seen, rows), alpha)


def concat(text: Tensor, seen: Tensor, alpha: float, rows: int) -> Tensor:
    """[t, m·v]: behind the text's tokens the picture's, resampled to `rows`, at the scale m of the text.

    m is the median of the tokens' r(t): the first token is an attention sink, many times as large as the others.
    """
    return torch.cat([text, _rms(text).median() * _directions(seen, rows)])


def style_only(text: Tensor, seen: Tensor, alpha: float, rows: int) -> Tensor:
    """mixed(t, v, α) in the last third of the dimensions, from ⌊2C/3⌋ on; t in the others."""
    first = int(STYLE_FROM * text.shape[1])
    share = torch.zeros(text.shape[1]).to(text)
    share[first:] = alpha
    return _mixed(text, _directions(seen, rows), share)


def graduated(text: Tensor, seen: Tensor, alpha: float, rows: int) -> Tensor:
    """mixed(t_i, v_i, α_i) with α_i from 0 for the first token to 2α (at most 1) for the last; α for a single one."""
    ends = (0.0, 2 * alpha) if rows > 1 else (alpha, alpha)
    share = torch.linspace(*ends, rows, dtype=text.dtype, device=text.device).clamp(max=1)
    return _mixed(text, _directions(seen, rows), share[:, None])


def attention_weighted(text: Tensor, seen: Tensor, alpha: float, rows: int) -> Tensor:
    """mixed(t_i, v_i, α·(1 − 0.8·w_i)): what matters in the text is spared; w is its `importance`, at most 1."""
    weights = importance(text)
    share = alpha * (1 - SPARED * weights / weights.max())
    return _mixed(text, _directions(seen, rows), share[:, None])


def adain(text: Tensor, seen: Tensor, alpha: float, rows: int) -> Tensor:
    """(1 − α)·t + α·r(t)·u((u(t) − μ_t) / σ_t · σ_v + μ_v): the picture's mean and deviation in each dimension.

    μ and σ are those of the normalised tokens, of all that each side has. Source: Huang & Belongie 2017, equation 8.
    """
    plain, style = _unit(text), _unit(seen)
    whitened = (plain - plain.mean(0)) / (plain.std(0, correction=0) + TINY)
    return _mixed(text, _unit(whitened * style.std(0, correction=0) + style.mean(0)), alpha)


class Mode(NamedTuple):
    """A way of blending: its function, and what it does in a few words."""

    mix: Callable[[Tensor, Tensor, float, int], Tensor]  # text (L, C), picture (N, C), alpha, rows → caption
    told: str


MODES = {
    "interpolate": Mode(interpolate, "the picture is resampled to the text's length"),
    "linear": Mode(linear, "both are resampled to the longer length"),
    "concat": Mode(concat, "the picture's share of its tokens follows the text"),
    "style_only": Mode(style_only, "the picture is resampled to the text's length, the last third of it mixed in"),
    "graduated": Mode(graduated, "the picture is resampled to the text's length, its share grows towards the end"),
    "attention_weighted": Mode(
        attention_weighted, "the picture is resampled to the text's length, important tokens are spared"
    ),
    "adain": Mode(adain, "the text takes on the mean and deviation of the picture's tokens"),
}


# ------------------------------------------------------------------ lengths


def resampled(rows: Tensor, count: int) -> Tensor:
    """(N, C) → (count, C), linearly, the first and the last row in their places (align_corners).

    Row i is the mean of the rows j weighted by max(0, 1 − |i·(N − 1)/(count − 1) − j| / s), s = 1 where there are no
    fewer rows than before. Where there are fewer, s is the distance of two rows, so that every old row counts.
    """
    if count == len(rows):
        return rows
    if count == 1:
        return rows.mean(0, keepdim=True)
    distance = (len(rows) - 1) / (count - 1)
    centres = torch.arange(count, dtype=torch.float64) * distance
    apart = (centres[:, None] - torch.arange(len(rows))).abs() / max(1.0, distance)
    weights = (1 - apart).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).to(rows) @ rows


def _shares(mode: str, tokens: int, pictures: Sequence[tuple[int, float]], limit: int) -> list[int]:
    """Rows of the caption after each picture; of `concat`, those that each picture adds."""
    if mode not in MODES:
        raise RequestError(f"blend mode {quoted(mode)} does not exist; use one of {', '.join(MODES)}")
    if mode == "concat":
        return _added(tokens, pictures, limit)
    if mode != "linear":
        return [tokens] * len(pictures)
    counts = [min(count, limit) for count, _ in pictures]
    return [reduce(max, counts[: i + 1], tokens) for i in range(len(counts))]


def _added(tokens: int, pictures: Sequence[tuple[int, float]], limit: int) -> list[int]:
    """The share alpha of each picture's tokens, at least one; all are cut in proportion where the limit is reached."""
    wanted = [max(1, round(alpha * count)) for count, alpha in pictures]
    room = limit - tokens
    if room < len(wanted):
        text = f"the text has {tokens:,} of at most {limit:,} tokens, which leaves no room for the picture's"
        raise RequestError(f"vision_blend: {text}; use another than concat", fields=("vision_blend",))
    if sum(wanted) <= room:
        return wanted
    spare = room - len(wanted)  # each keeps one
    return [1 + int(spare * (count - 1) / (sum(wanted) - len(wanted))) for count in wanted]


# ------------------------------------------------------------------ rows


def _mixed(text: Tensor, directions: Tensor, alpha: Tensor | float) -> Tensor:
    return (1 - alpha) * text + alpha * _rms(text) * directions


def _directions(rows: Tensor, count: int) -> Tensor:
    """u(R_n(u(x))): averages of normalised rows are shorter than these, and normalised again."""
    return _unit(resampled(_unit(rows), count))


def _unit(rows: Tensor) -> Tensor:
    return rows / _rms(rows).clamp(min=TINY)


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(-1, keepdim=True).sqrt()
