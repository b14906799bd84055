"""One pipeline and the cells that are drawn with it: captions first, then picture by picture.

Between cells nothing is let go that the next one needs. Where DiT and VAE do not fit in memory together, many cells are
denoised before any is decoded, and their latents lie in `ID.state` files meanwhile.
"""

import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from zimage.errors import CheckpointError, RequestError
from zimage.events import Event
from zimage.experiments.cells import Cell
from zimage.experiments.measured import Cost, CountingEncoder
from zimage.experiments.order import Loaded, by_caption, loras
from zimage.experiments.record import CAPTIONS, facts
from zimage.loading.loras import Adapter, Adapters
from zimage.loading.plan import MemoryPlan
from zimage.loading.registry import DIT, VAE
from zimage.pictures.files import save
from zimage.pipeline import ZImage
from zimage.render.job import Job
from zimage.render.stages import finished
from zimage.render.state import RenderState, load_state, save_state
from zimage.settings.declared import Request
from zimage.settings.fields import Plain
from zimage.settings.loading import split_lora

log = logging.getLogger("zimage")

TOGETHER = 64  # cells that are denoised before any is decoded, where DiT and VAE do not fit in memory together

# What a cell is at, or what became of it: an error, or the values of its record.
Outcome: TypeAlias = Event | Exception | Mapping[str, Any]
Outcomes: TypeAlias = Iterator[tuple[Cell, Outcome]]


class Held:
    """Keeps the components that are loaded inside until its end, also where plans would let them go after each cell.

    One for which there is no room beside another stage is let go all the same, as the residency decides.
    """

    def __init__(self, pipe: ZImage):
        self._pipe = pipe
        self._plans: dict[str, MemoryPlan] = {}

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        for name, plan in self._plans.items():
            self._pipe.residency.finish(name, plan)

    def take(self, event: Event, job: Job) -> None:
        """Hold what an event of this job tells to be loaded."""
        if event.stage == "load" and event.step == event.total and event.detail not in self._plans:
            use = self._pipe.components(job)
            self._pipe.residency.begin(event.detail, use.plan, use.adapters, use.controls)
            self._plans[event.detail] = use.plan


