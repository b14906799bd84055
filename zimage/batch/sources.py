"""Rows as they lie in files: JSON Lines, CSV and Parquet, each row as plain values by name, with the place it has.

Text of CSV files and options becomes what its setting holds: numbers, yes and no, lists as JSON.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from zimage.errors import CheckpointError, RequestError, quoted
from zimage.formats.json_text import json_object, json_value
from zimage.settings.declared import Request
from zimage.settings.environment import from_text
from zimage.settings.fields import Plain, fields, list_fields, nearest

ID = "id"
NAMES = (ID, *Request.names())
LONGEST_LINE = 1 << 20  # characters; a prompt has at most a tenth
KINDS = {field.name: kinds[-1] for field, kinds in fields(Request)}
CONDITIONS = {field.name: kind for field, _ in fields(Request) if (kind := field.metadata["condition"])}


class Source(NamedTuple):
    """What a row of a file says, and where it stands, as errors name it."""

    place: str
    values: dict[str, Plain]


def read_rows(path: Path) -> Iterator[Source]:
    """The rows of a file, by the ending of its name. Raises RequestError, which names the row at fault."""
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise RequestError(f"{path}: rows are read from {', '.join(readers)}; name a file of one of these kinds")
    try:
        for place, values in reader(path):
            yield Source(place, _named(place, values))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None


def of_text(name: str, text: str) -> Plain:
    """The value of a setting that a text stands for. Raises RequestError."""
    one = list_fields(Request).get(name, True)
    if not one and text.startswith("["):
        return _json(name, text)
    kind = str if name in CONDITIONS or name not in KINDS else KINDS[name]
    value = from_text(name, text, kind)
    return value if one else [value]


def _json(name: str, text: str) -> Plain:
    try:
        return json_value(f"{name} {quoted(text)}", text)
    except CheckpointError as error:
        raise RequestError(str(error), fields=(name,)) from None


def _named(place: str, values: dict[str, Plain]) -> dict[str, Plain]:
    """Those values that are set. Raises RequestError for a name that no row may have."""
    for name in values:
        if name not in NAMES:
            raise RequestError(f"{place}: there is no setting {quoted(name)} of a row; {nearest(name, NAMES)}")
    return {name: value for name, value in values.items() if value is not None}


def _json_lines(path: Path) -> Iterator[Source]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(_lines(path, stream), 1):
            place = f"{path.name} line {number}"
            if line.strip():
                try:
                    yield Source(place, json_object(place, line, LONGEST_LINE))
                except CheckpointError as error:
                    raise RequestError(f"{error}; each line should be one JSON object") from None


def _lines(path: Path, stream: io.TextIOBase) -> Iterator[str]:
    """The lines of a file, none of them endless."""
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise RequestError(f"{path.name} line {number} has more than {LONGEST_LINE:,} characters")
        yield line


def _csv(path: Path) -> Iterator[Source]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(_lines(path, stream), strict=True)
        try:
            for row in reader:
                yield _of_csv(f"{path.name} line {reader.line_num}", row)
        except csv.Error as error:
            raise RequestError(f"{path.name} line {reader.line_num} is not CSV: {error}") from None


def _of_csv(place: str, row: dict[str | None, Plain]) -> Source:
    if None in row:
        raise RequestError(f"{place} has more values than the first line has names")
    texts = {str(name): text for name, text in row.items() if text}  # an empty cell leaves the setting open
    try:
        return Source(place, {name: text if name == ID else of_text(name, text) for name, text in texts.items()})
    except RequestError as error:
        raise error.with_text(f"{place}: {error}") from None


def _parquet(path: Path) -> Iterator[Source]:
    from zimage.batch.parquet import read_parquet

    for number, values in enumerate(read_parquet(path), 1):
        yield Source(f"{path.name} row {number}", values)


def multiplied(sources: Iterable[Source], lists: dict[str, list[Plain]]) -> Iterator[Source]:
    """Each row with every combination of the values of these settings, the last one changing first."""
    sources = list(sources)
    for name, values in lists.items():
        for source in sources:
            if name in source.values:
                raise RequestError(f"{source.place} sets {name} itself; leave it out there, or in --vary")
        sources = [_with(source, name, value, k) for source in sources for k, value in enumerate(values, 1)]
    yield from sources


def _with(source: Source, name: str, value: Plain, number: int) -> Source:
    """A row with one more setting; an id gets a number for each of its values."""
    own = {**source.values, **({} if value is None else {name: value})}
    return Source(source.place, {**own, ID: f"{own[ID]}-{number}"} if ID in own else own)
