"""Moments at which something else happens too: cancels, deaths, full disks and orders, in any order; no job is lost.

The queue runs with a worker that does what the test says, message by message.
"""

import asyncio
import contextlib
import os
import signal
import sqlite3
import threading
import time

import histories
import pytest

from zimage import interrupts
from zimage.serve import books, dispatch, workers
from zimage.serve.channel import Outlet, read
from zimage.serve.database import Database
from zimage.serve.dispatch import Dispatcher
from zimage.serve.history import History
from zimage.serve.jobs import CANCELLED, DONE, FAILED, QUEUED, RUNNING, JobRow, Jobs, new_id
from zimage.serve.metrics import Metrics
from zimage.serve.places import HERE, Place
from zimage.serve.refusals import Conflict, NoRoom, Unavailable
from zimage.serve.stream import LENGTH, Streams

UNWRITTEN = {"message": "no room", "fields": [], "kind": "OutputError"}


class FakeWorker:
    """Takes messages and says what it is told to say."""

    device_name, about, restarts, refusal = "cpu", {}, 0, None
    is_elsewhere = False

    def __init__(self, place, hear):
        self.hear, self.task, self.lives, self.got = hear, "", True, []

    @property
    def state(self):
        return workers.STARTING if not self.lives else workers.BUSY if self.task else workers.READY

    def start(self):
        pass

    def send(self, message):
        self.got.append((message["op"], message["id"]))

    async def stop(self):
        self.lives = False

    def refuse(self, error):
        self.refusal, self.lives = error, False

    def says(self, on, **message):
        self.hear(self, {"on": on, **message})

    def draws(self, queue, id, index=0):
        histories.draw(queue.folder / "pictures" / f"{id}-{index + 1}.png")

    def ends(self, id, state=DONE, **more):
        self.says("ended", id=id, state=state, **more)


class Queue:
    """A dispatcher in a folder, as a service has it."""

    def __init__(self, folder, workers=1):
        self.folder, self.room = folder, True
        self.database = Database(folder / "index.sqlite")
        self.jobs, self.streams = Jobs(self.database), Streams()
        self.history = History(folder, self.database)
        (folder / "states").mkdir(exist_ok=True)
        self.dispatcher = Dispatcher(self.jobs, self.history, self.streams, Metrics(), folder, lambda: self.room)
        self.dispatcher.start([Place("", HERE, {})] * workers, self.jobs.waiting())
        self.worker = self.dispatcher.workers[0]

    def submit(self, images=1):
        row = JobRow(new_id(), "own", "", {"prompt": "a"}, list(range(images)), {})
        self.jobs.add(row)
        self.dispatcher.add(row)
        return row.id

    async def written(self):
        """What was told so far is in the database."""
        await self.dispatcher.books.written()

    def state(self, id):
        row = self.dispatcher.rows.get(id)
        kept = self.jobs.get(id)
        assert row is None or kept.state == row.state, "memory and database differ"
        return kept.state

    def remembers(self):
        """Everything that is kept of jobs in memory, by the id of each."""
        d = self.dispatcher
        maps = (d.rows, d._progress, d._images, d._over, d._unwritten, d._cancelling, d._under_way, self.streams._logs)
        return {id for known in maps for id in known} | set(d.queue)

    def images(self, id):
        return [picture.id for picture in self.history.of_job(id)]


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "Worker", FakeWorker)
    monkeypatch.setattr(books, "RETRY", 0.01)
    monkeypatch.setattr(dispatch, "RETRY", 0.01)
    monkeypatch.setattr(dispatch, "CANCELLING", 0.05)
    monkeypatch.setattr(dispatch, "TOGETHER", 0.05)
    opened = []

    def make(workers=1):
        opened.append(Queue(tmp_path / "data", workers))
        return opened[-1]

    yield make
    for one in opened:
        with contextlib.suppress(Unavailable):
            histories.consistent(one.history)
            one.database.close()


def in_loop(test):
    """Run a test in an event loop of its own."""

    def run(queue):
        asyncio.run(asyncio.wait_for(test(queue), 30))

    return run


