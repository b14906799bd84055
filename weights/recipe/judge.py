"""Says what a picture shows, by comparing it with every scene it could be.

Background: the palette colour nearest to the border's median. Objects: the nearest true drawing, over all objects,
sizes and places, on that background; in a pair each half is compared for itself. All distances are root mean squares
of pixel values in [−1, 1] at half resolution.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.weights.recipe.objects import OBJECTS, PALETTE
from zimage.weights.recipe.scenes import (  # fmt: skip
    LARGE,
    LARGE_PLACES,
    PAIR_SIZES,
    PAIR_X,
    PAIR_Y,
    SIDE,
    SIZE_WORDS,
    SMALL,
    SMALL_PLACES,
    Placed,
    Scene,
    draw,
)

BACKGROUND_BOUND = 25.0  # of 255, Euclidean: the palette's closest two colours are over 80 apart
CLEAN_BOUND = 0.15  # rms error at which a picture still counts as its nearest scene: twice the autoencoder's own
GAP = slice(61, 67)  # columns between the members of a pair
BORDER = 3  # px


@dataclass(frozen=True)
class Finding:
    """What a picture shows. `error` is the largest rms error of its parts, `background` None when no colour is near."""

    background: str | None
    objects: tuple[Placed, ...]
    error: float
    gap: bool

    @property
    def clean(self) -> bool:
        one_row = len({(o.size, o.y) for o in self.objects}) == 1
        return self.background is not None and self.error <= CLEAN_BOUND and self.gap and one_row

    @property
    def size(self) -> str:
        return SIZE_WORDS[self.objects[0].size]


def find(picture: Tensor, count: int) -> Finding:
    """Read a picture (3, 128, 128) that should show `count` objects, 1 or 2."""
    background, is_near = nearest_colour(border_colour(picture))
    small = halve(picture)
    if count == 1:
        parts = [match(small.flatten(), *single_templates(background))]
    else:
        half = SIDE // 4  # columns of a half at half resolution
        parts = [
            match(small[..., side * half :][..., :half].flatten(), *half_templates(background, side)) for side in (0, 1)
        ]
    placed, errors = zip(*parts, strict=True)
    gap = count == 1 or has_gap(picture, background)
    return Finding(background if is_near else None, placed, max(errors), gap)


def border_colour(picture: Tensor) -> Tensor:
    frame = torch.ones(SIDE, SIDE, dtype=torch.bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    return picture[:, frame].median(dim=1).values


def nearest_colour(colour: Tensor) -> tuple[str, bool]:
    """The palette's nearest colour to one in [−1, 1], and whether it is near."""
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.float32)
    distances = (palette - (colour + 1) * 127.5).norm(dim=1)
    return list(PALETTE)[int(distances.argmin())], bool(distances.min() <= BACKGROUND_BOUND)


def has_gap(picture: Tensor, background: str) -> bool:
    """Whether nearly all of the middle columns are background."""
    ground = torch.tensor(PALETTE[background], dtype=torch.float32)[:, None, None] / 127.5 - 1
    distance = (picture[:, :, GAP] - ground).abs().amax(dim=0)
    return bool((distance < 0.3).float().mean() > 0.95)


def halve(picture: Tensor) -> Tensor:
    return F.avg_pool2d(picture, 2)


def match(part: Tensor, scenes: list[Placed], templates: Tensor) -> tuple[Placed, float]:
    """The nearest template of a flattened part and its rms error."""
    errors = (templates - part).square().mean(dim=1)
    best = int(errors.argmin())
    return scenes[best], errors[best].sqrt().item()


@cache
def single_templates(background: str) -> tuple[list[Placed], Tensor]:
    spots = [(LARGE, x, y) for x, y in LARGE_PLACES] + [(SMALL, x, y) for x, y in SMALL_PLACES]
    placed = [Placed(name, *spot) for name in OBJECTS for spot in spots]
    return placed, torch.stack([halve(draw(Scene((p,), background))).flatten() for p in placed])


@cache
def half_templates(background: str, side: int) -> tuple[list[Placed], Tensor]:
    placed = [Placed(name, size, PAIR_X[side], y) for name in OBJECTS for size in PAIR_SIZES for y in PAIR_Y]
    half = SIDE // 4
    columns = slice(side * half, (side + 1) * half)
    return placed, torch.stack([halve(draw(Scene((p,), background)))[..., columns].flatten() for p in placed])
