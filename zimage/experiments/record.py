"""The record of one measured or rendered thing, the same for sweeps and profiles: one line of JSON."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage.errors import RequestError, quoted
from zimage.formats.atomic import write_text
from zimage.settings.fields import Plain

SCHEMA = 1
RECORDS = "cells.jsonl"  # within the folder of a sweep


@dataclass(frozen=True)
class Record:
    """A cell of a sweep, or a profile's run, as plain values.

    `axes` are the values that distinguish it from others, by the name of the setting; `request` and `load` are exact
    and whole. `path` is that of its picture, relative to the folder; `timings` in seconds by stage, `memory` in bytes,
    `counts` how often something was loaded or encoded for it, `scores` by metric. With an `error` there is no picture.
    """

    id: str
    kind: str = "cell"
    axes: Mapping[str, Plain] = field(default_factory=dict)
    prompt: str = ""
    seed: int | None = None
    request: Mapping[str, Plain] = field(default_factory=dict)
    load: Mapping[str, Plain] = field(default_factory=dict)
    path: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    machine: Mapping[str, Plain] = field(default_factory=dict)
    version: str = ""
    schema: int = SCHEMA

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Record":
        """The inverse. Raises RequestError for what is not a record of this schema."""
        names = {one.name for one in dataclasses.fields(cls)}
        if not isinstance(plain, dict) or plain.get("schema") != SCHEMA or "id" not in plain or set(plain) - names:
            raise RequestError(f"{quoted(str(plain)[:80])} is not a record of schema {SCHEMA}")
        return cls(**plain)


def read_records(folder: Path) -> list[Record]:
    """The records of a folder in the order of their first lines; of several with one id the last counts.

    A last line that was cut off is left out. Raises RequestError for a folder without records.
    """
    path = folder / RECORDS
    if not path.is_file():
        raise RequestError(f"{quoted(str(folder))} holds no {RECORDS}; pass the folder of a sweep")
    return list({record.id: record for record in _lines(path)}.values())


def _lines(path: Path) -> Iterator[Record]:
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            plain = json.loads(line) if line else None
        except ValueError:
            if number == len(lines):
                return
            raise RequestError(f"line {number} of {path.name} is not JSON") from None
        if plain is not None:
            yield Record.from_plain(plain)


def write_records(folder: Path, records: list[Record]) -> None:
    """Put these in the place of all records of a folder, atomically."""
    write_text(folder / RECORDS, "".join(record.line() + "\n" for record in records))
