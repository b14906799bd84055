"""The record of one rendered cell or one measured scenario: the same for sweeps and profiles, one line of JSON each.

    FOLDER/cells.jsonl      records, appended one by one; of several with one id the last one holds
    FOLDER/ID.png           the picture of a cell, which carries its settings too

A line is written whole and reaches the disk before the next cell begins. One that a killed process left without its
end is no record: readers leave it out, and the next writer removes it.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from zimage import interrupts
from zimage.errors import CheckpointError, OutputError, RequestError, quoted
from zimage.formats.atomic import beside, extend, naming, write_new
from zimage.formats.files import read_file, require_inside
from zimage.formats.json_text import json_object
from zimage.formats.lock import Lock
from zimage.settings.fields import Hint, Plain
from zimage.settings.plain import mistake

SCHEMA = 1
RECORDS = "cells.jsonl"  # within the folder of a sweep
# Folders in it that a sweep makes and removes, under names that nobody else's have.
CAPTIONS = ".sweep-captions"  # keeps them until all cells are done
WORKERS = ".sweep-workers"  # what batches draw into
LONGEST_FILE, LONGEST_LINE = 1 << 30, 1 << 20  # bytes; a record of a long prompt has some ten thousand


@dataclass(frozen=True)
class Record:
    """A cell of a sweep, or a scenario of a profile, as plain values.

    `axes` are the values that distinguish it from others, by the name of the setting, None where that was left as it
    is. `request` is the prepared one, as `Job.to_dict` holds it, and `load` how the model was loaded; where it could
    not be prepared, what was asked for. `path` is the name of its picture in the folder. `timings` are seconds by
    stage; of a profile the median of its rounds, with the least and the most as `spread`. `memory` holds the peak in
    bytes by device, `counts` what was done for it ("opened", "loads", "encodes") and other numbers, `scores` those of
    metrics. `model` names checkpoint and LoRAs by their hashes, `machine` what it ran on. With an `error` there is no
    picture.
    """

    id: str
    kind: str = "cell"  # or "profile"
    axes: Mapping[str, Plain] = field(default_factory=dict)
    prompt: str = ""
    seed: int | None = None
    request: Mapping[str, Plain] = field(default_factory=dict)
    load: Mapping[str, Plain] = field(default_factory=dict)
    path: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, list[float]] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    model: Mapping[str, Plain] = field(default_factory=dict)
    machine: Mapping[str, Plain] = field(default_factory=dict)
    version: str = ""
    schema: int = SCHEMA

    def line(self) -> str:
        """One line of JSON, without its end."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    def replaced(self, **values: Any) -> Self:
        """The same with other values; with scores, say."""
        return dataclasses.replace(self, **values)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Record":
        """The inverse of `line`; what is left out has its default. Raises RequestError for anything else."""
        values = {**DEFAULTS, **plain}
        if values["schema"] != SCHEMA:
            raise RequestError(f"it has schema {quoted(values['schema'])}, and this version reads {SCHEMA}")
        if fault := mistake(values, KINDS, "record") or _unknown(values) or _outside(values["path"]):
            raise RequestError(fault)
        return cls(**plain)


# Of the fields, for `mistake`.
KINDS: dict[str, Hint] = {
    **dict.fromkeys(("id", "kind", "prompt", "version"), str),
    **dict.fromkeys(("path", "error"), str | None),
    **dict.fromkeys(("axes", "request", "load", "model", "machine"), dict[str, Any]),
    **dict.fromkeys(("timings", "memory", "counts", "scores"), dict[str, float]),
    "spread": dict[str, tuple[float, float]],
    "seed": int | None,
    "schema": int,
}
DEFAULTS = {name: value for name, value in vars(Record("")).items() if name != "id"}


# Of a picture's metadata: what it was drawn with, by hashes; and on what.
FACTS = {
    "model": ("model", "lora", "vision"),
    "machine": ("device", "dtype", "precision", "attention", "compile", "torch"),
}


def facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a record that the metadata of its picture tell."""
    found = {key: {name: metadata[name] for name in names if name in metadata} for key, names in FACTS.items()}
    return {**found, "version": metadata["version"]}


def read_records(folder: Path) -> list[Record]:
    """The records of a folder in the order of their first lines.

    Raises RequestError for a folder without records, and where one is damaged.
    """
    path = folder / RECORDS
    if not path.is_file():
        raise RequestError(f"{quoted(str(folder))} holds no {RECORDS}; pass the folder of a sweep")
    return list(_read(path).values())


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Replace a folder's records with these, all of them or none. Raises as `Journal` does."""
    with Journal(folder) as journal:
        journal.replace(records)


class Journal:
    """The right to write the records of a folder, which one process has at a time; the folder is made.

    `records` are all that it holds, by their ids. Raises RequestError where another process is writing them or one is
    damaged, CheckpointError where they lead out of the folder by a link, and OutputError where it cannot be written to.
    """

    def __init__(self, folder: Path):
        self.path = folder / RECORDS
        require_inside(folder, self.path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._lock = Lock.of(self.path)
        except BlockingIOError:
            text = f"another command is writing the records of {quoted(str(folder))}; wait until it ends"
            raise RequestError(text) from None
        except OSError as error:
            raise OutputError(f"{folder} cannot be written to: {error.strerror or error}") from error
        self.records = _read(self.path)
        self._remove_torn_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def append(self, record: Record) -> None:
        """Add a record, or replace the one with its id; it is on the disk when this returns."""
        with interrupts.held(), naming(self.path), self.path.open("ab", buffering=0) as stream:
            extend(stream, _text(record))
        self.records[record.id] = record

    def replace(self, records: Iterable[Record]) -> None:
        """Replace all records with these, in one step."""
        self.records = {record.id: record for record in records}
        with naming(self.path), beside(self.path) as temporary:
            write_new(temporary, map(_text, self.records.values()))
            self._lock.publish(temporary)

    def _remove_torn_line(self) -> None:
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


def _text(record: Record) -> bytes:
    return record.line().encode() + b"\n"


def _read(path: Path) -> dict[str, Record]:
    """The records by their ids. Raises RequestError, which names the line."""
    records = {}
    *lines, _ = _content(path).split(b"\n")  # what follows the last end of a line was cut off
    for number, line in enumerate(lines, 1):
        try:
            record = Record.from_plain(json_object("it", line, LONGEST_LINE))
        except (CheckpointError, RequestError) as error:
            raise RequestError(f"{path.name} line {number} is not a record: {error}") from None
        records[record.id] = record
    return records


def _content(path: Path) -> bytes:
    try:
        return read_file(path, LONGEST_FILE)
    except CheckpointError as error:
        raise RequestError(str(error)) from None


def _unknown(values: Mapping[str, Any]) -> str:
    unknown = sorted(values.keys() - KINDS.keys())
    return f"record has an unknown entry {quoted(unknown[0])}" if unknown else ""


def _outside(path: str | None) -> str:
    """A picture lies in its folder under a plain name: a record of somebody else's may name any file."""
    if path is None or (path == os.path.basename(path) and path not in ("", ".", "..") and "\\" not in path):
        return ""
    return f"record.path {quoted(path)} should be the name of a file in the folder"
