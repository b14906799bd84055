"""How far one picture is from another, as a picture and as numbers.

With a and b of 0 … 255 a channel, d = |a − b|, and D the largest d of a pixel's channels:

- absolute: gain · d, channel by channel; equal pixels are black
- heatmap: gain · D on a scale from black over violet and orange to pale yellow
- highlight: the picture in pale grey, where D ≥ THRESHOLD in red

A gain of 1 is exact; small differences need more to be seen.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zimage.errors import RequestError

Kind = Literal["absolute", "highlight", "heatmap"]
KINDS: tuple[Kind, ...] = ("absolute", "highlight", "heatmap")
GAIN, MOST_GAIN = 4.0, 255.0
THRESHOLD = 8  # levels of 256; less is what rounding in another dtype does
RED = np.array([230, 30, 50], np.float32)
PALE = 0.35  # of the contrast that the picture keeps where it does not differ
SCALE = np.array([[0, 0, 0], [72, 16, 112], [178, 42, 92], [244, 122, 38], [252, 244, 168]], np.float32)
Levels = NDArray[np.float32]


@dataclass(frozen=True)
class Distance:
    """The mean and the largest difference of all channels, in levels of 256; how many pixels differ at all."""

    mean: float
    largest: int
    pixels: int

    @property
    def lines(self) -> tuple[str, str]:
        """Two short lines for people."""
        return (f"mean {self.mean:.2f}", f"max {self.largest}") if self.pixels else ("equal bits", "")


def distance(picture: Image.Image, base: Image.Image) -> Distance:
    """Raises RequestError where the sizes differ."""
    gaps = _gaps(picture, base)
    return Distance(float(gaps.mean()), int(gaps.max()), int(np.count_nonzero(gaps.max(axis=2))))


def difference(picture: Image.Image, base: Image.Image, kind: Kind, gain: float = GAIN) -> Image.Image:
    """The picture of a difference, of the same size. Raises RequestError where the sizes differ."""
    gaps = _gaps(picture, base)
    if kind == "absolute":
        levels = gaps * gain
    elif kind == "heatmap":
        levels = _coloured(gaps.max(axis=2) * gain)
    else:
        levels = _highlighted(picture, gaps.max(axis=2))
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def kind_of(text: str) -> Kind:
    """Raises RequestError for what is not a kind."""
    for kind in KINDS:
        if text == kind:
            return kind
    raise RequestError(f"kind {text[:40]!r} is not known; use {', '.join(KINDS)}", fields=("kind",))


def _gaps(picture: Image.Image, base: Image.Image) -> Levels:
    """(H, W, 3) differences in levels."""
    if picture.size != base.size:
        sizes = " and ".join(f"{one.width} × {one.height}" for one in (picture, base))
        raise RequestError(f"pictures of {sizes} pixels cannot be compared pixel by pixel")
    return np.abs(_levels(picture) - _levels(base))


def _levels(picture: Image.Image) -> Levels:
    return np.asarray(picture.convert("RGB"), np.float32)


def _coloured(values: Levels) -> Levels:
    """(H, W) of 0 … 255 → (H, W, 3) on the scale, linear between its colours."""
    steps = np.linspace(0, 255, len(SCALE))
    return np.stack([np.interp(values, steps, SCALE[:, c]) for c in range(3)], axis=2).astype(np.float32)


def _highlighted(picture: Image.Image, values: Levels) -> Levels:
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    pale = 255 - PALE * (255 - grey)
    return np.where((values >= THRESHOLD)[..., None], RED, pale).astype(np.float32)
