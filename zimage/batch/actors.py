"""What runs in the cluster: processes with a pipeline each, which encode rows or draw them.

    row ─ Encoder: text encoder alone ─→ row with its captions ─ Worker: all else ─→ PNG with its settings

Plain values and bytes in and out. A row's own fault is its result. What nobody foresaw ends the process, since a GPU
may be left in any state: a new one takes its place and the row's next attempt, and after the last one a line that says
so takes the place of the picture. The bits are `gen`'s: the same job in the same pipeline.
"""

import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zimage import cluster
from zimage.batch.attempts import MOST
from zimage.batch.contents import Unpacking
from zimage.batch.index import BATCH, failed_line, line_of
from zimage.batch.rows import digest, file_of
from zimage.errors import CheckpointError, RequestError, ZImageError, one_line
from zimage.settings.declared import Request
from zimage.settings.fields import Plain

if TYPE_CHECKING:
    from zimage.pipeline import ZImage
    from zimage.render.captioning import Conditions
    from zimage.render.job import Job

Packed = dict[str, Any]  # a row on its way: "id", "request" and "told" as JSON, "captions" and "png" as bytes
LASTING = (RequestError, CheckpointError)  # errors that come again however often a row is tried


@dataclass(frozen=True)
class Tools:
    """What each process gets: how to load its pipeline, input pictures by content, and the count of attempts."""

    loading: Mapping[str, Plain]
    contents: Mapping[str, Any]
    attempts: Any

    def pipeline(self) -> "ZImage":
        from zimage.pipeline import ZImage

        loading = dict(self.loading)
        return ZImage.load(loading.pop("model", None), **loading)


class Actor:
    """A process with a pipeline, through which rows go one by one."""

    STAGE = ""

    def __init__(self, tools: Tools):
        self.pipe = tools.pipeline()
        self._attempts, self._files = tools.attempts, Unpacking(tools.contents, cluster.get)

    def __call__(self, row: Packed) -> Packed:
        if row["told"]:  # it failed at the stage before
            return row
        try:
            return self._tried(row)
        finally:
            self._files.clear()

    def _tried(self, row: Packed) -> Packed:
        """The row as it is after as many attempts as it takes."""
        while True:
            attempt, error = cluster.get(self._attempts.begin.remote(f"{self.STAGE} {row['id']}"))
            if attempt > MOST:
                return self._given_up(row, error or f"its process died in {self.STAGE}", MOST)
            try:
                return self.work(row, attempt)
            except LASTING as fault:
                return self._given_up(row, self._files.named(str(fault)), attempt)
            except ZImageError as fault:
                self._note(row, str(fault))
                self.pipe.release()
            except Exception as fault:
                logging.getLogger("zimage").exception("a row failed")
                self._note(row, one_line(f"{type(fault).__name__}: {fault}", 300))
                os._exit(1)

    def work(self, row: Packed, attempt: int) -> Packed:
        """The row with what this actor adds to it."""
        raise NotImplementedError

    def prepared(self, row: Packed, must_fit: bool = True) -> "Job":
        """The job of a row. Raises RequestError or CheckpointError."""
        values = self._files.unpack(json.loads(row["request"]))
        return self.pipe.prepare(Request.from_mapping(values), must_fit=must_fit)

    def _note(self, row: Packed, error: str) -> None:
        cluster.get(self._attempts.failed.remote(f"{self.STAGE} {row['id']}", error))

    @staticmethod
    def _given_up(row: Packed, error: str, attempts: int) -> Packed:
        return {**row, "captions": b"", "told": json.dumps(failed_line(row, error, attempts))}


class Encoder(Actor):
    """Captions for rows; no more than the text encoder, and what sees references, is ever loaded."""

    STAGE = "encoding"

    def work(self, row: Packed, attempt: int) -> Packed:
        from zimage.batch.captions import pack
        from zimage.captioner import exhausted

        job = self.prepared(row, must_fit=False)
        return {**row, "captions": pack(exhausted(self.pipe.conditions(job)))}


class Worker(Actor):
    """Pictures of rows; where their captions came along, no text encoder is ever loaded."""

    STAGE = "drawing"

    def work(self, row: Packed, attempt: int) -> Packed:
        from zimage.batch.captions import unpack
        from zimage.pictures.files import encoded

        with noted() as notes:
            job = self.prepared(row)
            conditions = unpack(row["captions"]) if row["captions"] else None
            image, timings = _drawn(self.pipe, job, conditions)
        own = {"id": row["id"], "asked": row["asked"], "timings": timings, "attempts": attempt, "notes": notes}
        record = {**self.pipe.metadata(job, 0), BATCH: own}
        line = line_of(file_of(row["id"]), record)
        return {**row, "captions": b"", "png": encoded(image, "PNG", record), "told": json.dumps(line)}


def facts(loading: Mapping[str, Plain], templates: Collection[str], looks: bool) -> Packed:
    """What pictures come from besides their requests, as a worker sees it: the model, and these templates by content.

    The vision model is among it where a row `looks` at references. Raises ZImageError.
    """
    pipe = Tools(loading, {}, None).pipeline()
    record = pipe.metadata(pipe.prepare(Request(prompt="", seed=0), must_fit=False), 0)
    found = {name: record[name] for name in ("model", "dtype", "precision", "lora", "attention", "compile", "device")}
    vision = pipe.vision.describe() if looks and pipe.vision else None
    return {**found, "vision": vision, "templates": {name: _content(pipe, name) for name in templates}}


def _content(pipe: "ZImage", template: str) -> str:
    """Hex digits of a template's text; none for one that is not there, on which its rows will fail."""
    try:
        return digest([str(part) for part in asdict(pipe.texts.templates.get(template)).values()])
    except RequestError:
        return ""


@contextmanager
def noted() -> Iterator[list[str]]:
    """The library's warnings meanwhile."""
    notes: list[str] = []
    handler = _Notes(notes.append)
    logger = logging.getLogger("zimage")
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, take: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(one_line(record.getMessage()))


def _drawn(pipe: "ZImage", job: "Job", conditions: "Conditions | None") -> tuple[Any, dict[str, float]]:
    """The one picture of a job, and seconds per stage."""
    from zimage.events import timed

    timings, image = dict[str, float](), None
    for event in timed(pipe.run(job, conditions=conditions), timings):
        image = event.image or image
    return image, {stage: round(seconds, 4) for stage, seconds in timings.items()}
