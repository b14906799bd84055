"""From a picture to the patches that Qwen3-VL's vision tower reads, as its published processor makes them.

Shapes: R × Q patches of a picture, P the side of a patch in pixels; patches lie in groups of m × m neighbours, which
the tower merges into one image token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zimage.errors import RequestError
from zimage.formats.json_text import read_json
from zimage.nn.config import Between, check_implemented, fault, read_architecture, section
from zimage.text.sight import Grid

FILE = "preprocessor_config.json"
NEWER_FILE, NEWER_SECTION = "processor_config.json", "image_processor"  # transformers 5 writes it into this one
NARROWEST = 200  # the longer side over the shorter one

PatchSide = Annotated[int, Between(1, 256)]
MergeSide = Annotated[int, Between(1, 16)]
LeastPixels = Annotated[int, Between(1, 1 << 22)]
MostPixels = Annotated[int, Between(1, 1 << 26)]


class Pixels(NamedTuple):
    """A picture as the tower reads it."""

    levels: Tensor  # (R·Q, 3, P, P) of 0 to 255, the patches group by group
    grid: Grid  # R and Q

    def values(self, device: torch.device) -> Tensor:
        """The patches in [−1, 1], fp32: mean and deviation are one half."""
        return self.levels.to(device).float() / 127.5 - 1


@dataclass(frozen=True)
class PixelLimits:
    """How large a picture is when the tower reads it: the fields of `preprocessor_config.json`, as published."""

    min_pixels: LeastPixels = 65_536
    max_pixels: MostPixels = 16_777_216
    patch_size: PatchSide = 16
    merge_size: MergeSide = 2

    IMPLEMENTED: ClassVar = {
        "temporal_patch_size": (2,),
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "rescale_factor": (1 / 255, None),
        "resample": (3, None),  # bicubic
        "image_mean": ([0.5] * 3, None),
        "image_std": ([0.5] * 3, None),
    }

    def __post_init__(self):
        if self.min_pixels > self.max_pixels:
            raise fault(type(self), f"min_pixels = {self.min_pixels} must not exceed max_pixels = {self.max_pixels}")

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "PixelLimits":
        """From `preprocessor_config.json`: `min_pixels` and `max_pixels`, or `size` with its two edges, which are
        numbers of pixels as well. Raises ConfigError.
        """
        size, values = section(cls, config, "size"), {k: v for k, v in config.items() if v is not None}
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if key not in values:
                if edge not in size:
                    raise fault(cls, f"the key {key!r} is missing, and so is {edge!r} in 'size'")
                values[key] = size[edge]
        check_implemented(cls, values, cls.IMPLEMENTED)
        return read_architecture(cls, values)

    @classmethod
    def beside(cls, path: Path, sides: Mapping[str, int]) -> "PixelLimits":
        """Those of a model's folder, or of the folder that a loose file lies in; the published ones if it states none.

        `sides` are `patch_size` and `merge_size` where the file does not state them. Raises CheckpointError or
        ConfigError.
        """
        folder = path if path.is_dir() else path.parent
        if (file := folder / FILE).is_file():
            return cls.read({**sides, **read_json(file)})
        newer = folder / NEWER_FILE
        config = section(cls, read_json(newer), NEWER_SECTION) if newer.is_file() else {}
        return cls.read({**sides, **config}) if config else cls(**sides)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) at which a picture is read: multiples of a token's side, the shape nearly kept.

        Source: `smart_resize` of the published processor, whose limits hold for the picture's area. Raises
        RequestError for a picture that is too narrow.
        """
        if min(width, height) < 1 or max(width, height) > NARROWEST * min(width, height):
            raise RequestError(
                f"a reference picture of {width}×{height} cannot be read: its longer side may be at most {NARROWEST} "
                "times the shorter one",
                fields=("reference",),
            )
        token, area = self.patch_size * self.merge_size, width * height
        sides = [round(side / token) * token for side in (width, height)]
        if math.prod(sides) > self.max_pixels:
            shrink = math.sqrt(area / self.max_pixels)
            sides = [max(token, math.floor(side / shrink / token) * token) for side in (width, height)]
        elif math.prod(sides) < self.min_pixels:
            grow = math.sqrt(self.min_pixels / area)
            sides = [math.ceil(side * grow / token) * token for side in (width, height)]
        return sides[0], sides[1]

    def grid(self, width: int, height: int) -> Grid:
        """Rows and columns of patches of a picture of this size. Raises RequestError, as `size` does."""
        columns, rows = (side // self.patch_size for side in self.size(width, height))
        return rows, columns


def pixels_of(picture: Image.Image, limits: PixelLimits | None = None) -> Pixels:
    """A picture ("RGB", as `open_image` returns it) brought to its size by bicubic resampling and cut up.

    Raises RequestError for one that is too narrow.
    """
    limits = limits or PixelLimits()
    sized = picture.convert("RGB").resize(limits.size(*picture.size), Image.Resampling.BICUBIC)
    levels = torch.from_numpy(np.array(sized))  # (height, width, 3)
    side = limits.patch_size
    patches = levels.unflatten(0, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3)  # (R, Q, 3, P, P)
    rows, columns = patches.shape[:2]
    return Pixels(grouped(patches, limits.merge_size), (rows, columns))


def grouped(values: Tensor, side: int) -> Tensor:
    """Values (R, Q, …) of the patches of a picture, in the order of their side × side groups: (R·Q, …)."""
    groups = values.unflatten(0, (-1, side)).unflatten(2, (-1, side))  # (R/m, m, Q/m, m, …)
    return groups.transpose(1, 2).flatten(0, 3)
