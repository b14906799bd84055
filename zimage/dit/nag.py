"""Normalised attention guidance, "NAG": a negative caption that acts within one evaluation.

It is that of Chen et al. 2025 (arXiv 2505.21179) for a stream of images and captions together.

The joint layers then see [image, caption, negative caption]. Whatever looks at one token at a time does so once; only
attention runs twice, on [image, caption] and on [image, negative caption], both with the same q, k and v of the image:

    z⁺ and the caption's output     of the first
    z⁻ and the negative's output    of the second
    z  = s·z⁺ − (s − 1)·z⁻          away from the negative caption; s = 1 is off
    z′ = z · min(1, τ·‖z⁺‖₁ / ‖z‖₁)  with the norm of a token over all of its features
    α·z′ + (1 − α)·z⁺               the image's output

So the image has one stream, which both captions see, and neither caption sees the other. The negative caption stands
where it would stand in an evaluation of its own: its last padded token right before the image.

Shapes: B batch, N image tokens, Lp and Ln those of both captions, all padded, L = N + Lp + Ln, H heads, D head size.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zimage.nn.attention import Attend, Padding

TAU = 3.5  # both are those that the paper's authors use with Flux
ALPHA = 0.5


class Nag(NamedTuple):
    """What the tokens of [image, caption, negative caption] see, in the place of a padding."""

    scale: Tensor  # (), fp32; compiled code and graphs have it as an input, and all else as constants
    image: int  # N
    caption: int  # Lp
    positive: Padding | None  # of [image, caption]
    negative: Padding | None  # of [image, negative caption]
    unit: float = 1.0  # the power of two in which fp16 holds the output; see `unit_of`

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output / unit (B, L, H·D) of q, k and v (B, L, H, D)."""
        n, joint = self.image, self.image + self.caption
        # The second one first, on copies: backends may write over what they are given.
        given = (torch.cat((x[:, :n], x[:, joint:]), dim=1) for x in (q, k, v))
        away = attend(*given, self.negative).flatten(2)
        toward = attend(*(x[:, :joint] for x in (q, k, v)), self.positive).flatten(2)
        parts = guided(toward[:, :n], away[:, :n], self.scale), toward[:, n:], away[:, n:]
        return torch.cat([(part if self.unit == 1 else part / self.unit).to(q.dtype) for part in parts], dim=1)


Seen = Padding | Nag | None  # what a token of a sequence sees: all of it, what is real, or as guidance has it


def is_ragged(seen: Seen) -> bool:
    """Whether sequences of unequal length are padded."""
    return seen.positive is not None or seen.negative is not None if isinstance(seen, Nag) else seen is not None


def guided(positive: Tensor, negative: Tensor, scale: Tensor, tau: float = TAU, alpha: float = ALPHA) -> Tensor:
    """z⁺ and z⁻ (…, features) and s () → α·z′ + (1 − α)·z⁺, in fp32 or wider; at scale 1 it is z⁺ to the bit."""
    wide = torch.promote_types(positive.dtype, torch.float32)
    positive, negative, scale = positive.to(wide), negative.to(wide), scale.to(wide)
    limit, length = tau * _norm(positive), _norm(negative.lerp(positive, scale))
    share = alpha * torch.where(length > limit, limit / length, 1.0)  # of z in the output, row by row
    image = positive * (1 - alpha + scale * share)
    return image.addcmul_(negative, (1 - scale) * share)  # in place: the plan counts on three maps in fp32 here


def _norm(x: Tensor) -> Tensor:
    """The L1 norm of each row (…, 1)."""
    return torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True)


def unit_of(scale: float) -> float:
    """The power of two that is at least α·(2s − 1) + 1 − α: of two rows, the most by which guidance lengthens one."""
    return 2.0 ** math.ceil(math.log2(ALPHA * (2 * scale - 1) + 1 - ALPHA))
