"""A request in the form of OpenAI's images API, translated: its own fields, and every field of ours beside them.

n → images, size → width × height, quality "low" → half the steps; a mask's transparent areas → white ones
"""

import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageOps

from zimage.errors import RequestError, quoted
from zimage.pictures.files import check_holds
from zimage.pictures.opening import opened_bytes
from zimage.serve.asking import NAMES, REFERENCE, Asked, Files, unknown
from zimage.serve.refusals import NotFound
from zimage.serve.schema import EXAMPLE, FILE, PROMPT, Schema, own_fields, whole
from zimage.serve.uploads import check_pixels
from zimage.settings.declared import Request
from zimage.settings.fields import Plain, Settings, check_fields, fields, json_schema, setting
from zimage.settings.rewriting import RewriteSettings
from zimage.settings.serving import ServeSettings

GENERATION, EDIT = "image_generation", "image_edit"  # what a stream's events begin with
QUALITIES = ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")
FORMATS = ("png", "webp", "jpeg", "avif")
SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
OWN_NAME = "zimage"
# Clients that cannot be told another model send one of these by themselves; nobody takes us for them.
USUAL_NAMES = re.compile(r"(?:chatgpt-image|gpt-image|dall-e)-[0-9a-z.-]{1,40}")
OPAQUE = 128  # the first of 256 levels at which a mask's pixel stays
INSTEAD = {"images": "n", "width": "size", "height": "size"}  # how the API calls what we call otherwise


@dataclass(frozen=True)
class Standard(Settings):
    """The fields of the API itself, beside `prompt` and the files. Raises RequestError."""

    model: str = setting(
        "",
        "The loaded model's name, or the name of one of OpenAI's image models; no other is found.",
        longest=255,
    )
    n: int = setting(1, "Number of pictures.", minimum=1, maximum=10)
    size: str = setting(
        "auto", "WIDTHxHEIGHT, both multiples of 16; auto: the picture's to start from, else the model's.", longest=20
    )
    quality: str = setting("auto", "low: half of the usual steps; everything else: all of them.", choices=QUALITIES)
    response_format: str = setting(
        "b64_json", "The picture itself, or a link to it on this server.", choices=("b64_json", "url")
    )
    output_format: str = setting("png", "Format of the pictures.", choices=FORMATS)
    output_compression: int = setting(
        95, "Quality of webp, jpeg and avif: 100 is the best and largest.", minimum=0, maximum=100
    )
    background: str = setting("auto", "Pictures are opaque.", choices=("auto", "opaque"))
    stream: bool = setting(False, "Answer with server-sent events.")
    partial_images: int = setting(0, "Previews of each picture while it is drawn; for a stream.", minimum=0, maximum=3)
    moderation: str = setting("auto", "Accepted; nothing is moderated here.", choices=("auto", "low"))
    style: str | None = setting(None, "Accepted; the prompt says the style here.", choices=("vivid", "natural"))
    input_fidelity: str | None = setting(None, "Accepted; set `strength` here.", choices=("high", "low"))
    complexity: str | None = setting(None, "Accepted; nothing is planned here.", choices=("low", "medium", "high"))
    user: str | None = setting(None, "Accepted and not kept.", longest=1000)
    safety_identifier: str | None = setting(None, "Accepted and not kept.", longest=1000)

    def __post_init__(self):
        check_fields(self)
        if self.size != "auto" and not SIZE.fullmatch(self.size):
            raise RequestError(f"size {quoted(self.size)} should be auto or WIDTHxHEIGHT", fields=("size",))
        if self.partial_images and not self.stream:
            text = "partial_images: previews come in a stream; pass stream too, or leave them out"
            raise RequestError(text, fields=("partial_images", "stream"))
        if self.response_format == "url" and self.output_format != "png":
            text = "output_format: links lead to PNG files; pass png, or response_format b64_json"
            raise RequestError(text, fields=("output_format", "response_format"))
        if self.response_format == "url" and self.stream:
            text = "response_format: a stream carries the pictures themselves; pass b64_json"
            raise RequestError(text, fields=("response_format", "stream"))

    @property
    def is_low(self) -> bool:
        return self.quality == "low"


def bodies(settings: ServeSettings) -> dict[str, Schema]:
    """What the two requests hold, by title: the API's fields and ours."""
    standard, own = json_schema(Standard)["properties"], own_fields(settings)
    fields = {"prompt": PROMPT, **standard, **{name: own[name] for name in own.keys() - {"prompt"}}}
    pictures = "Picture to start from. Of several, with a mask or `strength` the first; others are references."
    files = {"image": {"type": ["array", "string"], "items": FILE, "description": pictures}}
    files["mask"] = {**FILE, "description": "PNG of the image's size: transparent areas are repainted."}
    generation = whole("OpenAIGeneration", fields, ("prompt",), {**EXAMPLE, "n": 1, "quality": "high"})
    return {"OpenAIGeneration": generation, "OpenAIEdit": whole("OpenAIEdit", {**fields, **files}, ("prompt", "image"))}


@dataclass
class Wanted:
    """A request, translated: what to draw, and how to answer."""

    standard: Standard
    asked: Asked
    kind: str = GENERATION
    tokens: int = 0
    names: set[str] = field(default_factory=set)


KNOWN = dict.fromkeys((*Standard.names(), *NAMES))


class ModelNotFound(NotFound):
    """A model that is not the loaded one."""


