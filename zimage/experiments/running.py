"""Draws the cells of a sweep, in the order in which least is done twice, and keeps what is done.

    for each way of loading:    open the model; encode every caption once
        for each set of LoRAs:  exchange them in the loaded DiT
            for each cell:      denoise ─ decode ─→ ID.png ─→ its record

A cell is done when its record is on the disk, which is after its picture: a process may be killed at any moment, and
the same sweep goes on from there. Captions are kept in the folder `.sweep-captions` until all cells are done.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from zimage.errors import RequestError, ZImageError, one_line
from zimage.experiments.cells import Cell
from zimage.experiments.order import Loaded, ordered
from zimage.experiments.record import CAPTIONS, WORKERS, Journal, Record
from zimage.formats.atomic import remove, settle
from zimage.version import __version__

if TYPE_CHECKING:
    from zimage.events import Event

# What a process that was killed in the middle of writing has left.
LEFT = re.compile(r"\.(?:[0-9a-f]{16}|cells)-[0-9a-f]{32}\.(?:png|state|jsonl)")

Happening: TypeAlias = "tuple[Cell, Event | Record]"  # a cell, and what it is at, or its record when it is done
Happenings: TypeAlias = Iterator[Happening]


class Sweep:
    """Cells to be drawn into a folder, whose records a journal writes."""

    def __init__(self, cells: Sequence[Cell], folder: Path, journal: Journal):
        self.cells, self.folder, self.journal = cells, folder, journal
        self.pending = [cell for cell in cells if not self._is_done(cell)]

    def begun(self) -> Happenings:
        """Tidy up, and note the cells whose settings do not go together."""
        self._tidy()
        for cell in self.cells:
            self._relabel(cell)
        for cell in self.pending:
            if cell.error:
                yield cell, self.fail(cell, RequestError(cell.error))

    def groups(self) -> list[Loaded]:
        """What is left to draw, in the order in which least is done twice."""
        return ordered(cell for cell in self.pending if not cell.error)

    def run(self) -> Happenings:
        """Draw what is not done yet. A cell that fails becomes a record with its error, and the others go on."""
        yield from self.begun()
        for group in self.groups():
            yield from self._group(group)
        self.end()

    def end(self) -> None:
        """Leave nothing but pictures and records where all is done."""
        if not self.failed:
            for name in (CAPTIONS, WORKERS):
                remove(self.folder / name)

    def keep(self, cell: Cell, values: Mapping[str, Any]) -> Record:
        """Write the record of a cell, whose picture is on the disk before."""
        record = Record(cell.id, axes=cell.axes, prompt=cell.prompt, seed=cell.seed, **values)
        if record.path is not None:
            settle(self.folder / record.path)
        self.journal.append(record)
        (self.folder / cell.state).unlink(missing_ok=True)
        return record

    def fail(self, cell: Cell, error: Exception) -> Record:
        """Write that of a cell that cannot be drawn."""
        asked = {"request": dict(cell.request), "load": dict(cell.load)}
        return self.keep(cell, {**asked, "error": told(error), "version": __version__})

    @property
    def failed(self) -> list[Record]:
        """The records of its cells that have an error."""
        found = (self.journal.records.get(cell.id) for cell in self.cells)
        return [record for record in found if record is not None and record.error is not None]

    def _is_done(self, cell: Cell) -> bool:
        record = self.journal.records.get(cell.id)
        return bool(record and record.error is None and record.path and (self.folder / record.path).is_file())

    def _tidy(self) -> None:
        for file in self.folder.iterdir():
            if LEFT.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def _relabel(self, cell: Cell) -> None:
        """A cell that another sweep has drawn takes its place in this one's axes."""
        record = self.journal.records.get(cell.id)
        if record is not None and record.axes != cell.axes:
            self.journal.append(record.replaced(axes=cell.axes))

    def _group(self, group: Loaded) -> Happenings:
        from zimage.experiments.drawing import Drawer  # and so torch: a sweep that is done needs seconds less

        try:
            drawer = Drawer(group.load, self.folder)
        except Exception as error:
            yield from ((cell, self.fail(cell, error)) for cell in group.cells)
            return
        for cell, outcome in drawer.draw(group):
            if isinstance(outcome, Exception):
                yield cell, self.fail(cell, outcome)
            elif isinstance(outcome, Mapping):
                yield cell, self.keep(cell, outcome)
            else:
                yield cell, outcome


def told(error: Exception) -> str:
    """An error as a record holds it; one that nobody raised on purpose with its kind."""
    if isinstance(error, ZImageError):
        return str(error)
    return "out of memory" if isinstance(error, MemoryError) else one_line(f"{type(error).__name__}: {error}", 500)
