r"""Weights in a prompt: which tokens of its caption count for more or less.

    (words:1.2)   weighed by 1.2          (words)   by 1.1          [words]   by 1 / 1.1
    \( \) \[ \]   brackets that are text  ((words)) and [(words:1.2)]   multiply

The text encoder reads the prompt without its brackets: its caption e. For the words of each weight w it also reads the
prompt without these, whose caption e_w lacks what they say, in their own rows and in all that follow:

    e′ = e + Σ_w (w − 1)·(e − e_w)

At w = 0 the words are gone, above 1 what they add is added once more. A factor on their own rows would be cancelled,
since the DiT begins by normalising every row; and a word's sense lies in the rows behind it, too. In the place of the
rows that the words have themselves, e_w has the mean direction m = mean(e / r) of the caption at each row's own size
r = √mean(e²). Down-weighting by a text without the words: Compel (D. Stewart); the notation: Stable Diffusion's
programs.

Shapes: L caption tokens, C caption width.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import torch
from torch import Tensor

from zimage.errors import RequestError

FACTOR = 1.1  # of a pair of brackets without a number
MOST = 10.0  # the largest weight, also of nested ones together
PIECE = re.compile(r"\\([()\[\]\\])|:\s*(\d+\.?\d*|\.\d+)\s*([)\]])|([(\[])|([)\]])|[^\\()\[\]:]+|.", re.DOTALL)
TINY = 1e-6  # the least size of a row
CLOSING = {"(": ")", "[": "]"}


class Weighed(NamedTuple):
    """A text without its brackets, and the weight of each of its characters; none where all of them are 1."""

    text: str
    weights: tuple[float, ...] = ()


def weighed(prompt: str) -> Weighed:
    """Read the weights in a prompt. Raises RequestError for a bracket without its other, or too large a weight."""
    text, weights, opened = list[str](), list[float](), list[tuple[str, int, int]]()
    for piece in PIECE.finditer(prompt):
        escaped, number, numbered, opening, closing = piece.groups()
        if opening:
            opened.append((opening, len(weights), piece.start()))
        elif closing or numbered:
            bracket, first, _ = opened.pop() if opened else ("", 0, 0)
            factor = _factor(bracket, closing or numbered, number, piece.start())
            weights[first:] = [weight * factor for weight in weights[first:]]
        else:
            text.append(escaped or piece[0])
            weights += [1.0] * len(text[-1])
    if opened:
        raise _fault(f"the {opened[-1][0]} at character {opened[-1][2] + 1} is not closed", opened[-1][0])
    if max(weights, default=1.0) > MOST:
        raise _fault(f"its largest weight is {max(weights):g}; use {MOST:g} at most")
    return Weighed("".join(text), tuple(weights) if set(weights) - {1.0} else ())


def _factor(bracket: str, closing: str, number: str | None, place: int) -> float:
    """What a pair of brackets weighs."""
    if CLOSING.get(bracket) != closing:
        raise _fault(f"the {closing} at character {place + 1} closes nothing", closing)
    if number is None:
        return FACTOR if bracket == "(" else 1 / FACTOR
    if bracket == "[":
        raise _fault(f"[…:{number}] is not a weight; write (…:{number})")
    return float(number)


def _fault(told: str, bracket: str = "") -> RequestError:
    instead = f"; write \\{bracket} where it is text, or leave out weights_in_prompt" if bracket else ""
    return RequestError(f"prompt: {told}{instead}", fields=("prompt", "weights_in_prompt"))


class Emphasis(NamedTuple):
    """The words of one weight: their tokens, and the whole formatted text without them."""

    weight: float
    without: str
    tokens: tuple[int, ...]


def emphases(text: Weighed, spans: Sequence[tuple[int, int]]) -> tuple[Emphasis, ...]:
    """The weights in a text whose tokens stand for these characters (first, end); none where all are 1.

    A token's weight is the mean of its characters', but for spaces: one that begins with the space before a bracket
    has the weight behind it, and one that is weighed in part has its share.
    """
    if not text.weights:
        return ()
    weights = [_mean(text, range(*span)) for span in spans]
    found = []
    for weight in dict.fromkeys(weight for weight in weights if weight != 1):
        tokens = tuple(i for i, other in enumerate(weights) if other == weight)
        gone = {place for i in tokens for place in range(*spans[i])}
        found.append(Emphasis(weight, "".join(c for i, c in enumerate(text.text) if i not in gone), tokens))
    return tuple(found)


def _mean(text: Weighed, span: range) -> float:
    weights = [text.weights[i] for i in span if not text.text[i].isspace()] or [1.0]
    return weights[0] if len(set(weights)) == 1 else sum(weights) / len(weights)


# ------------------------------------------------------------------ captions


class Without(NamedTuple):
    """The caption (L′, C) of a text without the words of an emphasis, and its token ids."""

    emphasis: Emphasis
    caption: Tensor
    ids: Sequence[int]


def emphasised(caption: Tensor, ids: Sequence[int], withouts: Sequence[Without]) -> Tensor:
    """e′ of a caption e (L, C) with these ids, in fp32 or wider, returned in the caption's dtype.

    Rows before the first weighed token keep their bits, as all do where no token is weighed.
    """
    wide = torch.promote_types(caption.dtype, torch.float32)
    rows = result = caption.to(wide)
    for one in withouts:
        result = result + (one.emphasis.weight - 1) * (rows - _aligned(rows, ids, one))
    return result.to(caption.dtype)


def _aligned(rows: Tensor, ids: Sequence[int], one: Without) -> Tensor:
    """e_w (L, C): rows of the other caption in the places of the same tokens, e where there are none."""
    own = list(one.emphasis.tokens)
    size = rows.square().mean(-1, keepdim=True).sqrt().clamp(min=TINY)
    aligned = rows.clone()
    aligned[own] = size[own] * (rows / size).mean(0)
    here, there = _pairs(ids, one)
    aligned[here] = one.caption.to(rows)[there]
    return aligned


def _pairs(ids: Sequence[int], one: Without) -> tuple[list[int], list[int]]:
    """The tokens behind the first of an emphasis, in both texts.

    Where its words stood, the tokens beside them may have become others; what is left is found again by its ids.
    """
    own, first = set(one.emphasis.tokens), one.emphasis.tokens[0]
    left, others = [i for i in range(len(ids)) if i not in own], list(one.ids)
    kept = [ids[i] for i in left]
    if kept == others:
        pairs = list(zip(left, range(len(others)), strict=True))
    else:
        blocks = SequenceMatcher(None, kept, others, autojunk=False).get_matching_blocks()
        pairs = [(left[a + k], b + k) for a, b, n in blocks for k in range(n)]
    behind = [(here, there) for here, there in pairs if here > first]
    return [here for here, _ in behind], [there for _, there in behind]
