"""What a client asks for, whatever the form: split into what the pipeline is told, within the limits of the server.

    values of a body, files that came with it ─→ Asked: request | rewrite | lora | attachments

A request names no paths and no servers. LoRAs and templates go by their names, pictures and embeddings come as bytes,
and where prompts are sent to be rewritten stands in the settings of the server alone.
"""

import base64
import binascii
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from zimage.errors import SHOWN, RequestError, one_line, quoted
from zimage.serve.conditions import Piece, pieces
from zimage.serve.shelf import LONGEST_NAME, check_name
from zimage.settings.conditions import Condition, Control, Reference
from zimage.settings.declared import MASK_ALPHA, Request
from zimage.settings.fields import Plain, as_plain, check_text, fields, nearest
from zimage.settings.loading import split_scale
from zimage.settings.rewriting import RewriteSettings
from zimage.settings.serving import ServeSettings

ATTACHMENTS = tuple(f.name for f, _ in fields(Request) if f.metadata["attachment"])
CONDITIONS: dict[str, type[Condition]] = {
    f.name: f.metadata["condition"] for f, _ in fields(Request) if f.metadata["condition"]
}
REQUEST = tuple(name for name in Request.names() if name not in (*ATTACHMENTS, *CONDITIONS))
OPERATORS = ("rewriter_url", "rewriter_model", "rewriter_timeout")  # a request that sets these sends prompts elsewhere
REWRITE = tuple(name for name in RewriteSettings.names() if name not in OPERATORS)
LORA, CONTROL, REFERENCE, MASK, WRITTEN = "lora", Control.FIELD, Reference.FIELD, "mask", "max_tokens"
NAMES = (*REQUEST, *ATTACHMENTS, *CONDITIONS, *REWRITE, LORA)
Files = Mapping[str, Sequence[bytes]]  # by the field that they came in; only a condition's list has more than one
MOST_LORAS = 32
DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """One request, as a form translates it.

    `values` are fields of Request without attachments (but for a mask that lies in its image), `rewrite` fields of
    RewriteSettings, all checked one by one. What is absent or null is open, and the server's defaults are laid under
    it; prompts are rewritten where `rewriter` is set then.
    `lora` are NAME or NAME:SCALE, `attachments` the bytes of "image", "mask" and "embeddings", `conditions` the
    pictures of "reference" and "control" with what belongs to each.
    """

    values: Mapping[str, Plain]
    rewrite: Mapping[str, Plain] = field(default_factory=dict)
    lora: Sequence[str] = ()
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    conditions: Mapping[str, Sequence[Piece]] = field(default_factory=dict)
    form: str = "own"


def asked(values: Mapping[str, Plain], files: Files, form: str, limits: ServeSettings) -> Asked:
    """What these values ask for. Raises RequestError with the fields at fault.

    Attachments stand among the values in base64 or as data URLs, or come beside them as files.
    """
    for name in values:
        _check_name(name)
    inline = {name: values[name] for name in ATTACHMENTS if values.get(name) is not None}
    for name in inline.keys() & files.keys():
        raise RequestError(f"{name}: it is in the body and comes as a file too; pass only one of them", fields=(name,))
    request = {name: as_plain(Request.check_one(name, values[name])) for name in REQUEST if name in values}
    rewrite = {name: RewriteSettings.check_one(name, values[name]) for name in REWRITE if name in values}
    request, rewrite = _without_open(request), _without_open(rewrite)
    check_limits({**request, **rewrite}, limits)
    single = {name: files[name][0] for name in ATTACHMENTS if name in files}
    if inline.get(MASK) == MASK_ALPHA:  # it lies in the image
        request[MASK] = inline.pop(MASK)
    single |= {name: from_base64(name, text) for name, text in inline.items()}
    return Asked(request, rewrite, lora_names(values.get(LORA)), single, _conditions(values, files, limits), form)


@contextmanager
def named_as(instead: Mapping[str, str], given: Collection[str]) -> Iterator[None]:
    """Errors on what a client has set under its own name go by that name: ours → theirs, where theirs was `given`."""
    try:
        yield
    except RequestError as error:
        named = [instead[name] if instead.get(name) in given else name for name in error.fields]
        is_said = named == list(error.fields) or str(error).startswith(f"{named[0]}:")
        text = str(error) if is_said else f"{named[0]}: {error}"
        raise RequestError(text, fields=dict.fromkeys(named)) from error


