"""Jobs on their way through the workers: who runs what, what is told of it, and what is kept.

    add ─→ queue ─→ a free worker ─→ its messages ─→ streams (at once) ─→ the database and the history (in order)

All of this runs in the event loop; what touches the disk runs in threads. What cannot be written, since the disk is
full, is tried again until it can, and nothing new is begun meanwhile.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from zimage.errors import RequestError
from zimage.serve import leftovers
from zimage.serve.books import RETRY, Books
from zimage.serve.channel import Message
from zimage.serve.history import History
from zimage.serve.jobs import CANCELLED, DONE, FAILED, QUEUED, RUNNING, JobRow, Jobs
from zimage.serve.metrics import Metrics
from zimage.serve.places import Place
from zimage.serve.refusals import Conflict, Unavailable
from zimage.serve.stream import END, JOB, POSITION, QUEUE, Streams
from zimage.serve.view import JobView, Progress
from zimage.serve.workers import READY, Worker, raised

log = logging.getLogger("zimage.serve")

MOST_DEATHS = 2  # of processes in the middle of one job
MOST_RESTARTS = 20  # of servers
MOST_UNWRITTEN = 3  # times that a job's pictures could not be written, though there seemed to be room
REMEMBERED = 100  # jobs that have ended
MOMENT = 0.2  # seconds between two words on who waits where
TOGETHER = 3.0  # seconds in which the workers of a machine that went are missed, one after the other
CANCELLING = 5.0  # seconds that a cancel waits for the worker to let go


class Task:
    """Short work that a client waits for; it goes before the queue, and is not kept."""

    def __init__(self, id: str, message: Message):
        self.id, self.message = id, message
        self.result: asyncio.Future[Message] = asyncio.get_running_loop().create_future()


class Dispatcher:
    """The queue at work."""

    def __init__(
        self,
        jobs: Jobs,
        history: History,
        streams: Streams,
        metrics: Metrics,
        folder: Path,
        has_room: Callable[[], bool],
    ):
        self.jobs, self.history, self.streams, self._folder = jobs, history, streams, folder
        self._metrics, self._has_room = metrics, has_room
        self.workers: list[Worker] = []
        self.rows: dict[str, JobRow] = {}
        self.queue: list[str] = []
        self.stopping = False
        self.books = Books(self.go_on)
        self._progress: dict[str, Progress] = {}
        self._images: dict[str, list[dict[str, Any]]] = {}
        self._tasks: deque[Task] = deque()
        self._under_way: dict[str, Task] = {}
        self._cancelling: set[str] = set()
        self._unwritten: Counter[str] = Counter()
        self._over: dict[str, asyncio.Event] = {}
        self._ended: OrderedDict[str, JobView] = OrderedDict()
        self._positions_due = False

    # ------------------------------------------------------------------ beginning and end

    def start(self, places: Sequence[Place], waiting: Sequence[JobRow]) -> None:
        """Take up the jobs of an earlier life, and start the workers."""
        for row in waiting:
            row.restarts += row.state == RUNNING
            row.state = QUEUED
            self._enter(row)
            if row.restarts > MOST_RESTARTS:
                self.queue.remove(row.id)
                told = {"message": f"the server ended {row.restarts} times over this job", "fields": []}
                self._close(row, FAILED, told)
        self.books.start()
        for place in places:
            worker = Worker(place, self._hear)
            self.workers.append(worker)
            worker.start()

    async def stop(self, seconds: float) -> None:
        """Let running jobs end, for some seconds; those that do not are queued again, their state kept."""
        self.stopping = True
        running = [self._over[row.id].wait() for row in self.rows.values() if row.state == RUNNING]
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*running)
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        for task in [*self._tasks, *self._under_way.values()]:
            if not task.result.done():
                task.result.set_exception(Unavailable("the server is stopping"))
        self.streams.close()
        for row in list(self.rows.values()):
            if row.id in self._cancelling:
                self._close(row, CANCELLED)
            elif row.state == RUNNING:
                row.state = QUEUED
                self._save(row)
        await self.books.stop()
        for over in self._over.values():  # nothing more becomes of these jobs in this life
            over.set()

    # ------------------------------------------------------------------ what is asked for

    def add(self, row: JobRow) -> JobView:
        """Queue a job that is in the database."""
        self._enter(row)
        self.streams.tell(row.id, JOB, self.view(row).plain())
        self.go_on()
        return self.view(row)

    def view(self, row: JobRow) -> JobView:
        position = self.queue.index(row.id) if row.state == QUEUED and row.id in self.queue else None
        progress = self._progress.get(row.id) or Progress()
        return JobView.of(row, progress, position, list(self._images.get(row.id, ())))

    def ended(self, id: str) -> JobView | None:
        """A job that ended a short time ago."""
        return self._ended.get(id)

    async def over(self, id: str) -> None:
        """Wait until a job has ended."""
        if event := self._over.get(id):
            await event.wait()

    async def cancel(self, id: str) -> None:
        """End a job that has not ended. Raises Conflict where it had."""
        row = self.rows.get(id)
        if row is None:
            raise Conflict(f"job {id} has ended already")
        if id in self.queue:
            self.queue.remove(id)
            self._close(row, CANCELLED)
        elif id not in self._cancelling:
            self._cancelling.add(id)
            for worker in self.workers:
                if worker.task == id:
                    worker.send({"op": "cancel", "id": id})
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCELLING):
                await self.over(id)

    def move(self, id: str, position: int) -> JobView:
        """Put a waiting job at a place in the queue. Raises Conflict for one that does not wait."""
        if id not in self.queue:
            raise Conflict(f"job {id} does not wait any more")
        self.queue.remove(id)
        self.queue.insert(position, id)
        place = self.queue.index(id)
        before = self.rows[self.queue[place - 1]].place if place else None
        behind = self.rows[self.queue[place + 1]].place if place + 1 < len(self.queue) else None
        row = self.rows[id]
        row.place = _between(before, behind)
        self._save(row)
        self._queue_changed()
        return self.view(row)

    async def compute(self, task: Task) -> Message:
        """The result of short work. Raises as the pipeline does; given up, it is cancelled."""
        self._tasks.append(task)
        self.go_on()
        try:
            return await task.result
        finally:
            if task in self._tasks:
                self._tasks.remove(task)
            elif not task.result.done() or task.result.cancelled():
                for worker in self.workers:
                    if worker.task == task.id:
                        worker.send({"op": "cancel", "id": task.id})

    def go_on(self) -> None:
        """Give the workers that are free something to do."""
        for worker in self.workers:
            if worker.state != READY or self.stopping or self.books.full:
                continue
            if self._tasks:
                task = self._tasks.popleft()
                worker.task, self._under_way[task.id] = task.id, task
                worker.send(task.message)
            elif self.queue:
                self._begin(worker, self.rows[self.queue.pop(0)])

    # ------------------------------------------------------------------ what workers say

    def _hear(self, worker: Worker, message: Message) -> None:
        match message["on"]:
            case "ready":
                self._check_model(worker)
                self.go_on()
            case "died":
                self._died(worker)
            case "ended":
                worker.task = ""
                self._finished(message)
                self.go_on()
            case kind if row := self.rows.get(message["id"]):
                getattr(self, f"_on_{kind}")(row, message)

    def _check_model(self, worker: Worker) -> None:
        """Let one go whose model is not that of the others: it would refuse the jobs that they have prepared."""
        others = [_model(other) for other in self.workers if other is not worker and other.about and not other.refusal]
        if others and (mine := _model(worker)) != others[0]:
            told = f"its model is {mine}, and another worker has {others[0]}"
            worker.refuse(RequestError(f"{told}; open the same everywhere, and set dtype", fields=("model", "dtype")))

    def _on_progress(self, row: JobRow, message: Message) -> None:
        progress = self._progress[row.id]
        progress.update(message)
        self.streams.tell(row.id, "progress", {"job": row.id, **progress.plain()})

    def _on_preview(self, row: JobRow, message: Message) -> None:
        shown = {name: message[name] for name in ("index", "step", "width", "height", "image")}
        self.streams.tell(row.id, "preview", {"job": row.id, **shown})

    def _on_note(self, row: JobRow, message: Message) -> None:
        if message["text"] not in row.notes:
            row.notes.append(message["text"])

    def _on_rewritten(self, row: JobRow, message: Message) -> None:
        """From here on the job is that of the new prompts."""
        row.job, row.request, row.rewritten = message["job"], message["request"], message["rewritten"]
        row.rewrite = None
        self._save(row)
        self.streams.tell(row.id, JOB, self.view(row).plain())

    def _on_image(self, row: JobRow, message: Message) -> None:
        self.books.put(lambda: self._take_in(row, message["index"], message["image"]))

    async def _take_in(self, row: JobRow, index: int, id: str) -> None:
        """A picture that is drawn becomes one of the history."""
        path = self._folder / leftovers.PICTURES / f"{id}.png"
        picture = (await self.books.kept(lambda: self.history.add(path, id, row.id))).plain()
        row.images = [*row.images, *([id] if id not in row.images else [])]
        images = self._images.setdefault(row.id, [])
        images[:] = [*(image for image in images if image["id"] != id), picture]
        self.streams.tell(row.id, "image", {"job": row.id, "index": index, "image": picture})

    def _finished(self, message: Message) -> None:
        """What became of a task or a job."""
        if task := self._under_way.pop(message["id"], None):
            if not task.result.done():
                _settle(task.result, message)
            return
        row = self.rows.get(message["id"])
        if row is None:
            return
        error = message.get("error")
        row.timings = message.get("timings", {})
        told = {"message": error["message"], "fields": error["fields"]} if error else None
        unwritten = bool(error and error["kind"] == "OutputError") and row.id not in self._cancelling
        self._unwritten[row.id] += unwritten
        if unwritten and self._unwritten[row.id] <= MOST_UNWRITTEN:
            self.books.lacking.add(row.id)
            self.books.put(lambda: self._wait_for_room(row))
        else:
            self._close(row, message["state"], told)

    async def _wait_for_room(self, row: JobRow) -> None:
        """A picture could not be written: the job is drawn again once there is room."""
        log.warning("job %s waits: its picture cannot be written", row.id)
        while not self.stopping and not await asyncio.to_thread(self._has_room):
            await asyncio.sleep(RETRY)
        self._requeue(row)
        self.books.has_room(row.id)

    def _died(self, worker: Worker) -> None:
        id, worker.task = worker.task, ""
        if (task := self._under_way.pop(id, None)) and not task.result.done():
            task.result.set_exception(Unavailable("the worker ended over this; try again", retry_after=5))
        row = self.rows.get(id)
        if row is None or self.stopping:
            return
        row.deaths += 1
        if id in self._cancelling:
            self._close(row, CANCELLED)
        elif row.deaths >= MOST_DEATHS:
            text = f"its process ended unexpectedly {row.deaths} times; it may need more memory than there is"
            self._close(row, FAILED, {"message": text, "fields": []})
        elif worker.is_elsewhere:
            asyncio.get_running_loop().call_later(TOGETHER, self._again, row)
        else:
            self._requeue(row)

    def _again(self, row: JobRow) -> None:
        """Once it has shown which workers went together with the one that a job had."""
        if not self.stopping:
            self._requeue(row)

    # ------------------------------------------------------------------ states

    def _enter(self, row: JobRow) -> None:
        self.rows[row.id], self._progress[row.id] = row, Progress()
        self._over[row.id] = asyncio.Event()
        self.queue.append(row.id)
        self._queue_changed()

    def _begin(self, worker: Worker, row: JobRow) -> None:
        row.state, row.started, worker.task = RUNNING, row.started or time.time(), row.id
        asked = {"job": row.job, "rewrite": row.rewrite, "rewritten": row.rewritten}
        worker.send({"op": "run", "id": row.id, **asked})
        self._save(row)
        self.streams.tell(row.id, JOB, self.view(row).plain())
        self._queue_changed()

    def _requeue(self, row: JobRow) -> None:
        """Once more, before all others, unless it was cancelled meanwhile."""
        if row.id in self._cancelling:
            return self._close(row, CANCELLED)
        row.state, self._progress[row.id] = QUEUED, Progress()
        self.queue.insert(0, row.id)
        self._save(row)
        self.streams.tell(row.id, JOB, self.view(row).plain())
        self._queue_changed()
        self.go_on()

    def _close(self, row: JobRow, state: str, error: dict[str, Any] | None = None) -> None:
        """End a job, once what was told of it before is kept."""
        if row.started is None:
            return self._end(row, state, error)
        self.books.put(lambda: self._tidy_and_end(row, state, error))

    async def _tidy_and_end(self, row: JobRow, state: str, error: dict[str, Any] | None) -> None:
        """What it has drawn stays, also where the process ended before it could tell of it."""
        try:
            if state != DONE or row.deaths:
                for index, id in await self.books.kept(lambda: leftovers.clear(self._folder, row)):
                    if id not in row.images:
                        await self._take_in(row, index, id)
        finally:
            self._end(row, state, error)

    def _end(self, row: JobRow, state: str, error: dict[str, Any] | None = None) -> None:
        row.state, row.error, row.finished = state, error, time.time()
        row.job = row.rewrite = None
        if state == DONE:
            self._progress[row.id] = Progress()
        view = self.view(row)
        self._metrics.ended(view)
        self._ended[row.id] = view
        for known in (self.rows, self._progress, self._images, self._unwritten):
            known.pop(row.id, None)
        self._cancelling.discard(row.id)
        if row.id in self.queue:
            self.queue.remove(row.id)
        self._save(row)
        self.streams.tell(row.id, END, view.plain())
        self._over.pop(row.id).set()
        self._queue_changed()

    # ------------------------------------------------------------------ what is kept

    def _save(self, row: JobRow) -> None:
        """Write down how a job is now, after what is to be written before."""
        now = row.copy()

        async def write() -> None:
            await self.books.kept(lambda: self.jobs.put(now))
            while now.ended and len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)

        self.books.put(write)

    # ------------------------------------------------------------------ the order

    def _queue_changed(self) -> None:
        """Tell it once, however much changes in a moment: every waiting job has readers."""
        if not self._positions_due:
            self._positions_due = True
            asyncio.get_running_loop().call_later(MOMENT, self._tell_positions)

    def _tell_positions(self) -> None:
        self._positions_due = False
        for position, id in enumerate(self.queue):
            self.streams.tell(id, POSITION, {"job": id, "position": position})
        self.streams.tell("", QUEUE, {"order": list(self.queue)})


def _model(worker: Worker) -> str:
    """What a job is prepared for."""
    about = worker.about
    return f"{about['model']['name']} {about['model']['fingerprint']} in {about['dtype']}"


def _between(before: float | None, behind: float | None) -> float:
    if before is None:
        return 0.0 if behind is None else behind - 1
    return before + 1 if behind is None else (before + behind) / 2


def _settle(result: "asyncio.Future[Message]", message: Message) -> None:
    if message["state"] == DONE:
        result.set_result(message["result"])
    elif "error" in message:
        result.set_exception(raised(message["error"]))
    else:
        result.cancel()
