"""A batch from its rows to its pictures: what is there already, what runs where, and what comes back.

    rows ─ not drawn yet ─→ Ray Data: encoders ─→ workers ─→ PNG, line ─→ this process: picture, then index

This process is the only writer. A row is one block and one task: a worker that dies takes at most the row at hand with
it, which another process draws anew, to the same bits. Nothing comes in order, and nothing has to.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from zimage import cluster, interrupts
from zimage.batch.actors import Packed, Tools, facts
from zimage.batch.attempts import Attempts
from zimage.batch.contents import Packing
from zimage.batch.index import Index, Line, failed_line
from zimage.batch.places import Node, Share, least_cpus, needed_for, shares
from zimage.batch.rows import Row, digest
from zimage.batch.streaming import results
from zimage.errors import OutputError, RequestError
from zimage.pictures.files import save
from zimage.settings.fields import Plain
from zimage.settings.loading import absolute_paths
from zimage.settings.scale import BatchSettings


class Listener(Protocol):
    """What is told how far a batch is."""

    def begun(self, total: int, kept: int) -> None:
        """So many rows are asked for, and these of them are drawn already."""

    def ended(self, line: Line) -> None:
        """A row has ended, and its line is written."""


@dataclass
class Summary:
    """What a batch came to: rows, those drawn before, those drawn now, and the lines of those that failed."""

    total: int
    kept: int = 0
    drawn: int = 0
    failed: list[Line] = field(default_factory=list)


def run(
    rows: Sequence[Row], folder: Path, loading: Mapping[str, Plain], settings: BatchSettings, listener: Listener
) -> Summary:
    """Draw the rows whose pictures are not in the folder yet; what a row fails with is its line in the index.

    Raises ZImageError where no row can be drawn.
    """
    index, loading = Index(folder), absolute_paths(loading)
    if not rows:
        return Summary(0)
    settings = needed_for(len(rows), settings)
    cpus = None if settings.address else least_cpus(settings, os.cpu_count() or 1)
    with cluster.connected(settings.address, cpus) as ray, cluster.in_cluster():
        places = shares(settings, loading, _nodes(ray))
        batch = _Batch(ray, index, Packing(ray.put), _facts(ray, places.workers, loading, rows))
        pending = batch.sorted(rows)
        listener.begun(len(rows), batch.summary.kept)
        index.settle(row.id for row in rows)
        for line in batch.unreadable:
            batch.end(line, listener)
        tools = Tools(loading, batch.packing.contents, _attempts(ray))
        for packed in results(ray, settings.address, pending, places, tools):
            batch.end(batch.written(packed), listener)
            interrupts.check()
    index.settle(row.id for row in rows)
    return batch.summary


class _Batch:
    """The rows of a batch on their way into its folder."""

    def __init__(self, ray: Any, index: Index, packing: Packing, facts: Packed):
        self.index, self.packing, self._facts = index, packing, facts
        self.unreadable: list[Line] = []
        self.summary = Summary(0)

    def sorted(self, rows: Sequence[Row]) -> list[Packed]:
        """The rows that have to be drawn, as they travel; the others are noted."""
        self.summary.total, pending = len(rows), []
        for row in rows:
            packed = self._packed(row)
            found = self.index.picture(row.id, row.file)
            if packed and found and found["asked"] == packed["asked"]:
                self.index.lines[row.id] = found
                self.summary.kept += 1
            elif packed:
                pending.append(packed)
        return pending

    def written(self, packed: Packed) -> Line:
        """The line of a row that has ended, its picture saved where there is one. Raises OutputError."""
        line: Line = json.loads(packed["told"])
        if line["path"] is not None:
            path = self.index.folder / line["path"]
            try:
                save(packed["png"], path, {}, replace=True)
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
        return line

    def end(self, line: Line, listener: Listener) -> None:
        """Note what became of a row."""
        self.index.add(line)
        if line["error"] is None:
            self.summary.drawn += 1
        else:
            self.summary.failed.append(line)
        listener.ended(line)

    def _packed(self, row: Row) -> Packed | None:
        """A row as it travels; None for one whose files cannot be read, which has failed."""
        try:
            request = self.packing.pack(row.request)
        except RequestError as error:
            self.unreadable.append(failed_line({**_travelling(row.id, row.request), "asked": ""}, str(error), 0))
            return None
        facts = {**self._facts, "templates": self._facts["templates"].get(request.get("template"))}
        return {**_travelling(row.id, request), "asked": digest([request, facts])}


def _travelling(id: str, request: Mapping[str, Plain]) -> Packed:
    """All columns of a row, so that each block has the same."""
    return {"id": id, "request": json.dumps(request), "asked": "", "captions": b"", "png": b"", "told": ""}


# ------------------------------------------------------------------ what runs in the cluster


def _nodes(ray: Any) -> list[Node]:
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in found]


def _facts(ray: Any, share: Share, loading: Mapping[str, Plain], rows: Sequence[Row]) -> Packed:
    """Those of a worker, from a process that ends with the answer: it would keep a GPU's memory."""
    task = ray.remote(**share.options, max_calls=1, max_retries=0)(facts)
    templates = {template for row in rows if (template := row.request.get("template"))}
    found: Packed = cluster.get(task.remote(dict(loading), sorted(templates)))
    return found


def _attempts(ray: Any) -> Any:
    return ray.remote(Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
