"""The server's side of a worker process, with processes that do as badly as they can."""

import asyncio
import sys
import time

import pytest

from zimage.errors import RequestError
from zimage.serve import workers
from zimage.serve.places import HERE, Place
from zimage.serve.refusals import Unavailable
from zimage.serve.workers import READY, STARTING, STOPPED, Worker

HEAD = """
import json, os, struct, sys, time
from pathlib import Path
def say(**message):
    text = json.dumps(message).encode()
    sys.stdout.buffer.write(struct.pack(">I", len(text)) + text)
    sys.stdout.buffer.flush()
def hear():
    (length,) = struct.unpack(">I", sys.stdin.buffer.read(4))
    return json.loads(sys.stdin.buffer.read(length))
def nth():  # which process this is, from 1
    lives = Path(hear()["data"], "lives")
    with lives.open("ab") as file:
        file.write(b".")
    return lives.stat().st_size
n = nth()
"""
OPEN = 'say(on="ready", about={"device": "cpu"})\n'
REST = "sys.stdin.buffer.read()\n"


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Makes a worker of a script, which knows which process in a row it is."""
    monkeypatch.setattr(workers, "PAUSES", (0.0, 0.01))

    def make(script):
        monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-S", "-E", "-c", HEAD + script))
        heard = []
        made = Worker(Place("cpu", HERE, {"data": str(tmp_path)}), lambda worker, message: heard.append(message["on"]))
        made.start()
        return made, heard

    return make


def run(test):
    asyncio.run(asyncio.wait_for(test, 30))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_a_process_that_dies_over_a_question_is_asked_once_more(worker):
    async def test():
        made, heard = worker(
            f"{OPEN}question = hear()\nn == 1 and sys.exit(9)\n"
            f'say(on="answer", re=question["re"], answer={{"n": n}}, notes=[])\n{REST}'
        )
        assert await made.ask("tokens") == {"n": 2, "notes": []}
        assert heard == ["ready", "died", "ready"]
        await made.stop()

    run(test())


def test_a_question_that_ends_every_process_is_given_up(worker):
    async def test():
        made, _ = worker(OPEN + "hear()\n")
        with pytest.raises(Unavailable, match="ended over this question twice"):
            await made.ask("tokens")
        await made.stop()

    run(test())


def test_one_that_cannot_open_the_model_says_why_and_gets_no_jobs(worker):
    async def test():
        made, heard = worker(
            'say(on="refused", error={"kind": "request", "message": "no such device", "fields": ["device"]})\n'
        )
        with pytest.raises(RequestError, match="no such device"):
            await made.ready()
        assert made.state == STOPPED
        assert "ready" not in heard
        await made.stop()

    run(test())


def test_one_that_could_open_the_model_tries_until_it_can_again(worker):
    """Its file is gone for a moment, or another program has the memory."""
    refuse = 'say(on="refused", error={"kind": "ZImageError", "message": "no memory", "fields": []}); sys.exit(1)'

    async def test():
        made, heard = worker(f"if n in (2, 3):\n    {refuse}\n{OPEN}if n == 1:\n    sys.exit(9)\n{REST}")
        await until(lambda: heard.count("ready") == 2)
        assert made.state == READY
        assert heard == ["ready", "died", "died", "died", "ready"]
        await made.stop()

    run(test())


def test_one_that_hangs_in_its_start_is_ended_and_another_one_tries(worker, monkeypatch):
    monkeypatch.setattr(workers, "OPENING", 0.5)

    async def test():
        made, heard = worker(f"if n == 1:\n    time.sleep(600)\n{OPEN}{REST}")
        with pytest.raises(Unavailable, match="still loading"):
            await made.ready(0.1)
        assert made.state == STARTING
        await made.ready()
        assert heard == ["died", "ready"]
        await made.stop()

    run(test())


def test_one_that_hangs_in_its_start_can_be_stopped(worker):
    async def test():
        made, _ = worker("time.sleep(600)\n")
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        await made.stop()
        assert time.monotonic() - begun < 5

    run(test())


def test_a_stop_does_not_wait_for_the_next_try(worker, monkeypatch):
    monkeypatch.setattr(workers, "PAUSES", (600.0,))

    async def test():
        made, heard = worker(OPEN)
        await until(lambda: "died" in heard)
        begun = time.monotonic()
        await made.stop()
        assert time.monotonic() - begun < 5

    run(test())


def test_a_question_at_the_stop_is_answered_at_once(worker):
    """Else it would be cut off with the server, without an answer."""

    async def test():
        made, _ = worker(OPEN + REST)
        await made.ready()
        asking = asyncio.ensure_future(made.ask("tokens"))
        await asyncio.sleep(0.05)
        await made.stop()
        with pytest.raises(Unavailable, match="stopping"):
            await asyncio.wait_for(asking, 1)

    run(test())


def test_a_stop_at_the_very_start_ends_the_process_that_comes(worker):
    async def test():
        made, _ = worker(OPEN + REST)
        await asyncio.sleep(0)  # it is being started
        await made.stop()
        assert made.state == STOPPED
        assert made._process is None or made._process.returncode is not None

    run(test())


def test_what_is_no_message_ends_the_process(worker):
    """A length that no message has, as a library leaves it that writes to the channel."""

    async def test():
        made, heard = worker(f"{OPEN}if n == 1:\n    print('a' * 40, flush=True)\n{REST}")
        await until(lambda: heard.count("ready") == 2)
        await made.stop()

    run(test())


def test_one_that_did_its_work_is_started_again_at_once(worker, monkeypatch):
    """Only those that die without having done anything wait longer and longer."""
    monkeypatch.setattr(workers, "PAUSES", (0.0, 600.0))

    async def test():
        made, heard = worker(OPEN + 'say(on="ended", id="a", state="done")\nn < 4 and sys.exit(9)\n' + REST)
        await until(lambda: heard.count("ready") == 4)
        await made.stop()

    run(test())
