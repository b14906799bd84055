"""Pictures ↔ files that carry every setting of their render.

The settings stand as JSON under `zimage` and, for other tools, as the `parameters` line that AUTOMATIC1111's web UI
introduced. PNG keeps both in text chunks, JPEG and WebP the JSON in EXIF.
"""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from zimage.errors import RequestError
from zimage.formats.atomic import beside, destination, take
from zimage.settings.fields import Plain

METADATA_KEY = "zimage"
EXIF_DESCRIPTION = 0x010E
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LONGEST_SIDE = {"WEBP": 16_383}  # px that a format can hold, where a picture may have more


def file_format(path: Path) -> str:
    """What Pillow calls the format of a name's ending; raises RequestError."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise RequestError(f"output {path.name!r} should end in one of {', '.join(FORMATS)}") from None


def save(image: Image.Image, path: Path, metadata: Mapping[str, Plain], replace: bool) -> Path:
    """Write `image` whole or not at all, and return where: with `replace` false a taken name gets a number.

    A symbolic link that is replaced stays: the file behind it is. Raises OSError, RequestError where something else
    than a file has the name, and ValueError where the format cannot hold the picture.
    """
    kind, real = file_format(path), destination(path) if replace else path
    with beside(real) as temporary:
        with temporary.open("xb") as stream:
            image.save(stream, kind, **_save_options(kind, metadata))
        if replace:
            os.replace(temporary, real)
            return path
        return _publish(temporary, path)


def check_savable(path: Path, metadata: Mapping[str, Plain]) -> None:
    """Raise RequestError where the format of a name could not hold a picture with these settings."""
    kind, request = file_format(path), metadata["request"]
    side, longest = max(request["width"], request["height"]), LONGEST_SIDE.get(kind)
    if longest is not None and side > longest:
        raise RequestError(f"output {path.name!r}: a side of {side} px does not fit into {kind}; use .png")
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind, **_save_options(kind, metadata))
    except (OSError, ValueError) as error:
        raise RequestError(f"output {path.name!r}: {kind} cannot hold the settings ({error}); use .png") from error


def read_metadata(path: Path) -> dict[str, Plain]:
    """The settings that a saved picture carries; raises RequestError where it is none of ours."""
    try:
        with Image.open(path) as image:
            text = image.info.get(METADATA_KEY) or image.getexif().get(EXIF_DESCRIPTION)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path} cannot be read as a picture: {error}") from error
    try:
        metadata = json.loads(text or "")
        if isinstance(metadata["request"], dict):
            return metadata
    except (TypeError, KeyError, ValueError):
        pass
    raise RequestError(f"{path} carries no settings of a render; pass a picture that this program saved")


def parameters_line(metadata: Mapping[str, Plain]) -> str:
    """The settings in the form other tools read; their CFG scale counts from 1."""
    r = metadata["request"]
    lines = [r["prompt"]]
    if r.get("negative"):
        lines.append(f"Negative prompt: {r['negative']}")
    lines.append(
        f"Steps: {r['steps']}, Sampler: Euler, CFG scale: {r['guidance'] + 1:g}, Seed: {r['seed']}, "
        f"Size: {r['width']}x{r['height']}, Model: {metadata['model']['name']}, "
        f"Model hash: {metadata['model']['fingerprint']}, Shift: {r['shift']:g}, Version: zimage {metadata['version']}"
    )
    return "\n".join(lines)


def _save_options(kind: str, metadata: Mapping[str, Plain]) -> dict[str, Plain]:
    text = json.dumps(metadata, ensure_ascii=False)
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(METADATA_KEY, text)
        chunks.add_text("parameters", parameters_line(metadata))
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = json.dumps(metadata)  # EXIF text is ASCII
    return {"exif": exif, "quality": 95}


def _publish(temporary: Path, path: Path) -> Path:
    """Give the finished file the first free name of path, path-2, path-3 …; two at once never get the same."""
    for number in itertools.count(1):
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        with contextlib.suppress(FileExistsError):
            take(temporary, target)
            return target
    raise AssertionError("unreachable: the count does not end")
