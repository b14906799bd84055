"""The `parameters` text of AUTOMATIC1111's web UI, which most other programs read and many write.

    a cat <lora:style:0.8>
    Negative prompt: dogs
    Steps: 8, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Seed: 7, Size: 1024x1024, Model: name, Version: …

Prompts take as many lines as they have; the last line holds names and values, and a value with a comma, colon or line
break stands in quotes, as JSON writes them. CFG counts from 1, and with two passes `Size` is the first one's.

The form has no escape for prompts: a line that begins with "Negative prompt:" would begin the negative one, and some
readers take the first line with "Steps:" for the last. There an invisible space is written before the colon, which our
reader removes. It does not keep blanks at the ends of lines, and a `<lora:…>` that stands in a prompt as plain words.
"""

import json
import re
from collections.abc import Mapping

from zimage.errors import CheckpointError
from zimage.formats.json_text import json_value
from zimage.pictures.foreign import CFG, MOST_HIRES, Found
from zimage.pictures.image import first_pass_size
from zimage.settings.fields import Plain
from zimage.settings.names import SAMPLER_NAMES, SCHEDULE_NAMES

NEGATIVE = "Negative prompt:"
INVISIBLE = "\u200b"  # zero width space
ESCAPED = re.compile(r"(Negative prompt|^[^\S\n]*Steps)(?=:)", re.MULTILINE)
UNESCAPED = re.compile(rf"(Negative prompt|Steps){INVISIBLE}(?=:)")
ITEM = re.compile(r'(?:^|,)\s*(\w[\w /-]*):\s*("(?:\\.|[^"\\])*"(?=\s*(?:,|$))|[^,]*)')
KNOWN = {"Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "Model hash"}
LORA = re.compile(r" ?<lora:([^<>:]+)(?::([^<>]*))?>")
SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
NUMBERS: dict[str, tuple[str, type]] = {
    "steps": ("Steps", int),
    "seed": ("Seed", int),
    "shift": ("Shift", float),
    "strength": ("Denoising strength", float),
    "hires": ("Hires upscale", float),
    CFG: ("CFG scale", float),
}


def parameters_text(metadata: Mapping[str, Plain]) -> str:
    """The settings of one of our pictures in this form."""
    r, loras = metadata["request"], metadata.get("lora") or []
    tags = [f"<lora:{_lora_name(lora)}:{_number_text(lora['scale'])}>" for lora in loras]
    lines = [" ".join(filter(None, [_escape(r["prompt"]), *tags]))]
    if r.get("negative"):
        lines.append(f"{NEGATIVE} {_escape(r['negative'])}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in _items(metadata, loras).items()))
    return "\n".join(lines)


def parse_parameters(text: str) -> Found | None:
    """What such a text tells, or None where it has no line of settings."""
    lines = text.replace("\r\n", "\n").strip().split("\n")
    found = next(((i, items) for i in reversed(range(len(lines))) if (items := _settings(lines[i]))), None)
    if found is None:
        return None
    end, items = found
    prompt, negative = _prompts(lines[:end])
    loras = tuple(f"{name}:{scale or 1}" for name, scale in LORA.findall(prompt + negative))
    values = {"prompt": _plain(prompt), "negative": _plain(negative), **_values(items)}
    by_picture = "strength" in values and "hires" not in values
    return Found("`parameters`", values, items.get("Sampler", ""), items.get("Schedule type", ""), loras, by_picture)


def _items(metadata: Mapping[str, Plain], loras: list[Plain]) -> dict[str, str]:
    r, hires = metadata["request"], metadata["request"].get("hires")
    first = first_pass_size(r["width"], r["height"], hires) if hires else (r["width"], r["height"])
    items = {
        "Steps": str(r["steps"]),
        **sampling_items(r),
        "CFG scale": _number_text(r["guidance"] + 1),
        "Seed": str(r["seed"]),
        "Size": f"{first[0]}x{first[1]}",
        "Model": metadata["model"]["name"],
        "Model hash": metadata["model"]["fingerprint"],
    }
    if r.get("strength") is not None:
        items["Denoising strength"] = _number_text(r["strength"])
    if hires:
        items |= {"Hires upscale": _number_text(hires), "Hires steps": str(r["steps"]), "Hires upscaler": "Lanczos"}
        if (first[0] * hires, first[1] * hires) != (r["width"], r["height"]):
            items["Hires resize"] = f"{r['width']}x{r['height']}"
    if loras:
        items["Lora hashes"] = ", ".join(f"{_lora_name(lora)}: {lora['hash']}" for lora in loras)
    levels = {"Sigmas": r["sigmas"]} if r.get("sigmas") else {"Shift": _number_text(r["shift"])}
    return {**items, **levels, "Version": f"zimage {metadata['version']}"}


def sampling_items(request: Mapping[str, Plain]) -> dict[str, str]:
    """The sampler and the schedule as the web UI calls them; older records have neither, exact levels no schedule."""
    schedule = "" if request.get("sigmas") else SCHEDULE_NAMES[request.get("schedule") or "simple"].label
    sampler = SAMPLER_NAMES[request.get("sampler") or "euler"].label
    return {"Sampler": sampler, **({"Schedule type": schedule} if schedule else {})}


def _number_text(number: float) -> str:
    return f"{number:.10g}"


def _lora_name(lora: Mapping[str, Plain]) -> str:
    """A file's name as this form has it: without its ending, and without the signs that end a name there."""
    return re.sub(r"[:,<>\n]", "", lora["name"].removesuffix(".safetensors"))


def _quoted(value: str) -> str:
    needs_it = any(sign in value for sign in ",:\n") or value.startswith('"')
    return json.dumps(value, ensure_ascii=False) if needs_it else value


def _unquoted(value: str) -> str:
    if len(value) < 2 or not (value[0] == value[-1] == '"'):
        return value.strip()
    try:
        return str(json_value("a value", value))
    except CheckpointError:
        return value


def _escape(prompt: str) -> str:
    return ESCAPED.sub(rf"\1{INVISIBLE}", prompt)


def _plain(prompt: str) -> str:
    """A prompt without what this form adds to it."""
    return UNESCAPED.sub(r"\1", LORA.sub("", prompt)).strip()


def _settings(line: str) -> dict[str, str]:
    """The names and values of a line of settings: three at least, as the web UI wants it, one of them a known one."""
    items: dict[str, str] = {}
    for name, value in ITEM.findall(line):
        items.setdefault(name, _unquoted(value))
    return items if len(items) >= 3 and items.keys() & KNOWN else {}


def _prompts(lines: list[str]) -> tuple[str, str]:
    lines = [line.strip() for line in lines]
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = [line.removeprefix(NEGATIVE).strip() for line in lines[start:]]
    return "\n".join(lines[:start]), "\n".join(negative)


def _values(items: Mapping[str, str]) -> dict[str, Plain]:
    """The numbers under our names; what is none is left out."""
    numbers = {ours: _number(items.get(name), kind) for ours, (name, kind) in NUMBERS.items()}
    values = {ours: number for ours, number in numbers.items() if number is not None}
    if size := SIZE.fullmatch(items.get("Size", "")):
        values |= _whole_size(int(size[1]), int(size[2]), values.get("hires"), items)
    return values


def _whole_size(width: int, height: int, hires: float | None, items: Mapping[str, str]) -> dict[str, Plain]:
    """The size of the last pass, and the factor between the two, where there are two."""
    resized = SIZE.fullmatch(items.get("Hires resize", ""))
    if resized and width and height:
        sides = int(resized[1]), int(resized[2])
        return {"width": sides[0], "height": sides[1], "hires": hires or sides[0] / width}
    if hires is None or not 1 < hires <= MOST_HIRES:
        return {"width": width, "height": height}
    return {"width": round(width * hires), "height": round(height * hires)}


def _number(text: str | None, kind: type) -> Plain:
    try:
        return None if text is None else kind(text)
    except ValueError:  # not a number, or one of thousands of digits
        return None