def check_limits(values: Mapping[str, Plain], limits: ServeSettings) -> None:
    """Raise RequestError for more than the server draws in one job. Values that are still open pass."""
    width, height = values.get("width"), values.get("height")
    if (width or 1) * (height or 1) > limits.max_pixels:
        sides = {"width": width, "height": height}
        text = f"a picture of {' × '.join(str(side) for side in sides.values() if side)} px is too large"
        named = [name for name, side in sides.items() if side]
        raise RequestError(f"{' and '.join(named)}: {text}; the limit is {limits.max_pixels:,} pixels", fields=named)
    levels = values.get("sigmas")
    steps = levels.count(",") if levels else values.get("steps") or 0
    if steps > limits.max_steps:
        told, name = ("sigmas: the number of steps,", "sigmas") if levels else ("steps", "steps")
        raise RequestError(f"{told} {steps} is too large; this server takes at most {limits.max_steps}", fields=(name,))
    if (values.get(WRITTEN) or 0) > limits.max_prompt_tokens:
        text = f"{WRITTEN} {values[WRITTEN]} is too large; this server writes at most {limits.max_prompt_tokens}"
        raise RequestError(text, fields=(WRITTEN,))
    prompt, images = values.get("prompt", ""), values.get("images", 1)
    count = images * (len(prompt) if isinstance(prompt, list) else 1)
    if count > limits.max_images:
        named = ["images"] if images > 1 else ["prompt"]
        text = f"{count} pictures are too many; this server draws at most {limits.max_images} in one job"
        raise RequestError(f"{named[0]}: {text}", fields=named)


def check_canvas(size: Sequence[int], limits: ServeSettings) -> None:
    """Raise RequestError where a picture that comes out, (width, height), has more pixels than one that comes in may.

    Only one that is extended can: what is rendered of it may be small.
    """
    if size[0] * size[1] > (most := max(limits.max_decoded, limits.max_pixels)):
        told = f"the picture would be {size[0]} × {size[1]} px"
        raise RequestError(f"extend: {told}; at most {most:,} pixels are drawn on", fields=("extend",))


def check_tokens(count: int, name: str, limits: ServeSettings) -> None:
    """Raise RequestError for the longest prompt, or embeddings, of more tokens than the server takes.

    The time of a step grows with their square.
    """
    if count > limits.max_prompt_tokens:
        raise RequestError(
            f"{name}: it has {count:,} tokens; this server takes at most {limits.max_prompt_tokens:,}", fields=(name,)
        )


def lora_names(value: Plain) -> tuple[str, ...]:
    """NAME or NAME:SCALE, or a list of these, as they are. Raises RequestError for anything else, also for paths."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"lora {quoted(value)} should be a list of NAME or NAME:SCALE", fields=(LORA,))
    if len(texts) > MOST_LORAS:
        raise RequestError(f"lora: {len(texts)} are too many; at most {MOST_LORAS} can be used", fields=(LORA,))
    for text in texts:
        check_text(LORA, text, LONGEST_NAME)
        check_name(LORA, split_scale(text)[0], "NAME or NAME:SCALE")
    return tuple(texts)


def from_base64(name: str, text: Plain) -> bytes:
    """The bytes that base64 or a data URL holds. Raises RequestError."""
    wrong = f"{name}: it should be a file in base64 or a data URL; paths and addresses are not read"
    if not isinstance(text, str) or not text.isascii():
        raise RequestError(wrong, fields=(name,))
    start = found.end() if (found := DATA_URL.match(text)) else 0
    try:
        content = base64.b64decode("".join(text[start:].split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(wrong, fields=(name,)) from None
    if not content:
        raise RequestError(f"{name}: it is empty; pass a file, or leave it out", fields=(name,))
    return content


def _conditions(values: Mapping[str, Plain], files: Files, limits: ServeSettings) -> dict[str, tuple[Piece, ...]]:
    """Those that hold anything. Their pictures are looked at when they are kept, their models when they are found."""
    found = {}
    for name, kind in CONDITIONS.items():
        some = pieces(kind, values.get(name), files.get(name, ()), limits.max_conditions, from_base64)
        if some:
            found[name] = some
    return found


def _without_open(values: Mapping[str, Plain]) -> dict[str, Plain]:
    return {name: value for name, value in values.items() if value is not None}


def unknown(name: str, known: Iterable[str]) -> RequestError:
    """The error on a name that is none of these; of a long one it repeats the ends."""
    return RequestError(f"there is no setting {quoted(name)}; {nearest(name, known)}", fields=(one_line(name, SHOWN),))


def _check_name(name: str) -> None:
    if name in OPERATORS:
        raise RequestError(f"{name}: only the server's own settings can set it; leave it out", fields=(name,))
    if name not in NAMES:
        raise unknown(name, NAMES)
