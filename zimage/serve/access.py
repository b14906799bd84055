"""The access log: a line per request, without query and body, since what people draw is theirs.

With `log_prompts` the forms' prompts stand at the end of the line; they are told here by whoever has read them.
"""

import logging
import time
from collections.abc import Iterable
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zimage.errors import one_line, printable
from zimage.serve.guard import Guard, client_of

log = logging.getLogger("zimage.access")

LONGEST = 200  # characters of a path or a prompt in a line
_prompts: ContextVar[list[str] | None] = ContextVar("prompts", default=None)


class AccessLog:
    """Tells of every answer when it ends: `observe` always, the log where the settings ask for it."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app, self.settings, self.observe = app, guard.settings, guard.observe
        if self.settings.access_log:
            log.setLevel(logging.INFO)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, start = 0, time.perf_counter()
        prompts: list[str] = []
        _prompts.set(prompts if self.settings.log_prompts else None)

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            seconds = time.perf_counter() - start
            self.observe(scope["method"], status, seconds)
            if self.settings.access_log:
                log.info("%s", _line(scope, status, seconds, prompts))


def note_prompts(prompts: Iterable[str]) -> None:
    """Let the access log show the prompts of this request, where it shows any."""
    shown = _prompts.get()
    if shown is not None:
        shown += prompts


def _line(scope: Scope, status: int, seconds: float, prompts: list[str]) -> str:
    """Status 0 is a connection that ended before an answer."""
    head = f"{client_of(scope)} {printable(scope['method'])} {one_line(scope['path'], LONGEST)}"
    return " ".join([f"{head} {status} {seconds * 1000:.0f} ms", *(repr(one_line(p, LONGEST)) for p in prompts)])
