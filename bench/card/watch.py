"""The other side of `worker.py`: starts it, keeps the time, ends it where it hangs, and starts it anew."""

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from bench.card.rows import Row
from bench.card.worker import Message, Work

COMMAND = [sys.executable, "-m", "bench.card.worker"]
GRACE = 30.0  # seconds for work outside rows: starting, and freeing what a section held


class Stopped(Exception):
    """The worker was ended, or ended by itself; says why."""


class Worker:
    """A process and its messages."""

    def __init__(self, work: Work):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the process ends
        self.lines: queue.Queue[str] = queue.Queue()
        command = [*COMMAND, json.dumps(dataclasses.asdict(work))]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.put(line)
        self.lines.put("")

    def next(self, seconds: float) -> Message:
        """The next message. Raises Stopped if the process ends or is silent for so long, and ends it then."""
        try:
            line = self.lines.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            self.end()
            raise Stopped(f"stopped after {seconds:.3g} s") from None
        if not line:
            raise Stopped(self._last_words())
        return json.loads(line)

    def end(self) -> None:
        """End the process and all that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _last_words(self) -> str:
        status = self.process.wait()
        self.log.seek(0)
        said = (self.log.read().strip().splitlines() or ["nothing on standard error"])[-1][:300]
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"the process ended with {how}: {said}"


Start = Callable[[Work], Any]


@dataclasses.dataclass
class Clock:
    """How long each section and each row may take."""

    left: dict[str, float]  # of each section
    row_seconds: float


def watched(work: Work, clock: Clock, start: Start = Worker) -> Iterator[Message]:
    """The messages of as many workers, in turn, as it takes: each row is told once, whatever happens to it."""
    told: list[str] = []
    while True:
        worker = start(dataclasses.replace(work, skip=[*work.skip, *told], left=dict(clock.left)))
        before = len(told)
        try:
            for message in _until_it_stops(worker, clock):
                if message[0] == "row":
                    told.append(f"{message[1]['section']}/{message[1]['name']}")
                yield message
                if message[0] in ("end", "no"):
                    return
        finally:
            worker.end()
        if len(told) == before:
            yield ["no", "the process that measures ends before its first row"]
            return


def _until_it_stops(worker: Any, clock: Clock) -> Iterator[Message]:
    """Messages of one worker; a row in which it stops is a row that failed."""
    section = row = ""
    while True:
        allowed = min(clock.row_seconds, clock.left[section]) if row else GRACE + clock.row_seconds
        started = time.monotonic()
        try:
            message = worker.next(allowed)
        except Stopped as reason:
            if row:
                clock.left[section] -= time.monotonic() - started
                yield ["row", _failed(section, row, str(reason))]
            return
        if row:
            clock.left[section] -= time.monotonic() - started
        kind = message[0]
        section = message[1] if kind == "section" else section
        row = message[1] if kind == "begin" else ""
        if kind == "lost":
            return
        yield message


def _failed(section: str, name: str, reason: str) -> Row:
    return {"section": section, "name": name, "error": reason}
