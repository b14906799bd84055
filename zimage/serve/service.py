"""What the forms call: a request in, a job out; its events, its end, its pictures.

Asked ─ submit: defaults laid under, uploads kept, LoRAs found, prepared by a worker ─→ a row ─→ the queue
"""

import asyncio
import hashlib
import json
import logging
import shutil
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from zimage.errors import RequestError, ZImageError, quoted
from zimage.serve import leftovers
from zimage.serve.about import About
from zimage.serve.asking import Asked, check_canvas, check_limits, check_tokens
from zimage.serve.attached import attached
from zimage.serve.database import Database
from zimage.serve.dispatch import Dispatcher, Task
from zimage.serve.history import History
from zimage.serve.jobs import DONE, ENDED, QUEUED, STATES, JobRow, Jobs, new_id, uploads_of
from zimage.serve.metrics import Metrics
from zimage.serve.places import places
from zimage.serve.refusals import NoRoom, NotFound, TooMany, Unavailable
from zimage.serve.shelf import CONTROL_ENDINGS, LORA_ENDINGS, names_in
from zimage.serve.stream import END, PREVIEW, Message, Streams
from zimage.serve.uploads import Uploads, named
from zimage.serve.view import JobView, Progress
from zimage.serve.workers import BUSY, READY, Worker
from zimage.settings.declared import Request
from zimage.settings.fields import Plain, nearest
from zimage.settings.merging import Presets, laid_over
from zimage.settings.rewriting import RewriteSettings
from zimage.settings.scale import BatchSettings
from zimage.settings.serving import ServeSettings
from zimage.version import __version__

log = logging.getLogger("zimage.serve")

ENDING = ".safetensors"  # of LoRAs, states and captions
LONGEST_KEY = 255
SWEEP = 600.0  # seconds between two looks for what is not needed any more
UNUSED = 3600.0  # seconds that uploads are kept which no job needs, and captions that nobody takes


@dataclass(frozen=True)
class Launch:
    """What a server is started with: settings of loading, defaults of requests and of rewriting, its own.

    `machines`: the cluster that it uses besides, and how many workers there; `presets`: those of its settings file.
    """

    loading: Mapping[str, Plain]
    defaults: Mapping[str, Plain]
    serving: ServeSettings
    data: Path
    machines: BatchSettings = field(default_factory=BatchSettings)
    presets: Presets = field(default_factory=dict)


