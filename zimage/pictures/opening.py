"""Picture files from outside, opened in one place: listed formats only, told by content, within limits.

Pillow knows some fifty formats. One of them starts another program (EPS), and most are decoders that few have looked
at; people bring the seven that are listed here.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from zimage.errors import CheckpointError, RequestError, ZImageError
from zimage.formats.files import require_file
from zimage.settings.declared import MAX_SIDE

Source = str | os.PathLike[str]
FORMATS = {"PNG": "PNG", "JPEG": "JPEG", "WEBP": "WebP", "AVIF": "AVIF", "BMP": "BMP", "GIF": "GIF", "TIFF": "TIFF"}
LARGEST_FILE = 1 << 30  # bytes; decoders of WebP and AVIF read the whole file
MOST_PIXELS = (1 << 30) // 6  # Pillow's own limit, past which it takes a picture for an attack
EXIF_IFD, ORIENTATION = 0x8769, 0x0112
UPRIGHT = {  # EXIF's orientations and what undoes them; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decoded(source: Source | Image.Image) -> tuple[str, Image.Image]:
    """What errors call a picture, and its first frame, upright, in the mode of its file. Raises RequestError."""
    if isinstance(source, Image.Image):
        with _named_faults("the picture"):
            return "the picture", _upright(source, "the picture")
    with opened(source) as image:
        return os.fspath(source), _upright(image, os.fspath(source))


@contextlib.contextmanager
def opened(path: Source) -> Iterator[Image.Image]:
    """A picture file whose pixels are not read yet. Raises RequestError, also for damage that shows in the block."""
    name = os.fspath(_checked(path))
    with _named_faults(name), _opened(path) as image:
        yield image


@contextlib.contextmanager
def opened_bytes(name: str, data: bytes) -> Iterator[Image.Image]:
    """The same for the bytes of a file that came in the field `name`, which errors name."""
    try:
        with _named_faults(name), _opened(io.BytesIO(data)) as image:
            yield image
    except RequestError as error:
        raise RequestError(str(error), fields=error.fields or (name,)) from error


def exif_tags(image: Image.Image) -> dict[int, Any]:
    """EXIF's tags in one table; empty where they are damaged, as in other programs: the pixels may be sound."""
    try:
        exif = image.getexif()
        return {**exif, **exif.get_ifd(EXIF_IFD)}
    except Exception:  # on damaged EXIF Pillow's reader raises nearly anything
        return {}


@contextlib.contextmanager
def _named_faults(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into a RequestError that names the picture."""
    try:
        yield
    except ZImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{name} is too large: it has more than {MOST_PIXELS:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        *others, last = FORMATS.values()
        kinds = f"{', '.join(others)} or {last}"
        raise RequestError(f"{name} cannot be read as a picture: it is not an intact {kinds} file") from error
    except MemoryError as error:
        raise RequestError(f"{name} takes more memory than there is; scale it down") from error
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        fault = "it is damaged, cut short, or written in a way that is not supported; save it anew as PNG"
        raise RequestError(f"{name} cannot be read as a picture: {fault}") from error


@contextlib.contextmanager
def _opened(path: Source | BinaryIO) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        # Pillow warns of damage that it can pass over, with its own files' paths, and of sizes that are allowed here.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with Image.open(path, formats=_formats()) as image:
            yield image


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # Pillow had no AVIF before 11.3


def _upright(image: Image.Image, name: str) -> Image.Image:
    if not 1 <= min(image.size) <= max(image.size) <= MAX_SIDE:
        raise RequestError(f"{name} is {image.width} × {image.height} px; each side must be 1 to {MAX_SIDE} px")
    if image.width * image.height > MOST_PIXELS:
        raise RequestError(f"{name} is too large: it has more than {MOST_PIXELS:,} pixels")
    image.load()
    noted = exif_tags(image).get(ORIENTATION)
    method = UPRIGHT.get(noted) if isinstance(noted, int) else None
    return image if method is None else image.transpose(method)


def _checked(source: Source) -> Source:
    """The path of a regular file of a size that is read. Raises RequestError."""
    try:
        size = require_file(Path(source))
    except TypeError:
        raise RequestError(f"a picture should be a path or a PIL image, not {type(source).__name__}") from None
    except CheckpointError as error:
        raise RequestError(f"{error}; pass the path of a picture") from error
    if size > LARGEST_FILE:
        raise RequestError(f"{os.fspath(source)} has {size:,} bytes; pictures of at most {LARGEST_FILE:,} are read")
    return source
