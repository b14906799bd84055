"""Who holds what: the tokens and the heads of each rank.

Shapes: B batch, L tokens of a whole sequence, l_r those of rank r, H heads of a model, h_r those of rank r.

Outside attention a rank holds some tokens with all their heads, in attention all tokens with some of the heads. Both
are divided into contiguous runs that are as even as possible: 30 heads are 8, 8, 7 and 7 on four ranks, so that nothing
is padded and nothing computed twice. The joint sequence [image, caption] is divided segment by segment: a rank's own
tokens are [its image tokens, its caption tokens], so that its layers run as those of one rank do.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from zimage.errors import RequestError


def shares(total: int, size: int) -> tuple[int, ...]:
    """The lengths of `size` runs that add up to `total`, the longer ones first."""
    least, more = divmod(total, size)
    return tuple(least + (rank < more) for rank in range(size))


class Split(NamedTuple):
    """A sequence of one or more segments, each of them divided over the ranks in their order.

    segments[i][r] tokens of segment i are rank r's.
    """

    segments: tuple[tuple[int, ...], ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each rank."""
        return [sum(runs) for runs in zip(*self.segments, strict=True)]

    @property
    def runs(self) -> list[range]:
        """Where each rank's tokens lie in a sequence of one segment."""
        (segment,) = self.segments
        return [range(end - length, end) for length, end in zip(segment, accumulate(segment), strict=True)]

    def part(self, whole: Tensor, rank: int, dim: int = 1) -> Tensor:
        """A rank's tokens of a whole sequence, which lie along `dim`; of one segment they are a view."""
        runs = whole.split([run for segment in self.segments for run in segment], dim)[rank :: len(self.segments[0])]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim)

    def parts(self, whole: Tensor, dim: int = 1) -> list[Tensor]:
        """The tokens of every rank."""
        return [self.part(whole, rank, dim) for rank in range(len(self.segments[0]))]

    def whole(self, parts: Iterable[Tensor], dim: int = 1) -> Tensor:
        """The sequence that all ranks' parts make up, in the order of one rank: the inverse of `parts`."""
        runs = zip(*self.segments, strict=True)
        cut = [part.split(lengths, dim) for part, lengths in zip(parts, runs, strict=True)]
        return torch.cat([run for segment in zip(*cut, strict=True) for run in segment], dim)


@dataclass(frozen=True)
class Layout:
    """How an evaluation is divided: the image tokens that the noise refiner sees, the captions, and the heads.

    There is one caption, or with NAG the negative one behind it, and a joint sequence [image, caption] for each.
    """

    image: Split
    captions: Split
    joint: tuple[Split, ...]
    heads: tuple[int, ...]

    @classmethod
    def of(cls, size: int, image: int, captions: Sequence[int], heads: int) -> "Layout":
        """For `size` ranks and so many padded tokens; raises RequestError where a rank would be left with nothing."""
        check_ranks(size, heads)
        for what, tokens in (("an image", image), *(("a caption", caption) for caption in captions)):
            if tokens < size:
                text = f"{what} of {tokens} tokens cannot be divided over {size} ranks; use at most {tokens}"
                raise RequestError(text, fields=("gpus",))
        picture, words = shares(image, size), [shares(caption, size) for caption in captions]
        joint = tuple(Split((picture, run)) for run in words)
        return cls(Split((picture,)), Split(tuple(words)), joint, shares(heads, size))

    @property
    def whole(self) -> Split:
        """The sequence that the layers see: [image, captions]."""
        return Split((*self.image.segments, *self.captions.segments))

    def split(self, rank: int, length: int) -> Split:
        """Which sequence in attention has so many tokens of a rank; raises ValueError for any other length.

        A rank has more of a longer one: padded lengths differ by 32 at least, and there are no more ranks than heads.
        """
        for split in (self.image, *self.joint):
            if split.lengths[rank] == length:
                return split
        lengths = " or ".join(str(split.lengths[rank]) for split in (self.image, *self.joint))
        raise ValueError(f"rank {rank} has {lengths} tokens in attention, and not {length}")


def check_ranks(size: int, heads: int) -> None:
    """Raise RequestError if there are more ranks than heads of attention to share."""
    if size > heads:
        text = f"the model has {heads} heads of attention, which cannot be divided over {size} ranks"
        raise RequestError(f"{text}; use at most {heads}", fields=("gpus",))


def attention_elements(batch: int, head_size: int, lengths: Sequence[int], heads: Sequence[int]) -> int:
    """What all ranks together send in one block's attention: 4·B·D·Σ_r l_r·(H − h_r) elements.

    A rank gives q, k and v of its l_r tokens to the ranks of the other heads, and gets as much of the output back.
    """
    moved = sum(length * (sum(heads) - own) for length, own in zip(lengths, heads, strict=True))
    return 4 * batch * head_size * moved
