"""Pictures ↔ files that carry every setting of their render.

The settings stand as JSON under `zimage` and, for other tools, as the `parameters` text that AUTOMATIC1111's web UI
introduced. PNG keeps both in text chunks, the other formats in EXIF: the JSON as the description, the text as the
comment.
"""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin, features

from zimage.errors import CheckpointError, RequestError
from zimage.formats.atomic import beside, destination, take
from zimage.formats.json_text import json_object
from zimage.pictures.comfyui import parse_graph
from zimage.pictures.foreign import taken
from zimage.pictures.opening import EXIF_IFD, opened_bytes
from zimage.pictures.parameters import parameters_text, parse_parameters
from zimage.pictures.texts import (
    EXIF_COMMENT,
    EXIF_DESCRIPTION,
    LONGEST,
    METADATA_KEY,
    PARAMETERS_KEY,
    Texts,
    comment_bytes,
    read_texts,
)
from zimage.settings.fields import Plain

LONGEST_JPEG_EXIF = 65_533  # bytes: one segment
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}
QUALITY = 95  # of all but PNG, unless another is wanted
OPTIONS = {"AVIF": {"subsampling": "4:4:4"}}  # a fifth more bytes than with halved colours, and a tenth of the error
LONGEST_SIDE = {"WEBP": 16_383}  # px that a format can hold, where a picture may have more


def file_format(path: Path) -> str:
    """What Pillow calls the format of a name's ending; raises RequestError."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise RequestError(f"output {path.name!r} should end in one of {', '.join(FORMATS)}")
    if not _is_written(kind):
        raise RequestError(f"output {path.name!r}: {_unwritten(kind)}")
    return kind


def save(image: Image.Image | bytes, path: Path, metadata: Mapping[str, Plain], replace: bool) -> Path:
    """Write `image` whole or not at all, and return where: with `replace` false a taken name gets a number.

    The bytes of a PNG that carries its metadata already are kept as they are where the name asks for a PNG.

    A symbolic link that is replaced stays: the file behind it is. Raises OSError, RequestError where something else
    than a file has the name, and ValueError where the format cannot hold the picture.
    """
    kind, real = file_format(path), destination(path) if replace else path
    with beside(real) as temporary:
        with temporary.open("xb") as stream:
            if isinstance(image, bytes) and kind == "PNG":
                stream.write(image)
            else:
                _opened(image).save(stream, kind, **_save_options(kind, metadata, QUALITY))
        if replace:
            os.replace(temporary, real)
            return path
        return _publish(temporary, path)


def encoded(image: Image.Image, kind: str, metadata: Mapping[str, Plain] | None, quality: int = QUALITY) -> bytes:
    """A file of the format that Pillow calls so; without `metadata` it carries none. Raises RequestError."""
    check_holds(kind, *image.size)
    buffer = io.BytesIO()
    bare = {"quality": quality, **OPTIONS.get(kind, {})}
    image.save(buffer, kind, **(bare if metadata is None else _save_options(kind, metadata, quality)))
    return buffer.getvalue()


def check_savable(path: Path, width: int, height: int) -> None:
    """Raise RequestError where the format of a name could not hold a picture of this size."""
    kind = file_format(path)
    try:
        check_holds(kind, width, height)
    except RequestError as error:
        raise error.with_text(f"output {path.name!r}: {error}; use .png") from None


def check_holds(kind: str, width: int, height: int) -> None:
    """Raise RequestError where a format cannot be written here, or cannot hold a picture of this size."""
    if not _is_written(kind):
        raise RequestError(_unwritten(kind))
    longest, side = LONGEST_SIDE.get(kind), max(width, height)
    if longest is not None and side > longest:
        raise RequestError(f"a side of {side} px does not fit into {kind}")


def read_metadata(path: Path) -> dict[str, Plain]:
    """The settings that a saved picture carries; raises RequestError where it is none of ours."""
    record = _own_record(path, read_texts(path))
    if record is None:
        raise RequestError(f"{path} carries no settings of a render; pass a picture that this program saved")
    return record


def read_settings(path: Path) -> tuple[dict[str, Plain], str]:
    """The settings of a picture of ours, or what can be taken from another program's, and then a line on that.

    Raises RequestError where there are none.
    """
    texts = read_texts(path)
    record = _own_record(path, texts)
    if record is not None:
        return record, ""
    found = parse_parameters(texts.parameters) or parse_graph(texts.graph)
    if found is None:
        forms = "this program, AUTOMATIC1111's web UI or ComfyUI"
        raise RequestError(f"{path} carries no settings of a render; pass a picture as it was saved by {forms}")
    request, note = taken(str(path), found)
    return {"request": request}, note


def _is_written(kind: str) -> bool:
    """Whether this Pillow writes a format: those before 11.3 do not know AVIF, and later ones may be built without."""
    return kind != "AVIF" or ("avif" in features.modules and bool(features.check("avif")))


def _unwritten(kind: str) -> str:
    return f"the installed Pillow cannot write {kind}; install Pillow 11.3 or newer from a wheel, or use WebP"


def _opened(image: Image.Image | bytes) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    with opened_bytes("the picture", image) as picture:
        picture.load()
    return picture


def _own_record(path: Path, texts: Texts) -> dict[str, Plain] | None:
    """Our own settings, or None where a picture has none; a damaged text under our own name is an error."""
    if not texts.settings:
        return None
    try:
        record = json_object(f"{path}: its text {METADATA_KEY!r}", texts.settings, LONGEST)
    except CheckpointError as error:
        raise RequestError(f"{error}; pass a picture as it was saved") from error
    return record if isinstance(record.get("request"), dict) else None


def _save_options(kind: str, metadata: Mapping[str, Plain], quality: int) -> dict[str, Plain]:
    text = json.dumps(metadata, ensure_ascii=False)
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(METADATA_KEY, text)
        chunks.add_text(PARAMETERS_KEY, parameters_text(metadata))
        return {"pnginfo": chunks}
    return {"exif": _exif(kind, metadata), "quality": quality, **OPTIONS.get(kind, {})}


def _exif(kind: str, metadata: Mapping[str, Plain]) -> Image.Exif:
    """Both texts as EXIF; in a JPEG, which holds little, our own alone where there is no room for both."""
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = json.dumps(metadata)  # EXIF text is ASCII
    exif[EXIF_IFD] = {EXIF_COMMENT: comment_bytes(parameters_text(metadata))}
    if kind == "JPEG" and len(exif.tobytes()) > LONGEST_JPEG_EXIF:
        del exif[EXIF_IFD]
    return exif


def _publish(temporary: Path, path: Path) -> Path:
    """Give the finished file the first free name of path, path-2, path-3 …; two at once never get the same."""
    for number in itertools.count(1):
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        with contextlib.suppress(FileExistsError):
            take(temporary, target)
            return target
    raise AssertionError("unreachable: the count does not end")
