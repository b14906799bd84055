"""Tensors ↔ pictures, and pictures as an input: read from any file, brought to a size, told apart by their content.

Shapes: images (B, 3, H, W) fp32 in [−1, 1]; masks (1, 1, H, W) fp32, 1 = repaint, 0 = keep. An input picture is
"RGB", a mask "L". Colour profiles are not applied, and of an animation the first frame is taken.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from zimage.errors import RequestError
from zimage.settings.declared import MAX_SIDE, SIZE_MULTIPLE

if TYPE_CHECKING:
    from torch import Tensor

Given = str | os.PathLike[str] | Image.Image
THRESHOLD = 128  # the first of 256 levels that is at least one half


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

    def natural_size(self) -> tuple[int, int]:
        """(width, height) for a render of its own size, as the function of this name says."""
        return natural_size(self.picture)

    def tensor(self, width: int, height: int) -> "Tensor":
        """An image at this size: (1, 3, H, W) in [−1, 1]."""
        return from_pil(fit(self.picture, width, height))


def to_pil(images: "Tensor") -> list[Image.Image]:
    """(B, 3, H, W) tensor in [−1, 1], rounded to the nearest of 256 levels, or of such levels → PIL images."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte() if images.is_floating_point() else images
    return [Image.fromarray(pixels) for pixels in levels.permute(0, 2, 3, 1).cpu().numpy()]


def from_pil(image: Image.Image) -> "Tensor":
    """A PIL image → (1, 3, H, W) fp32 tensor in [−1, 1], in the reference's order of rounding."""
    import torch

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(2 * pixels - 1).permute(2, 0, 1)[None].contiguous()


def mask_tensor(mask: Image.Image, width: int, height: int) -> "Tensor":
    """A mask → (1, 1, H, W) fp32 of zeros and ones: brought to the size by `fit`, then cut at one half."""
    import torch

    levels = np.asarray(fit(mask.convert("L"), width, height))
    return torch.from_numpy((levels >= THRESHOLD).astype(np.float32))[None, None]


def open_image(source: Given) -> Image.Image:
    """Any picture as "RGB": upright by its EXIF rotation, transparency on white, 16 bits rounded to 8.

    Raises RequestError where there is none, where it is damaged, or where a side is past the limit.
    """
    return _on_ground(source, "white")


def open_mask(source: Given) -> Image.Image:
    """Any picture as a mask "L", white = repaint: its luminance, transparency on black.

    So what is transparent is kept, and white strokes drawn on an empty layer are what is repainted.
    """
    return _on_ground(source, "black").convert("L")


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled by Lanczos until it covers width × height, and cut to its centre there.

    Only what is kept is computed: a long strip needs no giant in between. A picture of that size comes back untouched.
    """
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def natural_size(image: Image.Image, multiple: int = SIZE_MULTIPLE, longest: int = MAX_SIDE) -> tuple[int, int]:
    """(width, height) for a render of a picture's own size: each side at the nearest multiple, at least one.

    A picture with a side past `longest` is scaled down to it first, both sides alike.
    """
    scale, most = min(1.0, longest / max(image.size)), longest // multiple
    width, height = (min(max(int(side * scale / multiple + 0.5), 1), most) * multiple for side in image.size)
    return width, height


def content_hash(image: Image.Image) -> str:
    """Sixteen hex digits of SHA-256 over mode, size and pixels: the same for one picture in any lossless file.

    For what `open_image` and `open_mask` return: the pixels of a palette image do not tell its colours.
    """
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:16]


def _on_ground(source: Given, ground: str) -> Image.Image:
    """The picture, decoded and upright, on a ground of one colour, as "RGB"."""
    name = "the picture" if isinstance(source, Image.Image) else str(_file(source))
    try:
        with contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(name) as image:
            return _flat(image, name, ground)
    except RequestError:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        is_bomb = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
        reason = str(error).partition("\n")[0] or type(error).__name__
        fault = "is too large" if is_bomb else "cannot be read as a picture"
        raise RequestError(f"{name} {fault}: {reason}") from error


def _file(source: str | os.PathLike[str]) -> Path:
    try:
        path = Path(source)
        if path.is_file():
            return path
        fault = "is not a file" if path.exists() else "is missing"
    except TypeError:
        raise RequestError(f"a picture should be a path or a PIL image, not {type(source).__name__}") from None
    except OSError as error:  # a name too long, a folder that may not be entered
        fault = f"cannot be opened: {error.strerror}"
    raise RequestError(f"{source} {fault}; pass the path of a picture")


def _flat(image: Image.Image, name: str, ground: str) -> Image.Image:
    if not 1 <= min(image.size) <= max(image.size) <= MAX_SIDE:
        raise RequestError(f"{name} is {image.width} × {image.height} px; each side must be 1 to {MAX_SIDE} px")
    image = _eight_bits(ImageOps.exif_transpose(image), name)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer).convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Modes with more than 8 bits, which Pillow would clip at 255, as "L"; 16-bit values are rounded to 8 bits."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise RequestError(f"{name} has 32-bit pixels, whose range is unknown; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
