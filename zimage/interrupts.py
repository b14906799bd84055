"""Interrupts: Ctrl-C and SIGTERM end a command between two pieces of work, never in one that must be whole.

Python raises what a signal asks for wherever it happens to be. In an import that leaves half a module, which others
take for a whole one; in the writing of a file it leaves the file. There a signal waits until that is over.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMPORTING = "<frozen importlib._bootstrap>"
PATIENCE = 2.0  # seconds that tidying up may take before another signal ends it
POLL = 0.01  # seconds
TORCHRUN = "TORCHELASTIC_RUN_ID"  # set where torchrun has started this process as one of several ranks


class Interrupt(KeyboardInterrupt):
    """A signal. `status` is the exit status that shells give it; `args` may hold what became of the work."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.status = number, 128 + number


class _Now:
    """What signals have to know; there is one main thread, and so one of these."""

    installed = False
    held = 0  # pieces of work, within one another, that must be whole
    waiting: int | None = None  # the signal that came in an import or such a piece
    raised: float | None = None  # when one was raised
    number = 0  # which


def install() -> None:
    """Let signals raise an Interrupt at a good moment. What ignores them (`nohup`) goes on to ignore them.

    A host program's handler that is not Python's (None here) could not be put back, and stays.
    """
    if _Now.installed or threading.current_thread() is not threading.main_thread():
        return
    _Now.installed, _Now.held, _Now.waiting, _Now.raised = True, 0, None, None
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, _arrived)
    sys.unraisablehook = _unraisable


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """The same inside only; nothing where it is so already."""
    if _Now.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook
    install()
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        sys.unraisablehook, _Now.installed = hook, False


def ignore() -> None:
    """The status of the command stands; what is left is to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A piece of work that is done as a whole: a signal that comes meanwhile is raised after it."""
    if not _Now.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    _Now.held += 1
    try:
        yield
    finally:
        _Now.held -= 1
        if _Now.held == 0 and _Now.waiting is not None:
            _raise(_Now.waiting)


@contextlib.contextmanager
def telling(consequence: str) -> Iterator[None]:
    """What an interrupt inside leaves behind, to be said to the user, unless something inside has said it."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.args = interrupt.args or (consequence,)
        raise


def check() -> None:
    """Raise once more what was raised, and dropped on its way: libraries in other languages do that in callbacks."""
    if _Now.installed and _Now.raised is not None:
        raise Interrupt(_Now.number)


def leave(number: int) -> NoReturn:
    """End at once, without tidying up. Of a rank's end, what started it tells."""
    if TORCHRUN not in os.environ:
        with contextlib.suppress(OSError):
            os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


def _arrived(number: int, frame: FrameType | None) -> None:
    if _Now.raised is not None:
        if time.monotonic() - _Now.raised > PATIENCE:
            leave(number)
    elif _Now.held:
        _Now.waiting = number
    elif not _must_wait(frame):
        _raise(number)
    elif _Now.waiting is not None:
        leave(number)  # nothing has been begun in an import
    else:
        _Now.waiting = number
        threading.Thread(target=_again, daemon=True).start()


def _raise(number: int) -> NoReturn:
    _Now.waiting, _Now.raised, _Now.number = None, time.monotonic(), number
    raise Interrupt(number)


def _again() -> None:
    """Send the waiting signal once more when the main thread no longer must be waited for."""
    main = threading.main_thread().ident or 0
    while _must_wait(sys._current_frames().get(main)):
        time.sleep(POLL)
    number, _Now.waiting = _Now.waiting, None
    if number is not None and _Now.installed:
        signal.pthread_kill(main, number) if hasattr(signal, "pthread_kill") else signal.raise_signal(number)


def _must_wait(frame: FrameType | None) -> bool:
    """Whether what runs is an import, or the hook below, out of which nothing that is raised would come."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING or frame.f_code is _unraisable.__code__:
            return True
        frame = frame.f_back
    return False


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """An interrupt that came up in a finaliser, where Python drops what is raised, is raised once more."""
    if not isinstance(unraisable.exc_value, Interrupt):
        sys.__unraisablehook__(unraisable)
        return
    _Now.raised, _Now.waiting = None, unraisable.exc_value.number
    threading.Thread(target=_again, daemon=True).start()