@in_loop
async def test_nothing_of_a_job_stays_in_memory_when_it_has_ended(queue):
    q = queue()
    for cancelled_at in ("waiting", "running", "never"):
        id, other = q.submit(), q.submit()
        if cancelled_at == "waiting":
            await q.dispatcher.cancel(other)
        if cancelled_at == "running":
            await q.dispatcher.cancel(id)
        q.worker.draws(q, id)
        q.worker.says("image", id=id, index=0, image=f"{id}-1")
        q.worker.ends(id, CANCELLED if cancelled_at == "running" else DONE)
        if cancelled_at != "waiting":
            q.worker.ends(other)
        await q.written()
    assert q.remembers() == set()


@in_loop
async def test_the_views_of_ended_jobs_that_are_remembered_are_few(queue):
    q = queue()
    ids = [q.submit() for _ in range(dispatch.REMEMBERED + 20)]
    for id in ids:
        q.worker.ends(id)
    await q.written()
    assert len(q.dispatcher._ended) == dispatch.REMEMBERED
    assert all(q.jobs.get(id).state == DONE for id in ids)


@in_loop
async def test_a_job_that_is_cancelled_while_its_worker_dies_stays_cancelled(queue):
    q = queue()
    id = q.submit()
    await q.dispatcher.cancel(id)  # the worker does not let go
    assert q.worker.got == [("run", id), ("cancel", id)]
    q.worker.says("died")
    await q.written()
    assert q.state(id) == CANCELLED


@in_loop
async def test_a_job_that_waits_for_room_can_be_cancelled(queue):
    """Its picture could not be written, no worker has it, and it is not drawn once more."""
    q = queue()
    id = q.submit()
    q.room = False
    q.worker.ends(id, FAILED, error=UNWRITTEN)
    await asyncio.sleep(0.05)
    assert q.dispatcher.books.full
    await q.dispatcher.cancel(id)
    q.room = True
    await q.written()
    await q.written()
    assert q.state(id) == CANCELLED
    assert q.worker.got == [("run", id)]


@in_loop
async def test_a_job_whose_picture_cannot_be_written_waits_and_is_drawn_again(queue):
    q = queue()
    id, other = q.submit(), q.submit()
    q.room = False
    q.worker.ends(id, FAILED, error=UNWRITTEN)
    await asyncio.sleep(0.05)
    assert q.worker.got == [("run", id)]  # nothing new is begun
    q.room = True
    await asyncio.sleep(0.1)
    assert q.worker.got == [("run", id)] * 2
    q.worker.ends(id)
    await q.written()
    assert (q.state(id), q.state(other)) == (DONE, RUNNING)


@in_loop
async def test_a_picture_that_nobody_heard_of_is_found_when_the_job_ends(queue):
    """The worker died between the picture and the word of it, and the job is cancelled before it is drawn again."""
    q = queue()
    id = q.submit(images=2)
    q.worker.draws(q, id)
    (q.folder / "states" / f"{id}.safetensors").touch()
    (q.folder / "states" / f".{id}-0123.safetensors").touch()
    (q.folder / "pictures" / f".{id}-2-0123.png").touch()
    q.worker.lives = False
    q.worker.says("died")
    await q.dispatcher.cancel(id)
    await q.written()
    assert q.state(id) == CANCELLED
    assert q.images(id) == [f"{id}-1"]
    assert q.jobs.get(id).images == [f"{id}-1"]
    assert not list((q.folder / "states").iterdir())
    assert [path.name for path in (q.folder / "pictures").iterdir()] == [f"{id}-1.png"]


@in_loop
async def test_a_worker_that_dies_after_a_picture_draws_no_second_one(queue):
    q = queue()
    id = q.submit()
    for _ in range(2):
        q.worker.draws(q, id)
        q.worker.says("image", id=id, index=0, image=f"{id}-1")
        if q.worker.got.count(("run", id)) == 1:
            q.worker.says("died")
    q.worker.ends(id)
    await q.written()
    assert q.worker.got == [("run", id)] * 2
    assert q.images(id) == q.jobs.get(id).images == [f"{id}-1"]


