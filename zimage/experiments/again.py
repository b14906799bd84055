"""Cells rendered once more, one after the other, beside whatever looks at the folder: are the bits the same?

A record may come from anybody. What it says about pictures and weights is used as by `gen`; what would send a prompt to
another machine, or write into a folder, is refused.
"""

import dataclasses
import io
import threading
from collections.abc import Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from zimage.errors import RequestError, one_line, quoted
from zimage.experiments.difference import distance
from zimage.experiments.folder import Cell
from zimage.experiments.record import Record, facts
from zimage.experiments.running import told
from zimage.settings.fields import Plain

if TYPE_CHECKING:
    from zimage.events import Event
    from zimage.pipeline import ZImage

REFUSED = ("encoder_url", "rewriter_url", "cache_folder")
State = Literal["queued", "running", "done", "failed"]


@dataclasses.dataclass(frozen=True)
class Render:
    """One more render of a cell: how far it is, and at its end whether it `is_equal` and what `told` says of it."""

    state: State = "queued"
    step: int = 0
    total: int = 0
    is_equal: bool | None = None
    told: str = ""
    picture: bytes = dataclasses.field(default=b"", repr=False)

    def plain(self) -> dict[str, Plain]:
        """Without the picture."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "picture"}


class Renders:
    """A thread that renders cells in a pipeline of its own; the pipeline is kept for those that load the same."""

    def __init__(self) -> None:
        self._renders: dict[str, Render] = {}
        self._waiting: SimpleQueue[Cell | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._loaded: tuple[Mapping[str, Plain], ZImage] | None = None

    def start(self, cell: Cell) -> Render:
        """Render a cell, unless it waits or runs already. Raises RequestError for what may not be rendered here."""
        check(cell)
        found = self._renders.get(cell.id)
        if found is not None and found.state in ("queued", "running"):
            return found
        self._renders[cell.id] = Render()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._waiting.put(cell)
        return self._renders[cell.id]

    def of(self, cell: Cell) -> Render | None:
        return self._renders.get(cell.id)

    def stop(self) -> None:
        """Give up what runs, at its next step, and wait for that."""
        self._stopping.set()
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while (cell := self._waiting.get()) is not None and not self._stopping.is_set():
            try:
                self._renders[cell.id] = self._rendered(cell)
            except Exception as error:
                self._renders[cell.id] = Render("failed", told=one_line(told(error)))

    def _rendered(self, cell: Cell) -> Render:
        from zimage.experiments.recorded import request_of

        self._renders[cell.id] = Render("running")
        pipe = self._pipeline(cell.record.load)
        image = None
        job = pipe.prepare(request_of(cell.record))
        events = pipe.run(job)
        for event in events:
            if self._stopping.is_set():
                events.close()
                return Render("failed", told="given up")
            image = event.image or image
            self._tell(cell, event)
        if image is None:
            raise RequestError("the render gave no picture")
        return compared(image, cell, facts(pipe.metadata(job, 0)))

    def _tell(self, cell: Cell, event: "Event") -> None:
        if event.stage == "denoise":
            self._renders[cell.id] = Render("running", event.step, event.total)

    def _pipeline(self, load: Mapping[str, Plain]) -> "ZImage":
        if self._loaded is None or self._loaded[0] != load:
            self._loaded = None  # the old one goes before the new one comes
            self._loaded = load, opened(load)
        return self._loaded[1]


def opened(load: Mapping[str, Plain]) -> "ZImage":
    """The pipeline that a record's settings of loading ask for."""
    from zimage.pipeline import ZImage

    given = {name: value for name, value in load.items() if value is not None}
    path, device = given.pop("model", None), given.pop("device", "auto")
    return ZImage.load(path, device, **given)


def check(cell: Cell) -> None:
    """Raises RequestError for a cell without a picture to compare with, and for settings that a record may not say."""
    if cell.path is None:
        raise RequestError(f"there is no picture to compare with: {cell.fault}")
    for name in REFUSED:
        if cell.record.load.get(name) or cell.record.request.get(name):
            raise RequestError(f"the record sets {name}, which a folder may not decide; render it with `zimage gen`")


def compared(image: Image.Image, cell: Cell, here: Mapping[str, Any]) -> Render:
    """`here`: with which model and machine the image was drawn, as records have it. Raises RequestError for sizes."""
    far = distance(image, cell.picture())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    told = "equal bits"
    if far.pixels:
        told = f"{far.pixels:,} pixels differ ({', '.join(far.lines)}); {otherwise(cell.record, here)}"
    return Render("done", is_equal=not far.pixels, told=told, picture=buffer.getvalue())


def otherwise(record: Record, here: Mapping[str, Any]) -> str:
    """What was not the same as for the record, as far as it tells; bits depend on the number of threads as well."""
    found = [
        f"{name} is {quoted(here[group][name])} here and was {quoted(values[name])}"
        for group, values in (("model", record.model), ("machine", record.machine))
        for name in values
        if name in here[group] and here[group][name] != values[name]
    ]
    return "; ".join(found) or "perhaps another number of threads"