KINDS = {field.name: types for one in (Standard, Request, RewriteSettings) for field, types in fields(one)}


def translated(values: Mapping[str, Plain], usual_steps: int) -> tuple[Standard, dict[str, Plain]]:
    """The API's own fields, and what the rest asks for in ours. Null is what was left out. Raises RequestError."""
    given = {name: value for name, value in values.items() if value is not None}
    for name in given.keys() - KNOWN:
        raise unknown(name, KNOWN)
    _check_prompt(given)
    standard = Standard.from_mapping({name: value for name, value in given.items() if name in Standard.names()})
    request = {name: value for name, value in given.items() if name not in Standard.names()}
    for ours, value in _renamed(standard, given).items():
        if ours in request:
            theirs = INSTEAD[ours]
            raise RequestError(f"{theirs}: {ours} is set too; pass only one of them", fields=(theirs, ours))
        request[ours] = value
    check_format(standard.output_format, request.get("width"), request.get("height"))
    if standard.is_low and "sigmas" not in request:
        request.setdefault("steps", max(1, usual_steps // 2))
    return standard, request


def check_format(format: str, width: Plain, height: Plain) -> None:
    """Raise RequestError where pictures of this format cannot have these sides; open ones pass."""
    try:
        check_holds(format.upper(), *(side if isinstance(side, int) else 0 for side in (width, height)))
    except RequestError as error:
        raise RequestError(f"output_format: {error}", fields=("output_format",)) from None


def is_known(model: str, loaded: str) -> bool:
    """Whether a client that says this means the loaded model."""
    return model in ("", OWN_NAME, loaded) or USUAL_NAMES.fullmatch(model) is not None


def from_parts(parts: Mapping[str, Sequence[str]]) -> dict[str, Plain]:
    """The values that the texts of a form's parts stand for: NAME once, NAME[] for a list, NAME[KEY] for a table."""
    values: dict[str, Plain] = {}
    for name, texts in parts.items():
        base, bracket, key = name.partition("[")
        kinds = KINDS.get(base, (str,))
        if bracket and key == "]":
            values[base] = [_value(text, kinds) for text in texts]
        elif len(texts) > 1:
            raise RequestError(f"{base}: it comes {len(texts)} times; pass it once", fields=(base,))
        elif bracket:
            table = values.setdefault(base, {})
            if not isinstance(table, dict):
                raise RequestError(f"{base}: it is a list and a table at once; pass one of them", fields=(base,))
            table[key.removesuffix("]")] = _value(texts[0], (float,))
        else:
            values[base] = _value(texts[0], kinds)
    return values


def with_references(values: Mapping[str, Plain], files: Mapping[str, list[bytes]], vision: object) -> Files:
    """Files of an edit of several pictures, as the API means them: with a mask, or a strength of ours, the first is
    redrawn and the others are looked at; else all are looked at, and a new picture is drawn.

    Raises RequestError where there is no `vision` model to look with.
    """
    if not vision:
        text = "image: only one can be used, for this server has no vision model to look at others with; pass one"
        raise RequestError(text, fields=("image",))
    redrawn = 1 if "mask" in files or values.get("strength") is not None else 0
    first, others = files["image"][:redrawn], files["image"][redrawn:]
    rest = {name: some for name, some in files.items() if name not in ("image", REFERENCE)}
    seen = [*others, *files.get(REFERENCE, ())]
    return {**rest, REFERENCE: seen, **({"image": first} if first else {})}


def opaque_mask(data: bytes, picture: bytes, most_pixels: int) -> bytes:
    """A mask whose transparent pixels are to be repainted, as one of ours, where white ones are.

    Raises RequestError where it has none, or is not of the picture's size, and TooLarge.
    """
    with opened_bytes("image", picture) as image:
        size = image.size
    with opened_bytes("mask", data) as mask:
        check_pixels("mask", mask, most_pixels)
        if mask.size != size:
            sizes = f"{mask.width} × {mask.height} px and the image {size[0]} × {size[1]}"
            raise RequestError(f"mask: it has {sizes}; pass one of the same size", fields=("mask", "image"))
        alpha = mask.convert("RGBA").getchannel("A") if mask.has_transparency_data else Image.new("L", size, 255)
    if not any(alpha.histogram()[:OPAQUE]):
        text = "mask: no pixel of it is transparent; make those transparent that are to be repainted"
        raise RequestError(text, fields=("mask",))
    buffer = io.BytesIO()
    ImageOps.invert(alpha).save(buffer, "PNG")
    return buffer.getvalue()


def _check_prompt(given: Mapping[str, Plain]) -> None:
    if "prompt" not in given and "embeddings" not in given:
        raise RequestError("prompt: a value is needed", fields=("prompt",))
    if not isinstance(given.get("prompt", ""), str):
        raise RequestError(f"prompt {quoted(given['prompt'])} should be text", fields=("prompt",))


def _renamed(standard: Standard, given: Collection[str]) -> dict[str, Plain]:
    """What the API calls otherwise, under our names."""
    found: dict[str, Plain] = {"images": standard.n} if "n" in given else {}
    if size := SIZE.fullmatch(standard.size):
        found |= {"width": int(size[1]), "height": int(size[2])}
    return found


def _value(text: str, kinds: Sequence[type]) -> Plain:
    """The value of a kind that a text stands for; another text stays what it is, for its field to refuse."""
    if bool in kinds:
        return {"true": True, "false": False}.get(text.lower(), text)
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text
