"""Tensors ↔ pictures, and pictures as an input: read from any file, brought to a size, told apart by their content.

Shapes: images (B, 3, H, W) fp32 in [−1, 1]; masks (1, 1, H, W) fp32, 1 = repaint, 0 = keep. An input picture is
"RGB", a mask "L". Colour profiles are not applied, and of an animation the first frame is taken.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from zimage.errors import RequestError
from zimage.pictures.opening import decoded
from zimage.settings.declared import MAX_SIDE, SIZE_MULTIPLE

if TYPE_CHECKING:
    from torch import Tensor

Given = str | os.PathLike[str] | Image.Image
THRESHOLD = 128  # the first of 256 levels that is at least one half
STRIP = 512  # rows


@dataclass(frozen=True)
class InputPicture:
    """A picture that a render starts from: opened once, remembered by name, folder and contents."""

    picture: Image.Image = field(repr=False)
    name: str
    hash: str
    path: str = ""  # where it lies; empty for one that was given as an object

    @classmethod
    def of(cls, given: "Given | InputPicture", opened: Callable[[Given], Image.Image]) -> "InputPicture":
        """From a path or an object, with `open_image` or `open_mask`. Raises RequestError."""
        if isinstance(given, InputPicture):
            return given
        picture, path = opened(given), "" if isinstance(given, Image.Image) else os.path.abspath(given)
        return cls(picture, os.path.basename(path) or "a picture in memory", content_hash(picture), path)

    def describe(self) -> dict[str, str]:
        """Plain values for a picture's metadata, which names no folders."""
        return {"name": self.name, "hash": self.hash}


def to_pil(images: "Tensor") -> list[Image.Image]:
    """(B, 3, H, W) tensor in [−1, 1], rounded to the nearest of 256 levels, or of such levels → PIL images."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte() if images.is_floating_point() else images
    return [Image.fromarray(pixels) for pixels in levels.permute(0, 2, 3, 1).cpu().numpy()]


def from_pil(image: Image.Image) -> "Tensor":
    """A PIL image → (1, 3, H, W) fp32 tensor in [−1, 1], in the reference's order of rounding."""
    import numpy as np
    import torch

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(2 * pixels - 1).permute(2, 0, 1)[None].contiguous()


def mask_values(mask: Image.Image) -> "Tensor":
    """A mask → (1, 1, H, W) fp32 in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)[None, None]


def mask_tensor(mask: Image.Image, width: int, height: int) -> "Tensor":
    """A mask → (1, 1, H, W) fp32 of zeros and ones: brought to the size by `fit`, then cut at one half."""
    import numpy as np
    import torch

    levels = np.asarray(fit(mask.convert("L"), width, height))
    return torch.from_numpy((levels >= THRESHOLD).astype(np.float32))[None, None]


def open_image(source: Given) -> Image.Image:
    """Any picture as "RGB": upright by its EXIF rotation, transparency on white, 16 bits rounded to 8.

    Files may be PNG, JPEG, WebP, AVIF, BMP, GIF or TIFF. Raises RequestError where there is none, where it is of
    another kind or damaged, or where it is too large.
    """
    return _on_ground(source, "white")


def open_mask(source: Given) -> Image.Image:
    """Any picture as a mask "L", white = repaint: its luminance, transparency on black.

    So what is transparent is kept, and white strokes drawn on an empty layer are what is repainted.
    """
    return _on_ground(source, "black").convert("L")


def fit(image: Image.Image, width: int, height: int, by: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Scaled until it covers width × height, and cut to its centre there.

    Only what is kept is computed: a long strip needs no giant in between. A picture of that size comes back untouched.
    """
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), by)


def natural_size(size: tuple[int, int], multiple: int = SIZE_MULTIPLE, longest: int = MAX_SIDE) -> tuple[int, int]:
    """(width, height) for a render of a picture of this size: each side at the nearest multiple, at least one.

    A picture with a side past `longest` is scaled down to it first, both sides alike.
    """
    scale, most = min(1.0, longest / max(size)), longest // multiple
    width, height = (min(max(int(side * scale / multiple + 0.5), 1), most) * multiple for side in size)
    return width, height


def first_pass_size(width: int, height: int, hires: float) -> tuple[int, int]:
    """The size of the first of two passes: each side divided by `hires`, at the nearest multiple."""
    return nearest_side(width / hires), nearest_side(height / hires)


def nearest_side(side: float) -> int:
    """The nearest side in pixels that can be rendered, whatever the largest one is."""
    return max(1, round(side / SIZE_MULTIPLE)) * SIZE_MULTIPLE


def content_hash(image: Image.Image) -> str:
    """Sixteen hex digits of SHA-256 over mode, size and pixels: the same for one picture in any lossless file.

    For what `open_image` and `open_mask` return: the pixels of a palette image do not tell its colours.
    """
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:16]


def _on_ground(source: Given, ground: str) -> Image.Image:
    """The picture on a ground of one colour, as "RGB". It carries no metadata: it was turned upright by them."""
    name, image = decoded(source)
    image = eight_bits(image, name)
    flat = _over(image, ground) if image.has_transparency_data else image.convert("RGB")
    flat.info = {}
    return flat


def _over(image: Image.Image, ground: str) -> Image.Image:
    """A picture with transparency on a ground, strip by strip, so that the large ones do not take five times theirs."""
    flat = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        box = (0, top, image.width, min(top + STRIP, image.height))
        layer = image.crop(box).convert("RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer).convert("RGB"), box)
    return flat


def eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Modes with more than 8 bits, which Pillow would clip at 255, as "L"; 16-bit values are rounded to 8 bits."""
    if image.mode == "LAB":
        raise RequestError(f"{name} has LAB colours, which are not read; save it with RGB colours")
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise RequestError(f"{name} has 32-bit pixels, whose range is unknown; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
