"""What a text stack is given of pictures: image tokens in place of pad tokens, and where all tokens stand.

Shapes: L tokens of a text, N image tokens of all its pictures, C hidden width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zimage.errors import RequestError

Grid = tuple[int, int]  # rows and columns


class Sight(NamedTuple):
    """Pictures as a text stack reads them; `Qwen3VL.look` makes one."""

    tokens: Tensor  # (N, C), in place of the embeddings of the pad tokens
    deepstack: tuple[Tensor, ...]  # each (N, C), added to them after the text layers 0, 1, 2, …
    grids: tuple[Grid, ...]  # of each picture's tokens
    pad: int  # the id of the token that stands for one of a picture

    @property
    def counts(self) -> tuple[int, ...]:
        """Image tokens of each picture."""
        return tuple(rows * columns for rows, columns in self.grids)

    def places(self, ids: Tensor) -> Tensor:
        """(1, L) True where ids (1, L) are pad tokens. One text at a time."""
        if len(ids) != 1:
            raise ValueError(f"{len(ids)} texts share the pictures of one")
        return ids == self.pad

    def shown(self, x: Tensor, places: Tensor) -> Tensor:
        """The embeddings x (1, L, C) with the pictures' in their places."""
        return x.masked_scatter(places[..., None], self.tokens.to(x.device, x.dtype))

    def deepened(self, x: Tensor, places: Tensor, layer: int) -> Tensor:
        """The output x (1, L, C) of a text layer with the features that this layer is given of the pictures.

        Source: DeepStack (Meng et al. 2024), as Qwen3-VL has it.
        """
        if layer >= len(self.deepstack):
            return x
        x = x.clone()
        x[places] += self.deepstack[layer].to(x.device, x.dtype)
        return x


def positions(ids: Tensor, grids: Sequence[Grid], pad: int) -> Tensor:
    """Positions (3, L) in time, height and width of a text's ids (L,).

    A token of text stands at the same running position in all three; those of a picture at one time and at its rows and
    columns, which begin there too. What follows a picture stands behind the largest position in it. Source: Qwen2-VL
    (Wang et al. 2024), section 2.1. Raises RequestError unless each run of pad tokens is a picture's.
    """
    is_pad, pieces, at, place = (ids == pad).tolist(), [torch.empty(3, 0, dtype=torch.long)], 0, 0
    if sum(is_pad) != sum(rows * columns for rows, columns in grids):
        raise RequestError(_mismatch(sum(is_pad), grids))
    for rows, columns in grids:
        first = is_pad.index(True, at)
        if not all(is_pad[first : first + rows * columns]):
            raise RequestError(_mismatch(sum(is_pad), grids))
        pieces += [_running(first - at, place), _of_picture(rows, columns, place + first - at)]
        place += first - at + max(rows, columns)
        at = first + rows * columns
    return torch.cat([*pieces, _running(len(is_pad) - at, place)], dim=1).to(ids.device)


def axes(pairs: int, sections: tuple[int, int, int]) -> Tensor:
    """(pairs,) 0, 1 or 2: whether a pair turns by time, height or width, in turn while their sections last.

    What is left when the sections of height and width end turns by time. Source: Qwen3-VL Technical Report (2025),
    interleaved M-RoPE.
    """
    axis = torch.zeros(pairs, dtype=torch.long)
    for which in (1, 2):
        axis[which : 3 * sections[which] : 3] = which
    return axis


def _running(count: int, place: int) -> Tensor:
    return (torch.arange(count) + place).expand(3, -1)


def _of_picture(rows: int, columns: int, place: int) -> Tensor:
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((torch.zeros_like(down), down, across)).flatten(1) + place


def _mismatch(pads: int, grids: Sequence[Grid]) -> str:
    wanted = " + ".join(str(rows * columns) for rows, columns in grids) or "no"
    return (
        f"the text has {pads} image tokens where its pictures have {wanted}, in one run for each; leave <|image_pad|> "
        "out of texts"
    )
