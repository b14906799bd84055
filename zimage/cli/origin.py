"""Settings that a picture carries, and what has changed since it was rendered."""

from pathlib import Path
from typing import TypeAlias

from zimage.cli import terminal
from zimage.errors import RequestError
from zimage.settings.declared import Request
from zimage.settings.fields import Plain, fields
from zimage.text.chat import PARTS

Record: TypeAlias = dict[str, Plain]  # what a saved picture carries, or a render's state
FILES = [field.name for field, _ in fields(Request) if field.metadata["attachment"]]
FACTS = ("model", "dtype", "precision", "lora", "attention", "compile", "device", "version", "torch")


def read_origin(source: Path | None, given: dict[str, Plain]) -> Record:
    """The metadata of a picture, or nothing. Its request holds no files: they are given again, beside it."""
    if source is None:
        return {}
    from zimage.pictures.files import read_metadata

    origin = read_metadata(source)
    if foreign := [name for name in origin["request"] if name not in Request.names()]:
        raise RequestError(f"{source} sets {foreign[0]!r}, which is not a setting of a picture; remove it there")
    for name in FILES:
        before = origin["request"].get(name)
        if before and given.get(name) is None:
            raise RequestError(f"{source} was made from the {name} {plain(before)}; pass it with --{name}")
    left_out = FILES if given.get("template") is None else [*FILES, *PARTS, "force_think_block"]
    request = {name: value for name, value in origin["request"].items() if name not in left_out and value is not None}
    return {**origin, "request": request, "files": {name: origin["request"].get(name) for name in FILES}}


def warn_of_differences(origin: Record, now: Record) -> None:
    """The same pixels need the same model, files, dtype, device and versions."""
    then = {name: origin.get(name) for name in FACTS} | origin.get("files", {})
    current = now | {name: now["request"][name] for name in FILES}
    for name, before in then.items():
        if before is not None and _identity(before) != _identity(current[name]):
            terminal.note(f"warning: {name} was {plain(before)}, now {plain(current[name])}: pixels may differ")
    if origin.get("request", {}).get("batch_size", 1) > 1:
        terminal.note("warning: the picture was rendered in a batch, which affects its bits: pixels may differ")


def plain(value: Plain) -> str:
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def _identity(value: Plain) -> Plain:
    """What a file is does not depend on its name."""
    return value["hash"] if isinstance(value, dict) and "hash" in value else value
