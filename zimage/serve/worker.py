"""The process that computes: `python -m zimage.serve.worker`, started by the server, one per device.

    server ─ run, compute ─→ queue ─→ main thread: renders, encodes, rewrites ─→ events, pictures
           ─ ask ──────────→ second thread: prepares jobs, counts tokens ─────→ answers
           ─ cancel ───────→ interrupts the main thread, in the middle of a step

It reads messages from standard input and ends when that does. Pictures are written as whole files, whose names follow
from the job's id: what is drawn a second time after a crash replaces itself with the same bits. A job that takes longer
than a moment keeps its state in a file, from which another process goes on.
"""

import _thread
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from zimage import interrupts
from zimage.errors import RequestError, ZImageError, one_line
from zimage.serve.channel import Message, Outlet, read


class Worker:
    """A pipeline and what it is told to do."""

    def __init__(self, outlet: Outlet, start: Message):
        from zimage.serve.drawing import Studio

        self.send, self._outlet = outlet.send, outlet
        self.studio = Studio(start, outlet.send)
        self._tasks: queue.Queue[Message] = queue.Queue()
        self._asks = ThreadPoolExecutor(1, thread_name_prefix="zimage-asks")
        self._lock = threading.Lock()
        self._running = self._cancelled = ""
        self._notes = Notes(self.send)

    def listen(self) -> None:
        """Take in what the server says, until it has gone."""
        while (message := read(sys.stdin.buffer)) is not None:
            match message["op"]:
                case "run" | "compute":
                    self._tasks.put(message)
                case "cancel":
                    self._cancel(message["id"])
                case _:
                    self._asks.submit(self._answer, message)
        os._exit(0)

    def work(self) -> None:
        """Do one task after the other, for ever."""
        self.studio.warm_up()
        while True:
            task = self._tasks.get()
            self._now_running(task["id"])
            self._notes.task = task["id"]
            outcome = self._outcome(task)
            self._now_running("")
            self.send({"on": "ended", "id": task["id"], **outcome})
            self._notes.task = ""

    def _outcome(self, task: Message) -> Message:
        """What became of a task."""
        do = self.studio.render if task["op"] == "run" else self.studio.compute
        try:
            while True:
                try:
                    with interrupts.handled():
                        result = do(task, self._check)
                        self._now_running("")
                    return {"state": "done", **result}
                except KeyboardInterrupt:  # also one that was meant for the task before, and came late
                    with self._lock:
                        if self._cancelled == task["id"]:
                            return {"state": "cancelled"}
        except ZImageError as error:
            return {"state": "failed", "error": fault(error)}
        except Exception as error:  # whatever it is, it is this task's end and not the worker's
            logging.getLogger("zimage").exception("a task failed")
            return {"state": "failed", "error": unforeseen(error)}

    def _now_running(self, task: str) -> None:
        """From here on a cancel of another task interrupts nothing."""
        with self._lock:
            self._running = task

    def _check(self) -> None:
        """Between two pieces of work: raise where the task was cancelled."""
        interrupts.check()
        if self._cancelled == self._running != "":
            raise KeyboardInterrupt

    def _cancel(self, task: str) -> None:
        with self._lock:
            self._cancelled = task
            if self._running == task:
                _thread.interrupt_main()

    def _answer(self, question: Message) -> None:
        with self._notes.gathered() as notes:
            try:
                answer = {"answer": self.studio.answer(question, idle=not self._running and self._tasks.empty())}
            except ZImageError as error:
                answer = {"error": fault(error)}
            except Exception as error:
                logging.getLogger("zimage").exception("a question failed")
                answer = {"error": unforeseen(error)}
        self.send({"on": "answer", "re": question["re"], "notes": notes, **answer})


class Notes(logging.Handler):
    """Warnings of the library go to whom they concern: the job at work, or the question that is being answered."""

    def __init__(self, send: Callable[[Message], None]):
        super().__init__(logging.WARNING)
        self._send, self._here, self.task = send, threading.local(), ""
        logging.getLogger("zimage").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = one_line(record.getMessage())
        gathered = getattr(self._here, "notes", None)
        if gathered is not None:
            gathered.append(text)
        elif self.task and threading.current_thread() is threading.main_thread():
            self._send({"on": "note", "id": self.task, "text": text})

    @contextmanager
    def gathered(self) -> Iterator[list[str]]:
        """What is said in this thread meanwhile."""
        self._here.notes = []
        try:
            yield self._here.notes
        finally:
            self._here.notes = None


def fault(error: ZImageError) -> Message:
    """An error as plain values. `kind` tells a fault of the request from others."""
    kind = "request" if isinstance(error, RequestError) else type(error).__name__
    return {"message": str(error), "fields": list(error.fields), "kind": kind}


def unforeseen(error: Exception) -> Message:
    """An error that nobody foresaw: its place is in the log."""
    return {"message": one_line(f"{type(error).__name__}: {error}", 300), "fields": [], "kind": "internal"}


def main() -> None:
    outlet = Outlet.of_standard_output()
    # A server in a terminal is stopped by Ctrl-C, and tells its workers: here it only interrupts a cancelled task.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what stops a service tells all of its processes at once
    start = read(sys.stdin.buffer)
    if start is None:
        return
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        worker = Worker(outlet, start)
    except ZImageError as error:
        outlet.send({"on": "refused", "error": fault(error)})
        return
    threading.Thread(target=worker.listen, name="zimage-listen", daemon=True).start()
    outlet.send({"on": "ready", "about": worker.studio.about()})
    worker.work()


if __name__ == "__main__":
    main()
