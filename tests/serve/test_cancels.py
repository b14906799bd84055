"""A cancel at any moment of a task: what it interrupts leaves nothing behind, and the next task has the right bits."""

import io
import random
import signal
import threading
import time

import lora_files
import pytest
from PIL import Image

import zimage
from zimage.errors import RequestError
from zimage.loading.registry import DIT
from zimage.serve.channel import Outlet
from zimage.serve.worker import Worker

SMALL = {"width": 64, "height": 64, "steps": 4, "seed": 1}
PLAIN, OTHER = {"prompt": "a cat", **SMALL}, {"prompt": "a dog", "images": 2, **SMALL}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return lora_files.strong(tmp_path_factory.mktemp("loras") / "strong.safetensors", zimage.ZImage.load())


@pytest.fixture(scope="module")
def right():
    return [image.tobytes() for image in zimage.ZImage.load().generate(**PLAIN).images]


class Rig:
    """A worker in this process, whose tasks the test gives it; its main thread is that of the test."""

    def __init__(self, folder, **loading):
        for name in ("pictures", "states"):
            (folder / name).mkdir()
        self.folder, self.tasks = folder, 0
        start = {"loading": loading, "data": str(folder), "encoder_only": False, "previews": True}
        self.worker = Worker(Outlet(io.BytesIO()), start)
        self.worker.studio.warm_up()

    def task(self, request, lora=None):
        self.tasks += 1
        loras = [{"name": lora.name, "scale": 1.0, "path": str(lora)}] if lora else None
        asked = {"op": "prepare", "id": f"job-{self.tasks}", "values": request, "lora": loras, "rewrite": None}
        told = self.worker.studio.answer(asked, idle=True)
        return {"op": "run", "id": asked["id"], "job": told["job"], "rewrite": None, "rewritten": []}

    def run(self, task, cancel_after=None):
        """What became of a task, as `Worker.work` finds out."""
        self.worker._now_running(task["id"])
        timer = threading.Timer(cancel_after or 0, self.worker._cancel, [task["id"]])
        if cancel_after is not None:
            timer.start()
        outcome = self.worker._outcome(task)
        self.worker._now_running("")
        if cancel_after is not None:
            timer.join()
        return outcome

    def pixels(self, task):
        return [Image.open(path).tobytes() for path in sorted((self.folder / "pictures").glob(f"{task['id']}-*"))]


@pytest.fixture
def rig(tmp_path):
    """Makes rigs. Ctrl-C means nothing outside of a task, as in the process."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    yield lambda **loading: Rig(tmp_path, **loading)
    signal.signal(signal.SIGINT, before)


def starved(make):
    """One with so little memory that blocks of the DiT are streamed."""
    rig = make()
    least = next(megabytes for megabytes in range(1, 100_000) if _fits(rig, megabytes))
    assert _fits(rig, least + 3)  # what the adapter takes beside it, too
    assert rig.worker.studio.pipe.prepare(zimage.Request(**PLAIN)).plan.stages[DIT].streamed
    return rig


def _fits(rig, megabytes):
    pipe = rig.worker.studio.pipe
    pipe.planner.settings = zimage.settings.loading.LoadSettings(memory=megabytes / 1e3)
    try:
        pipe.prepare(zimage.Request(**PLAIN))
    except RequestError:
        return False
    return True


KINDS = {"all kept": lambda make: make(), "by stage": lambda make: make(residency="stage"), "starved": starved}


@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cancel_at_any_moment_changes_nothing_of_the_next_picture(rig, lora, right, kind, times):
    chance, rig = random.Random(times), KINDS[kind](rig)
    residency = rig.worker.studio.pipe.residency
    whole = _seconds_of(rig)
    states = []
    for i in range(times):
        cancelled = rig.task(OTHER, lora if i % 2 else None)
        states.append(rig.run(cancelled, chance.uniform(0, 2.2 * whole))["state"])
        assert +residency._busy == {}, "a component counts as busy for ever"
        plain = rig.task(PLAIN)
        assert rig.run(plain)["state"] == "done"
        assert rig.pixels(plain) == right
    assert "cancelled" in states
    assert set(states) <= {"cancelled", "done"}
    assert not list((rig.folder / "states").iterdir())
    assert not list((rig.folder / "pictures").glob(".*"))


def _seconds_of(rig):
    rig.run(rig.task(PLAIN))
    begun = time.monotonic()
    rig.run(rig.task(PLAIN))
    return time.monotonic() - begun


def test_a_cancel_that_comes_after_the_end_interrupts_nothing(rig, right):
    rig = rig()
    first, second = rig.task(PLAIN), rig.task(PLAIN)
    assert rig.run(first)["state"] == "done"
    rig.worker._cancel(first["id"])
    assert rig.run(second)["state"] == "done"
    rig.worker._cancel(first["id"])
    assert rig.pixels(second) == right


def test_a_cancel_that_comes_before_the_beginning_ends_the_task(rig):
    rig = rig()
    task = rig.task(PLAIN)
    rig.worker._cancel(task["id"])
    assert rig.run(task)["state"] == "cancelled"
    assert not rig.pixels(task)


def test_an_interrupt_of_the_task_before_draws_this_one_anew(rig, right):
    """It was raised late: in an import, an interrupt waits for the end of it."""
    rig = rig()
    task = rig.task(PLAIN)
    rig.worker._now_running(task["id"])
    timer = threading.Timer(0.05, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    assert rig.worker._outcome(task)["state"] == "done"
    timer.join()
    assert rig.pixels(task) == right


def test_a_picture_of_a_cancelled_task_is_one_that_was_told_of(rig, monkeypatch):
    """The cancel comes while the file is written: it waits until the server has heard of it."""
    rig = rig()
    task, save = rig.task(PLAIN), zimage.serve.drawing.save

    def cancelled(*args, **named):
        rig.worker._cancel(task["id"])
        return save(*args, **named)

    told = []
    monkeypatch.setattr("zimage.serve.drawing.save", cancelled)
    rig.worker.studio.send = lambda message: told.append(message["on"])
    assert rig.run(task)["state"] == "cancelled"
    assert len(rig.pixels(task)) == told.count("image") == 1


def test_a_worker_whose_task_was_cancelled_is_idle(rig):
    """What is asked of an idle one has to fit in memory."""
    rig = rig()
    rig.worker._tasks.put(task := rig.task(PLAIN))
    rig.worker._cancel(task["id"])
    answers, send = [], rig.worker.send
    rig.worker.studio.answer = lambda question, idle: answers.append(idle) or {}

    def then(message):
        send(message)
        if message["on"] == "ended":
            rig.worker._answer({"op": "tokens", "re": 1})
            raise SystemExit

    rig.worker.send = then
    with pytest.raises(SystemExit):
        rig.worker.work()
    assert answers == [True]
