"""Long sweeps on many workers of Ray: the cells of each way of loading, LoRAs among it, are the rows of a batch.

    cells ─→ rows ─ workers ─→ FOLDER/.sweep-workers/ID.png ─→ FOLDER/ID.png ─→ its record

Workers start anew for each such batch, and each loads the model for itself: this pays where the cells of one are many.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from zimage.batch.driver import run
from zimage.batch.index import BATCH, NAME, Line, read_index
from zimage.batch.rows import Row, with_files
from zimage.errors import CheckpointError, RequestError
from zimage.experiments.cells import Cell
from zimage.experiments.order import Adapted
from zimage.experiments.record import CAPTIONS, WORKERS, Record, facts
from zimage.experiments.running import Sweep
from zimage.formats.atomic import remove
from zimage.pictures.files import read_metadata
from zimage.settings.conditions import names_of
from zimage.settings.declared import MASK_ALPHA, Request
from zimage.settings.fields import Plain, fields
from zimage.settings.paths import user_path
from zimage.settings.scale import BatchSettings

if TYPE_CHECKING:
    from zimage.events import Event

Told: TypeAlias = "Callable[[Cell, Event | Record], None]"


def spread(sweep: Sweep, settings: BatchSettings, tell: Told) -> None:
    """Draw what is not done yet; `tell` is called with each record. Raises ZImageError where Ray does not work."""
    for cell, record in sweep.begun():
        tell(cell, record)
    folder = sweep.folder / WORKERS
    folder.mkdir(exist_ok=True)
    for group in sweep.groups():
        for part in group.parts:
            load = {**group.load, **({"lora": part.loras} if part.loras else {})}
            if settings.address is None:  # elsewhere there is no such folder
                load.setdefault("cache_folder", str(sweep.folder.absolute() / CAPTIONS))
            _Batch(sweep, part, folder, tell).draw(load, settings)
    remove(folder)
    sweep.end()


class _Batch:
    """Cells as the rows of a batch; told of each row that has ended, it makes the cell's record."""

    def __init__(self, sweep: Sweep, part: Adapted, folder: Path, tell: Told):
        self._sweep, self._folder, self._tell = sweep, folder, tell
        self._waiting = {cell.id: cell for cell in part.cells}
        self._requests: dict[str, dict[str, Plain]] = {}

    def draw(self, load: Mapping[str, Plain], settings: BatchSettings) -> None:
        rows = [row for cell in list(self._waiting.values()) if (row := self._row(cell))]
        try:
            run(rows, self._folder, load, settings, self)
        except (RequestError, CheckpointError) as error:  # of the model or how it is loaded
            for cell in list(self._waiting.values()):
                self._fail(cell, error)
        for line in read_index(self._folder / NAME):  # what a killed sweep has drawn
            self.ended(line)

    def begun(self, total: int, kept: int) -> None:
        """Of the batch; a sweep counts its own cells."""

    def ended(self, line: Line) -> None:
        cell = self._waiting.get(line["id"])
        if cell is None:
            return
        if line["error"] is not None:
            self._fail(cell, RequestError(line["error"]))
            return
        drawn = self._folder / line["path"]
        metadata = read_metadata(drawn)
        os.replace(drawn, self._sweep.folder / cell.picture)
        del self._waiting[cell.id]
        self._tell(cell, self._sweep.keep(cell, self._values(cell, metadata)))

    def _row(self, cell: Cell) -> Row | None:
        try:
            request = with_files(dict(cell.request), lambda role, path: os.path.abspath(user_path(path, role)))
        except RequestError as error:
            self._fail(cell, error)
            return None
        self._requests[cell.id] = request
        return Row(cell.id, {name: value for name, value in request.items() if value is not None}, cell.label)

    def _fail(self, cell: Cell, error: Exception) -> None:
        del self._waiting[cell.id]
        self._tell(cell, self._sweep.fail(cell, error))

    def _values(self, cell: Cell, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Of a record, from what the picture carries."""
        return {
            **facts(metadata),
            "request": with_paths(metadata["request"], self._requests[cell.id]),
            "load": dict(cell.load),
            "path": cell.picture,
            "timings": metadata[BATCH]["timings"],
            "counts": {"attempts": metadata[BATCH]["attempts"]},
        }


def with_paths(request: Mapping[str, Plain], asked: Mapping[str, Plain]) -> dict[str, Plain]:
    """A picture's request, whose files have names and hashes, with the paths that were asked for: as `Job.to_dict`."""
    found = dict(request)
    for field, _ in fields(Request):
        name, value = field.name, request.get(field.name)
        if value is None:
            continue
        if field.metadata["attachment"]:
            found[name] = {**value, "path": asked.get(name, MASK_ALPHA)}
        elif kind := field.metadata["condition"]:
            pairs = zip(value, asked[name], strict=True)
            found[name] = [_pointed(kind, described, pointed) for described, pointed in pairs]
    return found


def _pointed(kind: Any, described: Mapping[str, Plain], pointed: Mapping[str, Plain]) -> dict[str, Plain]:
    """A condition with the paths of its files beside their names and hashes."""
    found: dict[str, Plain] = {}
    for name in names_of(kind):
        if name not in kind.FILES:
            found[name] = described[name]
            continue
        head = "" if name == "picture" else f"{name}_"
        found |= {name: pointed[name], f"{name}_name": described[f"{head}name"]}
        found[f"{name}_hash"] = described[f"{head}hash"]
    return found
