"""The file that a run writes: one JSON, whole after every row, and what it takes to go on with it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from bench.card.rows import Row

SAME = ("gpu", "driver", "machine", "settings")  # what rows of one file have in common


class Record:
    """The rows of a run, in the order in which they were measured, and what they were measured on."""

    def __init__(self, file: Path):
        self.file = file
        self.about: dict[str, Any] = {}
        self.rows: dict[str, Row] = {}  # by "SECTION/ROW"

    @classmethod
    def resumed(cls, file: Path) -> "Record":
        """What an earlier run wrote. Raises ClickException for another file."""
        record = cls(file)
        try:
            found = json.loads(file.read_text())
            record.rows = {key(row): row for row in found.pop("rows")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise click.ClickException(f"{file} is not a result of `bench card`: {error}") from None
        record.about = {name: value for name, value in found.items() if name != "failed"}
        return record

    def begin(self, about: dict[str, Any]) -> None:
        """Start to add rows. Raises ClickException where those of the file are of another machine, commit or kind."""
        for name in SAME if self.about else ():
            if self.about.get(name) != about.get(name):
                was, now = self.about.get(name), about.get(name)
                raise click.ClickException(f"{self.file} is of another {name} ({was}; now {now}): use another --output")
        self.about = about
        self.save()

    def add(self, row: Row) -> None:
        self.rows[key(row)] = row
        self.save()

    def save(self) -> None:
        """Replace the file at once: it is whole whenever the run is cut off."""
        beside = self.file.with_name(self.file.name + ".part")
        rows = list(self.rows.values())
        beside.write_text(json.dumps({**self.about, "failed": len(list(self.failed())), "rows": rows}, indent=1) + "\n")
        os.replace(beside, self.file)

    @property
    def done(self) -> list[str]:
        """Rows that need not be measured again."""
        return [name for name, row in self.rows.items() if not ("error" in row or "not_run" in row)]

    def failed(self) -> Iterator[Row]:
        return (row for row in self.rows.values() if "error" in row)


def key(row: Row) -> str:
    return f"{row['section']}/{row['name']}"
