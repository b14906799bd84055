"""Settings that a picture carries, and what has changed since it was rendered."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from zimage.cli import terminal
from zimage.errors import RequestError, one_line
from zimage.settings.declared import MASK_ALPHA, Request
from zimage.settings.fields import Plain, fields
from zimage.settings.loading import LoadSettings, split_lora
from zimage.settings.merging import Entry
from zimage.settings.profiles import PICTURE, Resolved
from zimage.text.chat import PARTS

Record: TypeAlias = dict[str, Plain]  # what a saved picture carries, or a render's state
FILES = [field.name for field, _ in fields(Request) if field.metadata["attachment"]]
CONDITIONS = {field.name: kind for field, _ in fields(Request) if (kind := field.metadata["condition"])}
FROM_FILES = [*FILES, *CONDITIONS]
FACTS = ("model", "dtype", "precision", "lora", "vision", "attention", "compile", "ranks", "device", "version", "torch")

SINGLE = {"prompt": None, "seed": None, "images": 1}  # of which every picture has one
LONGEST_VALUE = 200  # characters of a value in a message


def read_origin(source: Path | None, given: dict[str, Plain]) -> Record:
    """The metadata of a picture, or nothing. Its request holds no files: they are given again, beside it."""
    if source is None:
        return {}
    from zimage.pictures.files import read_settings

    origin, note = read_settings(source)
    if foreign := [name for name in origin["request"] if name not in Request.names()]:
        raise RequestError(f"{source} sets {foreign[0]!r}, which is not a setting of a picture; remove it there")
    check_values(source, origin["request"])
    for name in FROM_FILES:
        before = origin["request"].get(name)
        if before and not given.get(name) and not _is_alpha(name, before):
            raise RequestError(f"{source} was made from the {name} {plain(before)}; pass it with --{name}")
    left_out = FROM_FILES if given.get("template") is None else [*FROM_FILES, *PARTS, "force_think_block"]
    request = {name: value for name, value in origin["request"].items() if name not in left_out and value is not None}
    files = {name: origin["request"].get(name) for name in FROM_FILES}
    if _is_alpha("mask", files["mask"]) and not given.get("mask"):
        request["mask"] = MASK_ALPHA
    return {**origin, "request": request, "files": files, "note": note}


def _is_alpha(name: str, file: Plain) -> bool:
    """Whether a mask lies in the image that is passed again."""
    return name == "mask" and isinstance(file, dict) and file.get("name") == MASK_ALPHA


def check_values(source: Path | str, request: Record) -> None:
    """Raise RequestError, which names the picture `source`, for a value that a setting does not take."""
    for name, value in request.items():
        try:
            if name in FROM_FILES:
                _check_file(name, value)
            elif value is not None:
                Request.check_one(name, value)
            if name in SINGLE and value is not None and (isinstance(value, list) or SINGLE[name] not in (None, value)):
                raise RequestError(f"{name}: a picture has only one", fields=(name,))
        except RequestError as error:
            raise error.with_text(f"{source}: {error}; it is not as it was saved") from None


def _check_file(name: str, value: Plain) -> None:
    """What a picture says of a file that it was made from: its name, the hash of its content, perhaps numbers."""
    listed = name in CONDITIONS
    if value is None:
        return
    if listed != isinstance(value, list):
        raise RequestError(f"{name} should be {'a list' if listed else 'a name and a hash'}", fields=(name,))
    kinds = str | int | float if listed else str
    for one in value if listed else [value]:
        if not (isinstance(one, dict) and all(isinstance(item, kinds) for item in one.values())):
            raise RequestError(f"{name} should be a name and a hash", fields=(name,))


def with_loras(source: Path | None, origin: Record, given: Mapping[str, Plain], resolved: Resolved) -> Resolved:
    """The settings with the LoRAs that the picture was made with, found by their content, unless options name others.

    They are looked for among the files that the settings name, and in the folder `lora_folder`. Raises RequestError
    where one is not found.
    """
    loras = [] if source is None else _loras_of(source, origin)
    if not loras or given.get("lora"):
        return resolved
    from zimage.loading.loras import find_by_hash

    loading = resolved.of(LoadSettings)
    named = [split_lora(text)[0] for text in loading.get("lora") or []]
    with resolved.naming_sources():
        found = find_by_hash({lora["hash"]: lora["name"] for lora in loras}, named, loading.get("lora_folder"))
    if missing := [lora for lora in loras if lora["hash"] not in found]:
        told = ", ".join(f"{one_line(lora['name'], 80)} (hash {one_line(lora['hash'], 80)})" for lora in missing)
        folder = loading.get("lora_folder")
        absent = f"; it is not in the folder {str(folder)[:80]!r}"
        place = absent if folder else ", or name a folder of LoRAs with --lora-folder"
        text = f"{source} was made with lora {told}: pass it with --lora{place}"
        raise RequestError(text, fields=("lora", "lora_folder"))
    texts = [f"{found[lora['hash']]}:{lora['scale']}" for lora in loras]
    return replace(resolved, entries={**resolved.entries, "lora": Entry(texts, PICTURE)})


def with_lora_names(source: Path | None, origin: Record, given: Mapping[str, Plain], resolved: Resolved) -> Resolved:
    """The same for a server, which finds LoRAs by their names: a settings file names files of this computer."""
    if given.get("lora"):
        return resolved
    entries = {name: entry for name, entry in resolved.entries.items() if name != "lora"}
    if loras := [] if source is None else _loras_of(source, origin):
        entries["lora"] = Entry([f"{lora['name']}:{lora['scale']}" for lora in loras], PICTURE)
    return replace(resolved, entries=entries)


def _loras_of(source: Path, origin: Record) -> list[Record]:
    loras = origin.get("lora") or []
    wanted = {"name": str, "hash": str, "scale": int | float}
    for lora in loras if isinstance(loras, list) else [None]:
        if not isinstance(lora, dict) or not all(isinstance(lora.get(name), kind) for name, kind in wanted.items()):
            raise RequestError(f"{source}: its lora should be a list of names, scales and hashes; pass --lora")
    return loras


def warn_of_differences(origin: Record, now: Record) -> None:
    """The same pixels need the same model, files, dtype, device and versions."""
    then = {name: origin.get(name) for name in FACTS} | origin.get("files", {})
    current = now | {name: now["request"].get(name) for name in FROM_FILES}
    for name, before in then.items():
        if before is not None and _identity(before) != _identity(after := current.get(name)):
            terminal.note(f"warning: {name} was {plain(before)}, now {plain(after)}: pixels may differ")
    if origin.get("request", {}).get("batch_size", 1) > 1:
        terminal.note("warning: the picture was rendered in a batch, which affects its bits: pixels may differ")


def plain(value: Plain) -> str:
    """A value of a picture in a message: on one line, printable, not longer than such values are."""
    if isinstance(value, list):
        return one_line(", ".join(map(plain, value)) or "none", LONGEST_VALUE)
    return one_line(" ".join(map(str, value.values())) if isinstance(value, dict) else str(value), LONGEST_VALUE)


def _identity(value: Plain) -> Plain:
    """What a file is does not depend on its name."""
    if isinstance(value, list):
        return [_identity(item) for item in value]
    if isinstance(value, dict) and "hash" in value:
        return {key: item for key, item in value.items() if key != "name" and not key.endswith("_name")}
    return value
