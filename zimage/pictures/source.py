"""What a render starts from besides text: a picture, a mask. Opened once, remembered by name and contents."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from zimage.pictures.image import content_hash


@dataclass(frozen=True)
class Source:
    """A picture that was given as a path or as an object."""

    picture: Image.Image = field(repr=False)
    name: str
    hash: str

    @classmethod
    def of(cls, given: Any, opened: Callable[[Any], Image.Image]) -> "Source":
        """`opened` opens what was given; raises RequestError where it cannot."""
        if isinstance(given, cls):
            return given
        picture = opened(given)
        name = os.path.basename(os.fspath(given)) if isinstance(given, str | os.PathLike) else "a picture in memory"
        return cls(picture, name, content_hash(picture))

    def describe(self) -> dict[str, str]:
        """Plain values for a picture's metadata."""
        return {"name": self.name, "hash": self.hash}
