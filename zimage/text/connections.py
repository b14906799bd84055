"""Calls to servers that end in time: in a thread of their own, whose connections are shut down when the time is over.

HTTP libraries bound each read, not all of them: a server that sends a byte now and then would hold one for ever.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

TICK = 0.1  # seconds between two looks at what has come
GRACE = 0.5  # seconds that a thread gets to end once its connections are shut down; looking up a name may take longer


def pause_for(seconds: float) -> None:
    """Sleep, and see now and then whether another thread has interrupted this one: sleep itself would not wake up."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(TICK, left))


class Connections:
    """The connections of an HTTP client, as far as its requests carry `trace` as the extension of that name."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._over = False

    def trace(self, event: str, info: Mapping[str, object]) -> None:
        """Called by httpx at each step of a request: what a step returns may be a new connection."""
        if get := getattr(info.get("return_value"), "get_extra_info", None):
            self._sockets.append(get("socket"))
        if self._over:
            raise TimeoutError

    def within(self, seconds: float, work: Callable[[], T], watch: Callable[[], None] | None = None) -> T:
        """What `work` returns or raises; TimeoutError, and all connections shut down, if that takes longer.

        `watch` is called now and then meanwhile; what it raises, and an interrupt, end the work too.
        """
        done: Future[T] = Future()
        thread = threading.Thread(target=_finish, args=(done, work), name="zimage-remote", daemon=True)
        end = time.monotonic() + seconds
        thread.start()
        try:
            while not wait([done], max(0.0, min(TICK, end - time.monotonic()))).done:
                if time.monotonic() >= end:
                    raise TimeoutError
                if watch is not None:
                    watch()
            return done.result()
        finally:
            if not done.done():
                self._hang_up()
                thread.join(GRACE)

    def _hang_up(self) -> None:
        self._over = True
        for line in self._sockets:
            with contextlib.suppress(OSError):  # closed already
                line.shutdown(socket.SHUT_RDWR)


def _finish(done: "Future[T]", work: Callable[[], T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