@in_loop
async def test_a_job_fails_after_two_deaths_and_the_next_one_runs(queue):
    q = queue()
    id, other = q.submit(), q.submit()
    q.worker.says("died")
    q.worker.says("died")
    await q.written()
    assert q.state(id) == FAILED
    assert q.worker.task == other or q.dispatcher.queue == [other]


@in_loop
async def test_a_damaged_picture_does_not_keep_its_job_from_ending(queue):
    q = queue()
    id = q.submit()
    (q.folder / "pictures" / f"{id}-1.png").write_bytes(b"no picture")
    q.worker.says("image", id=id, index=0, image=f"{id}-1")
    await q.dispatcher.cancel(id)
    q.worker.ends(id, CANCELLED)
    await q.written()
    assert q.state(id) == CANCELLED
    (q.folder / "pictures" / f"{id}-1.png").unlink()


@in_loop
async def test_what_fails_while_books_are_kept_does_not_end_the_keeping(queue):
    q = queue()
    id, other = q.submit(), q.submit()
    q.dispatcher.books.put(lambda: 1 / 0)
    q.worker.ends(id)
    q.worker.ends(other)
    await q.written()
    assert (q.state(id), q.state(other)) == (DONE, DONE)


@in_loop
async def test_a_cancelled_job_is_not_taken_up_by_the_next_server(queue):
    """It had not let go yet when the server was stopped."""
    q = queue()
    id, other = q.submit(), q.submit()
    await q.dispatcher.cancel(id)
    await q.dispatcher.stop(0)
    assert (q.state(id), q.state(other)) == (CANCELLED, QUEUED)


@in_loop
async def test_who_waits_for_a_job_is_let_go_when_the_server_stops(queue):
    q = queue()
    id = q.submit()
    waiting = asyncio.ensure_future(q.dispatcher.over(id))
    await q.dispatcher.stop(0)
    await asyncio.wait_for(waiting, 1)
    assert q.state(id) == QUEUED


@in_loop
async def test_an_end_that_comes_with_the_stop_counts(queue):
    q = queue()
    id = q.submit()
    q.worker.ends(id)
    await q.dispatcher.stop(0)
    assert q.jobs.get(id).state == DONE


@in_loop
async def test_what_ran_when_the_server_was_killed_is_first_in_the_next_life(queue):
    q = queue()
    ids = [q.submit() for _ in range(3)]
    await q.written()
    q.database.close()
    again = queue()
    assert [*again.dispatcher.queue] == ids
    assert again.jobs.get(ids[0]).state == RUNNING
    again.dispatcher.go_on()
    await again.written()
    assert again.jobs.get(ids[0]).restarts == 1
    assert again.worker.got == [("run", ids[0])]


@in_loop
async def test_jobs_that_are_moved_keep_their_order_over_a_restart(queue):
    q = queue()
    _, *ids = [q.submit() for _ in range(5)]
    q.dispatcher.move(ids[3], 0)
    q.dispatcher.move(ids[0], 99)
    q.dispatcher.move(ids[2], 1)
    order = list(q.dispatcher.queue)
    assert order == [ids[3], ids[2], ids[1], ids[0]]
    await q.written()
    q.database.close()
    assert queue().dispatcher.queue[1:] == order


@in_loop
async def test_what_does_not_wait_cannot_be_moved_nor_cancelled_twice(queue):
    q = queue()
    id = q.submit()
    with pytest.raises(Conflict):
        q.dispatcher.move(id, 0)
    q.worker.ends(id)
    await q.written()
    with pytest.raises(Conflict):
        await q.dispatcher.cancel(id)