class Service:
    """The server behind the forms; used in the event loop."""

    def __init__(self, launch: Launch):
        self.launch, self.settings, self.folder = launch, launch.serving, launch.data
        self.begun = time.time()
        database = self._database = Database(self.folder / "index.sqlite")
        self.jobs_kept, self.streams = Jobs(database), Streams()
        self.history = History(self.folder, database, self.settings.keep_days, self.settings.keep_gb)
        self.uploads, self.metrics = Uploads(self.folder / "uploads", self.settings), Metrics()
        self._states, self._captions = self.folder / leftovers.STATES, self.folder / "captions"
        for folder in (self._states, self._captions):
            folder.mkdir(exist_ok=True)
        self.dispatcher = Dispatcher(
            self.jobs_kept, self.history, self.streams, self.metrics, self.folder, self._has_room
        )
        self._keys: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._accepting = 0
        self._sweeper: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ beginning and end

    async def start(self) -> None:
        """Take up the queue, and wait until a worker has opened the model. Raises what keeps it from that."""
        waiting = await asyncio.to_thread(self.jobs_kept.waiting)
        await asyncio.to_thread(self._clear, {f"{row.id}{ENDING}" for row in waiting})
        launch = self.launch
        where = await asyncio.to_thread(places, launch.loading, self.settings, launch.machines, self.folder)
        self.dispatcher.start(where, waiting)
        await self._worker().ready()
        self._sweeper = asyncio.create_task(self._sweep(), name="sweeper")

    async def stop(self, seconds: float) -> None:
        """Let running jobs end or keep their state; the queue stays for the next start."""
        if self._sweeper:
            self._sweeper.cancel()
        await self.dispatcher.stop(seconds)
        await asyncio.to_thread(self._database.close)

    @property
    def about(self) -> About:
        """Raises Unavailable while no worker has opened the model."""
        known = next((worker.about for worker in self.dispatcher.workers if worker.about), None)
        if known is None:
            raise Unavailable("the model is still loading; try again", retry_after=5)
        return About(**known)

    async def loras(self) -> dict[str, Path]:
        """The LoRAs that requests may name: files in the configured folder, by their names without the ending."""
        return await asyncio.to_thread(names_in, self.launch.loading.get("lora_folder"), LORA_ENDINGS)

    async def controls(self) -> dict[str, Path]:
        """The control files that requests may name, in the same way."""
        return await asyncio.to_thread(names_in, self.settings.control_folder, CONTROL_ENDINGS)

    # ------------------------------------------------------------------ jobs

    async def submit(self, asked: Asked, key: str | None = None) -> JobView:
        """Accept a request: once this returns, it is done whatever happens to the server.

        The same `key` gives the same job. Raises RequestError, CheckpointError for damaged files, or a Refusal.
        """
        if key is None:
            return await self._accept(asked, None)
        if not 0 < len(key) <= LONGEST_KEY or not key.isascii() or not key.isprintable():
            raise RequestError(f"Idempotency-Key should be 1 to {LONGEST_KEY} printable ASCII characters")
        async with self._keys.setdefault(key, asyncio.Lock()):  # of two with one key the second waits for the first
            known = await asyncio.to_thread(self.jobs_kept.by_key, key)
            if known is None:
                return await self._accept(asked, key)
        if known.asked != _digest(asked):
            raise RequestError("Idempotency-Key: it came with another request before; use a new one")
        return await self.job(known.id)

    async def job(self, id: str) -> JobView:
        """Raises NotFound."""
        if row := self.dispatcher.rows.get(id):
            return self.dispatcher.view(row)
        if view := self.dispatcher.ended(id):
            return view
        kept = await asyncio.to_thread(self.jobs_kept.get, id)
        if kept is None:
            raise NotFound(f"there is no job {quoted(id)}")
        return await asyncio.to_thread(self._ended_view, kept)

    async def jobs(self, states: Collection[str] = (), limit: int = 100) -> list[JobView]:
        """Running ones, then waiting ones in their order, then the latest that have ended. Raises RequestError."""
        for state in states:
            if state not in STATES:
                raise RequestError(f"state {quoted(state)}: {nearest(state, STATES)}", fields=("state",))
        rows = self.dispatcher.rows
        order = [*(id for id, row in rows.items() if row.state != QUEUED), *self.dispatcher.queue]
        found = [self.dispatcher.view(rows[id]) for id in order if not states or rows[id].state in states]
        wanted = [state for state in ENDED if not states or state in states]
        if wanted and len(found) < limit:
            ended = await asyncio.to_thread(self.jobs_kept.ended, wanted, limit - len(found))
            found += await asyncio.to_thread(lambda: [self._ended_view(row) for row in ended])
        return found[:limit]

    async def finished(self, id: str) -> JobView:
        """Wait until a job has ended. Raises NotFound."""
        await self.dispatcher.over(id)
        return await self.job(id)

    async def watch(self, id: str, after: str = "") -> AsyncIterator[Message]:
        """A job's events from `after` on, until it has ended. Raises NotFound."""
        view = await self.job(id)
        if view.state in ENDED and not after:
            yield self.streams.snapshot(view.plain())
        if view.state in ENDED:
            yield self.streams.snapshot(view.plain(), END)
            return
        async for message in self.streams.of_job(id, after, lambda: self._now(id)):
            yield message

    def preview(self, id: str) -> dict[str, Plain] | None:
        """The last preview of a job, as its event has it; None where there was none."""
        return self.streams.latest(id, PREVIEW)

    async def watch_all(self, after: str = "") -> AsyncIterator[Message]:
        """The events of all jobs, for ever."""

        def whole() -> list[dict[str, Plain]]:
            return [self.dispatcher.view(row).plain() for row in self.dispatcher.rows.values()]

        async for message in self.streams.of_all(after, whole):
            yield message

    async def cancel(self, id: str) -> JobView:
        """Raises NotFound, or Conflict for one that had ended."""
        await self.job(id)
        await self.dispatcher.cancel(id)
        return await self.job(id)

    async def move(self, id: str, position: int) -> JobView:
        """Put a waiting job at a place in the queue. Raises NotFound, Conflict."""
        await self.job(id)
        return self.dispatcher.move(id, position)

    # ------------------------------------------------------------------ questions

    async def ask(self, op: str, **plain: Plain) -> dict[str, Plain]:
        """A quick question to a worker. Raises as the pipeline does, or Unavailable."""
        return await self._worker().ask(op, **plain)

    async def ask_all(self, op: str, **plain: Plain) -> list[dict[str, Plain]]:
        """The same to every worker that is ready. Raises Unavailable where there is none."""
        ready = [worker for worker in self.dispatcher.workers if worker.state in (READY, BUSY)]
        return list(await asyncio.gather(*(worker.ask(op, **plain) for worker in ready or [self._worker()])))

    async def compute(self, op: str, **asked: Plain) -> dict[str, Plain]:
        """Short work that goes before the queue: "encode" or "rewrite". Raises as the pipeline does."""
        if self.dispatcher.stopping:
            raise Unavailable("the server is stopping", retry_after=30)
        id = new_id()
        path = self._captions / f"{id}{ENDING}"
        message = {"op": "compute", "id": id, "what": op, "asked": asked, "path": str(path)}
        return await self.dispatcher.compute(Task(id, message))

    def health(self) -> dict[str, Plain]:
        """Whether it can draw, and what its workers do."""
        workers = self.dispatcher.workers
        told = [{"device": w.device_name, "state": w.state, "job": w.task, "restarts": w.restarts} for w in workers]
        ready = any(worker.state in (READY, BUSY) for worker in workers)
        status = "stopping" if self.dispatcher.stopping else "ok" if ready else "starting"
        return {
            "status": "degraded" if status == "ok" and self.dispatcher.books.full else status,
            "version": __version__,
            "uptime": round(time.time() - self.begun, 1),
            "queue": len(self.dispatcher.queue),
            "running": sum(worker.state == BUSY for worker in workers),
            "workers": told,
        }

    # ------------------------------------------------------------------ accepting

    async def _accept(self, asked: Asked, key: str | None) -> JobView:
        self._accepting += 1
        try:
            self._admit()
            row = await self._prepared(asked, key)
            await asyncio.to_thread(self.jobs_kept.add, row)
        finally:
            self._accepting -= 1
        return self.dispatcher.add(row)

    def _admit(self) -> None:
        """Raise a Refusal where no further job can be taken."""
        if self.dispatcher.stopping:
            raise Unavailable("the server is stopping; try again later", retry_after=30)
        if len(self.dispatcher.queue) + self._accepting > self.settings.max_queue:
            raise TooMany(f"{len(self.dispatcher.queue)} jobs are waiting; try again later", retry_after=10)
        if self.dispatcher.books.full or not self._has_room():
            raise NoRoom(f"less than {self.settings.min_free} MB are free on the server's disk; no new jobs are taken")

    async def _prepared(self, asked: Asked, key: str | None) -> JobRow:
        files = await attached(asked, self.uploads, self)
        launch = self.launch
        values = laid_over(launch.defaults, {**asked.values, **asked.rewrite, **files.values}, launch.presets)
        request = {name: value for name, value in values.items() if name in Request.names()}
        rewrite = {name: value for name, value in values.items() if name in RewriteSettings.names()}
        wanted = rewrite if rewrite.get("rewriter") else None
        id = new_id()
        with named(files.places):
            told = await self.ask("prepare", id=id, values=request, lora=files.lora, rewrite=wanted)
        check_limits(told["request"], self.settings)
        check_canvas(told["job"]["frame"][:2], self.settings)
        check_tokens(told["tokens"], "embeddings" if "embeddings" in files.values else "prompt", self.settings)
        row = JobRow(id, asked.form, _digest(asked), told["request"], told["seeds"], told["job"], wanted, key)
        row.uploads, row.notes = files.hashes, [*told["said"], *told["notes"]]
        return row

    # ------------------------------------------------------------------ the rest

    def _worker(self) -> Worker:
        """The one that answers questions: the first that is ready, else the first."""
        workers = self.dispatcher.workers
        return next((worker for worker in workers if worker.state in (READY, BUSY)), workers[0])

    def _now(self, id: str) -> dict[str, Plain]:
        row = self.dispatcher.rows.get(id)
        view = self.dispatcher.view(row) if row else self.dispatcher.ended(id)
        return view.plain() if view else {}

    def _ended_view(self, row: JobRow) -> JobView:
        images = [picture.plain() for picture in self.history.of_job(row.id)] if row.state == DONE or row.images else []
        return JobView.of(row, Progress(), None, images)

    def _clear(self, needed: Collection[str]) -> None:
        """Remove what an earlier life has left: states of jobs that are over, captions that nobody took."""
        for path in self._states.iterdir():
            if path.name not in needed:
                path.unlink(missing_ok=True)
        self._drop_captions(time.time())

    def _drop_captions(self, before: float) -> None:
        """Remove captions that were written before this time: their clients have gone in the meantime."""
        for path in self._captions.iterdir():
            with suppress(FileNotFoundError):  # taken at this moment
                if path.stat().st_mtime < before:
                    path.unlink()

    def _has_room(self) -> bool:
        return shutil.disk_usage(self.folder).free >= self.settings.min_free * 10**6

    async def _sweep(self) -> None:
        """Now and then remove what is not needed any more, and what is past the limits that were set."""
        while True:
            try:
                used = uploads_of(self.dispatcher.rows.values())
                await asyncio.to_thread(self.uploads.sweep, used, UNUSED)
                await asyncio.to_thread(self._drop_captions, time.time() - UNUSED)
                if deleted := await asyncio.to_thread(self.history.tidy):
                    self.streams.tell("", "history", {"deleted": deleted})
                if self.settings.keep_days:
                    await asyncio.to_thread(self.jobs_kept.forget, time.time() - 86_400 * self.settings.keep_days)
            except (ZImageError, OSError) as error:  # of the disk, and maybe gone the next time
                log.warning("what is not needed any more could not be removed: %s", error)
            await asyncio.sleep(SWEEP)


def _digest(asked: Asked) -> str:
    """What tells two requests apart."""
    files = {name: _hash(data) for name, data in asked.attachments.items()}
    lists = {name: [(_hash(one.picture), dict(one.values)) for one in some] for name, some in asked.conditions.items()}
    plain: list[Any] = [dict(asked.values), dict(asked.rewrite), list(asked.lora), files, lists]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
