"""A rank that is told to end does so, also where it waits for another one that has gone.

Python handles a signal between two of its own steps. A rank that waits in a collective is not there, and may never get
there: on a GPU nothing tells it that another rank has died. So a thread of its own counts the seconds after a signal.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator

from zimage import interrupts
from zimage.parallel.environment import starter

GRACE = 5.0  # seconds from a signal to the end
POLL = 0.5  # seconds


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """In the main thread: a signal ends this process within GRACE, and so does the end of the one that started it."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(ours, starter(), over), daemon=True, name="guard")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        thread.join()
        ours.close()
        theirs.close()


def _watch(signals: socket.socket, parent: int, over: threading.Event) -> None:
    deadline, number = float("inf"), 0
    while not over.is_set():
        if select.select([signals], [], [], POLL)[0]:
            ends = [one for one in signals.recv(64) if one in interrupts.SIGNALS]
            if ends and not number:
                number, deadline = ends[0], time.monotonic() + GRACE
        if os.getppid() != parent:
            os._exit(1)
        if time.monotonic() > deadline:
            os._exit(128 + number)