@in_loop
async def test_an_index_that_is_locked_loses_nothing(queue):
    """Another program writes to it for longer than a writer waits."""
    q = queue()
    q.database._writer.execute("PRAGMA busy_timeout = 10")
    id = q.submit()
    await q.written()
    other = sqlite3.connect(q.folder / "index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    q.worker.ends(id)
    await asyncio.sleep(0.2)
    assert not q.dispatcher.books.full
    other.execute("COMMIT")
    other.close()
    await q.written()
    assert q.jobs.get(id).state == DONE


@in_loop
async def test_a_full_disk_keeps_what_is_to_be_written(queue):
    q = queue()
    put, failing = q.jobs.put, [True]

    def full(*rows):
        if failing[0]:
            raise NoRoom("full")
        put(*rows)

    q.jobs.put = full
    id, other = q.submit(), q.submit()
    await asyncio.sleep(0.05)
    q.worker.ends(id)
    assert q.dispatcher.books.full
    assert q.worker.got == [("run", id)]
    failing[0] = False
    await q.written()
    assert not q.dispatcher.books.full
    assert (q.state(id), q.worker.got[-1]) == (DONE, ("run", other))


# ---------------------------------------------------------------------- events


@in_loop
async def test_a_job_is_not_given_to_a_worker_that_is_gone_as_well(queue):
    """A machine with several workers goes: they are missed one after the other, and the job has died once."""
    q = queue(workers=3)
    first, second, third = q.dispatcher.workers
    first.is_elsewhere = second.is_elsewhere = True
    id = q.submit()
    for worker in (first, second):
        worker.lives = False
        worker.says("died")
        assert third.got == []
    while not third.got:
        await asyncio.sleep(0.01)
    third.draws(q, id)
    third.says("image", id=id, index=0, image=f"{id}-1")
    third.ends(id)
    await q.written()
    assert (q.state(id), q.jobs.get(id).deaths, second.got) == (DONE, 1, [])


@in_loop
async def test_a_worker_with_another_model_gets_no_jobs(queue):
    """A job is prepared by one worker and drawn by any."""
    q = queue(workers=3)
    first, other, same = q.dispatcher.workers
    for worker, dtype in ((first, "float32"), (other, "bfloat16"), (same, "float32")):
        worker.about = {"model": {"name": "demo", "fingerprint": "ab-cd"}, "dtype": dtype}
        worker.says("ready")
    assert (first.refusal, same.refusal) == (None, None)
    assert str(other.refusal).startswith(
        "its model is demo ab-cd in bfloat16, and another worker has demo ab-cd in float32; open the same everywhere"
    )


@in_loop
async def test_a_reader_that_reads_nothing_costs_little(queue):
    """However many jobs come and go, a log has an end, and what its reader missed it gets as whole jobs."""
    q = queue()
    slow = q.streams.of_all("", list)
    q.submit()
    await anext(slow)
    for _ in range(LENGTH):
        q.submit()
        q.worker.ends(q.worker.task)
    await q.written()
    assert len(q.streams._all._messages) == LENGTH
    (log,) = q.streams._logs.values()
    assert len(log._messages) < 10
    await slow.aclose()


@in_loop
async def test_who_connects_while_a_job_ends_hears_of_its_end(queue):
    q = queue()
    id = q.submit()
    reader = q.streams.of_job(id, "", lambda: q.dispatcher.view(q.dispatcher.rows[id]).plain())
    kinds = [(await anext(reader)).event]
    q.worker.ends(id)
    kinds += [message.event async for message in reader]
    assert kinds[0] == "job"
    assert kinds[-1] == "end"


# ---------------------------------------------------------------------- the worker's process


def test_a_message_is_whole_whenever_it_is_interrupted():
    """What is larger than a pipe holds is written in parts; half of one would make nonsense of all that follow."""
    out, into = os.pipe()
    outlet, got = Outlet(os.fdopen(into, "wb")), []

    def slowly():
        with os.fdopen(out, "rb", buffering=0) as stream:
            time.sleep(0.2)
            while (message := read(_Whole(stream))) is not None:
                got.append(message)

    reader = threading.Thread(target=slowly)
    reader.start()
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), interrupts.handled():
        outlet.send({"on": "preview", "image": "x" * 1_000_000})
    outlet.send({"on": "ended"})
    outlet._stream.close()
    reader.join(10)
    assert [message["on"] for message in got] == ["preview", "ended"]


class _Whole:
    """A pipe whose reads give as much as was asked for."""

    def __init__(self, stream):
        self.stream = stream

    def read(self, count):
        found = b""
        while len(found) < count and (piece := self.stream.read(count - len(found))):
            found += piece
        return found
