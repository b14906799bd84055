"""What stays the same over the steps of one batch: caption tokens, rotations, and what each token sees.

Shapes: B batch, Lp caption tokens and N image tokens, each padded to a multiple of 32, D head size, h × w latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.dit.nag import Nag, Seen, unit_of
from zimage.dit.patch import PATCH, padded_length
from zimage.dit.rope import Rotation, caption_positions, image_positions
from zimage.nn.attention import Padding

Turn = Callable[[Tensor], Rotation]  # positions (B or 1, L, 3) → their rotations


@dataclass(frozen=True)
class Context:
    tokens: Tensor  # (B, Lp, dim), refined captions; with NAG the negative ones behind them
    image_rotation: Rotation  # of N tokens
    rotation: Rotation  # of the joint sequence [image, tokens]
    seen: Seen  # in the joint sequences; None where all captions have one padded length, without NAG


def stacked(refined: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Refined captions (Lp, dim) in one batch (B, max Lp, dim), zeros behind the shorter ones, and their lengths."""
    lengths = [len(tokens) for tokens in refined]
    return torch.stack([F.pad(tokens, (0, 0, 0, max(lengths) - len(tokens))) for tokens in refined]), lengths


def context_of(tokens: Tensor, lengths: Sequence[int], h: int, w: int, turn: Turn) -> Context:
    """That of images of h × w latents with captions (B, max Lp, dim) of these padded lengths."""
    rows, columns = h // PATCH, w // PATCH
    padded = padded_length(rows * columns)
    # (B or 1, N, 3): a caption's length shifts only its own image
    image = torch.stack([image_positions(rows, columns, padded, n) for n in _distinct(lengths)])
    caption = caption_positions(max(lengths)).expand(len(image), -1, -1)
    joint = turn(torch.cat((image, caption), dim=1))
    return Context(
        tokens=tokens,
        image_rotation=Rotation(*(part[:, :padded] for part in joint)),
        rotation=joint,
        seen=Padding.of([padded + length for length in lengths], tokens.device),
    )


def away_from(
    negative: Sequence[Tensor], context: Context, lengths: Sequence[int], scale: float, turn: Turn, in_half: bool
) -> Context:
    """A context with normalised attention guidance away from refined negative captions (Lp, dim), one for each image.

    `lengths` are those of the captions; `in_half`: blocks compute in fp16.
    """
    (away, others), image = stacked(negative), context.image_rotation.cos.shape[1]
    # Each ends where its caption does, right before the image.
    shifts = [own - other for own, other in zip(lengths, others, strict=True)]
    behind = turn(torch.stack([caption_positions(max(others), shift) for shift in _distinct(shifts)]))
    rows = max(len(context.rotation.cos), len(behind.cos))
    turns = zip(context.rotation, behind, strict=True)
    assert not isinstance(context.seen, Nag)
    padding = Padding.of([image + other for other in others], away.device)
    strength = torch.tensor(scale, dtype=torch.float32, device=away.device)
    return replace(
        context,
        tokens=torch.cat((context.tokens, away), dim=1),
        rotation=Rotation(*(torch.cat([part.expand(rows, -1, -1) for part in pair], dim=1) for pair in turns)),
        seen=Nag(strength, image, context.tokens.shape[1], context.seen, padding, unit_of(scale) if in_half else 1.0),
    )


def _distinct(values: Sequence[int]) -> Sequence[int]:
    """All of them, or the first where all are equal: rotations of one row serve a whole batch."""
    return values if len(set(values)) > 1 else values[:1]