class Drawer:
    """Opens a model and draws cells with it. Raises as `ZImage.load` does."""

    def __init__(self, load: Mapping[str, Plain], folder: Path):
        begun, settings = time.perf_counter(), {"cache_folder": str(folder / CAPTIONS), **load}
        self.folder = folder
        self.pipe = ZImage.load(settings.pop("model", None), **settings)
        self.encoder = self.pipe.encoder = CountingEncoder(self.pipe.encoder)
        self.seconds = time.perf_counter() - begun
        self._adapters: dict[str, Adapter] = {}
        self._costs: dict[str, Cost] = {}

    def draw(self, group: Loaded) -> Outcomes:
        """What happens to the cells of a group, until each has an outcome."""
        self._cost(group.cells[0]).add("open", self.seconds, "opened")
        failed = yield from self._encode(group.cells)
        ready = [cell for cell in group.cells if cell.id not in failed]
        for first in range(0, len(ready), TOGETHER):
            later = yield from self._denoise(ready[first : first + TOGETHER])
            yield from self._decode(later)

    # ------------------------------------------------------------------ stages over many cells

    def _encode(self, cells: Sequence[Cell]) -> Generator[tuple[Cell, Outcome], None, set[str]]:
        """Encode every caption once, so that the text encoder is not needed again; returns the cells that failed."""
        failed: set[str] = set()
        with Held(self.pipe) as held:
            for same in by_caption(cells):
                for cell, outcome in self._encode_same(same, held):
                    yield cell, outcome
                    failed |= {cell.id} if isinstance(outcome, Exception) else set()
        return failed

    def _encode_same(self, cells: Sequence[Cell], held: Held) -> Outcomes:
        """The captions that cells share, encoded for the first one that can be prepared."""
        for i, cell in enumerate(cells):
            try:
                job = self._prepared(cell)
            except Exception as error:
                yield cell, error
                continue
            try:
                for event in self._followed(cell, job, self.pipe.conditions(job), held):
                    yield cell, event
            except Exception as error:
                yield from ((other, error) for other in cells[i:])
            return

    def _denoise(self, cells: Sequence[Cell]) -> Generator[tuple[Cell, Outcome], None, list[tuple[Cell, Job]]]:
        """Draw cells where DiT and VAE fit in memory together; denoise the others, and return them."""
        later = []
        with Held(self.pipe) as held:
            for cell in cells:
                try:
                    job = self._prepared(cell)
                    if {DIT, VAE} <= job.plan.kept:
                        yield from self._drawn(cell, job, self._begun(cell, job), held)
                    else:
                        yield from self._denoised(cell, job, held)
                        later.append((cell, job))
                except Exception as error:
                    yield cell, error
        return later

    def _decode(self, denoised: Sequence[tuple[Cell, Job]]) -> Outcomes:
        with Held(self.pipe) as held:
            for cell, job in denoised:
                try:
                    yield from self._drawn(cell, job, self._begun(cell, job), held)
                except Exception as error:
                    yield cell, error

    # ------------------------------------------------------------------ one cell

    def _prepared(self, cell: Cell) -> Job:
        return self.pipe.prepare(Request.from_mapping(dict(cell.request)), loras=self._loras(cell))

    def _drawn(self, cell: Cell, job: Job, state: RenderState, held: Held) -> Outcomes:
        """To the picture, from a state on; one that is saved is the cell's outcome."""
        for event in self._followed(cell, job, self.pipe.run(job, state), held):
            yield cell, event
            if event.image is not None:
                yield cell, self._saved(cell, job, event.image)

    def _denoised(self, cell: Cell, job: Job, held: Held) -> Outcomes:
        """To the finished latents, which its state file then holds."""
        state = self._begun(cell, job)
        if len(finished(job, state)) == job.count:
            return
        for event in self._followed(cell, job, self.pipe.run(job, state), held):
            yield cell, event
            if state.update(event) and len(finished(job, state)) == job.count:
                break
        save_state(self.folder / cell.state, state, {"cell": cell.id})

    def _followed(
        self, cell: Cell, job: Job, events: Generator[Event, None, Any], held: Held
    ) -> Generator[Event, None, None]:
        """A job's events, counted for the cell; what they load is held."""
        for event in self._cost(cell).follow(self.pipe, self.encoder, events):
            held.take(event, job)
            yield event

    def _begun(self, cell: Cell, job: Job) -> RenderState:
        """What a killed process has left of a cell."""
        path = self.folder / cell.state
        if not path.exists():
            return RenderState()
        try:
            state, _ = load_state(path)
            self.pipe.check_state(state, job)
        except (CheckpointError, RequestError) as error:
            log.warning("a cell is begun anew: %s", error)
            return RenderState()
        return state

    def _saved(self, cell: Cell, job: Job, image: Image.Image) -> Mapping[str, Any]:
        """The values of a cell's record, its picture saved."""
        metadata, cost = self.pipe.metadata(job, 0), self._costs.pop(cell.id)
        path = save(image, self.folder / cell.picture, metadata, replace=True)
        return {
            "request": {**job.to_dict()["request"], "template": None},  # its parts are there
            "load": dict(cell.load),
            "path": path.name,
            "timings": {stage: round(seconds, 6) for stage, seconds in cost.timings.items()},
            "memory": cost.memory,
            "counts": dict(cost.counts),
            **facts(metadata),
        }

    def _loras(self, cell: Cell) -> Adapters:
        """The adapters of a cell, each file read once: the same objects again are no change to a loaded DiT."""
        pairs = [split_lora(text) for text in loras(cell)]
        for path, scale in pairs:
            key = f"{path}:{scale}"
            if key not in self._adapters:
                self._adapters[key] = self.pipe.lora.adapter(path, scale)
        return tuple(self._adapters[f"{path}:{scale}"] for path, scale in pairs)

    def _cost(self, cell: Cell) -> Cost:
        return self._costs.setdefault(cell.id, Cost())
