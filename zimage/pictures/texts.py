"""The texts that a picture file carries beside its pixels, in PNG's text chunks or in EXIF."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from zimage.errors import RequestError
from zimage.pictures.opening import exif_tags, opened

METADATA_KEY = "zimage"
PARAMETERS_KEY = "parameters"
GRAPH_KEY = "prompt"
EXIF_DESCRIPTION, EXIF_MAKE, EXIF_MODEL = 0x010E, 0x010F, 0x0110
EXIF_COMMENT = 0x9286
UNICODE = b"UNICODE\0"  # before a comment in UTF-16; the byte order is not agreed upon
LONGEST = 512 << 10  # characters; our own settings have some thousand
LONGEST_GRAPH = 4 << 20  # ComfyUI's graphs: up to one million
LIMITS = {METADATA_KEY: LONGEST, PARAMETERS_KEY: LONGEST, GRAPH_KEY: LONGEST_GRAPH}


@dataclass(frozen=True)
class Texts:
    """What a picture says of its making; empty where it says nothing.

    `settings`: our own, as JSON. `parameters`: the text that AUTOMATIC1111's web UI introduced. `graph`: the nodes that
    ComfyUI ran, as JSON.
    """

    settings: str = ""
    parameters: str = ""
    graph: str = ""


def read_texts(path: Path) -> Texts:
    """The texts of a picture file. Raises RequestError where it is none, or where a text is too long."""
    with opened(path) as image:
        return picture_texts(image, str(path))


def picture_texts(image: Image.Image, name: str) -> Texts:
    """The same of an open picture, which errors call `name`."""
    found = _texts(_in_chunks(image)) or _texts(_in_exif(image))
    found = found or _texts(_in_chunks(image))  # looking for EXIF has read the chunks behind the pixels
    for key, text in found.items():
        if len(text) > (most := LIMITS[key]):
            raise RequestError(f"{name}: its text {key!r} has {len(text):,} characters; at most {most:,} are read")
    return Texts(*(found.get(key, "") for key in LIMITS))


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {key: text.strip("\0 \n") for key, text in values.items() if isinstance(text, str) and text.strip("\0 \n")}


def comment_bytes(text: str) -> bytes:
    """A text as EXIF's comment holds it."""
    return UNICODE + text.encode("utf-16-be", "surrogatepass")


def _in_chunks(image: Image.Image) -> dict[str, object]:
    """PNG's text chunks, as far as they are read yet."""
    return {key: image.info.get(key) for key in LIMITS}


def _in_exif(image: Image.Image) -> dict[str, object]:
    tags = exif_tags(image)
    found: dict[str, object] = {PARAMETERS_KEY: _comment(tags.get(EXIF_COMMENT))}
    description = tags.get(EXIF_DESCRIPTION)
    if isinstance(description, str) and description.lstrip().startswith("{"):
        found[METADATA_KEY] = description
    for tag in (EXIF_MAKE, EXIF_MODEL):  # ComfyUI's WebP files have `prompt:` and the graph in one of them
        name, _, text = str(tags.get(tag, "")).partition(":")
        if name.lower() == GRAPH_KEY:
            found[GRAPH_KEY] = text
    return found


def _comment(value: object) -> str:
    """EXIF's comment: eight bytes that name the characters' code, then the text."""
    if isinstance(value, str):  # written as plain text, against the standard
        return value.rstrip("\0")
    if not isinstance(value, bytes):
        return ""
    value = value[: 4 * LONGEST + len(UNICODE) + 2]  # more is refused anyhow, whatever its code
    if not value.startswith(UNICODE):
        return value.removeprefix(b"ASCII\0\0\0").strip(b"\0").decode("utf-8", "replace")
    body = value[len(UNICODE) :]
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):
        return body.decode("utf-16", "replace")
    big, little = (body.decode(f"utf-16-{order}", "replace") for order in ("be", "le"))
    return little if _latin(little) > _latin(big) else big


def _latin(text: str) -> int:
    """Characters of ASCII: read in the wrong order of bytes, `Steps:` has none."""
    return sum(map(str.isascii, text))
