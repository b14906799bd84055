"""The index of a batch: a line of JSON for each row, written when the row has ended, and whole after every kill.

    {"id", "path", "seed", "request", "timings": {stage: s}, "attempts", "notes", "asked", "error"}

`path` is relative to the index's folder; a row that failed has none, and an `error`. `notes` are the warnings that came
while it was drawn, and `asked` tells the request and the model from others. What a picture's own metadata say
is what counts: lines that a kill took are written anew from the pictures.
"""

import contextlib
import json
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

from zimage.errors import CheckpointError, RequestError
from zimage.formats.atomic import beside, destination, extend, naming, write_new
from zimage.formats.json_text import json_object
from zimage.formats.lock import Lock
from zimage.pictures.files import read_metadata
from zimage.settings.fields import Plain

NAME = "index.jsonl"
BATCH = "batch"  # the entry of a picture's metadata that tells which row it is
LONGEST = 1 << 22  # bytes of a line
Line = dict[str, Plain]


class Index:
    """The lines of a folder, by id, and the right to write them. Raises RequestError where another batch has it."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, destination(folder / NAME)
        self.path.touch()
        try:
            self._lock = Lock.of(self.path)
        except BlockingIOError:
            raise RequestError(f"{folder}: another batch writes there; wait for it, or name another folder") from None
        self.lines = {line["id"]: line for line in read_index(self.path)}
        self._stream: FileIO | None = None

    def picture(self, id: str, file: str) -> Line | None:
        """The line of a picture that lies in the folder, from what it carries; None where none of this id does."""
        try:
            record = read_metadata(self.folder / file)
        except (OSError, RequestError):  # there is none, or something else has taken the name
            return None
        own = record.get(BATCH)
        if not isinstance(own, dict) or own.get("id") != id:
            return None
        return line_of(file, record)

    def add(self, line: Line) -> None:
        """Write a line, so that it is there whatever happens next. Raises OSError that names the index."""
        with naming(self.path):
            if self._stream is None:
                self._stream = self.path.open("ab", buffering=0)
            extend(self._stream, _text(line))
        self.lines[line["id"]] = line

    def settle(self, order: Iterable[str]) -> None:
        """Write the whole anew: one line for each id, these in their order, then those of other batches.

        Raises OSError that names the index.
        """
        self.close()
        ids = dict.fromkeys([*order, *self.lines])
        with naming(self.path), beside(self.path) as temporary:
            write_new(temporary, (_text(self.lines[id]) for id in ids if id in self.lines))
            self._lock.publish(temporary)
        self.lines = {id: self.lines[id] for id in ids if id in self.lines}

    def close(self) -> None:
        """End writing; the lock stays."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def line_of(file: str, record: Line) -> Line:
    """The line of a picture with this metadata."""
    request, own = record["request"], record[BATCH]
    told = {name: own.get(name) for name in ("timings", "attempts", "notes", "asked")}
    return {"id": own["id"], "path": file, "seed": request["seed"], "request": request, **told, "error": None}


def failed_line(row: Line, error: str, attempts: int) -> Line:
    """The line of a row, as it is packed, that has no picture; its request as it was asked for."""
    request = json.loads(row["request"])
    told = {"timings": {}, "attempts": attempts, "notes": [], "asked": row["asked"]}
    return {"id": row["id"], "path": None, "seed": request["seed"], "request": request, **told, "error": error}


def read_index(path: Path) -> list[Line]:
    """The lines that can be read, several of one id in their order: the last one of a killed batch may be torn."""
    found = []
    with path.open("rb") as stream:
        for text in stream:
            with contextlib.suppress(CheckpointError):
                line = json_object(path.name, text, LONGEST)
                found += [line] if isinstance(line.get("id"), str) else []
    return found


def _text(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"
