"""Bodies of requests on their way in: how long, how slowly, and how many at once; the last of the rules of `safety`."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zimage.serve.answers import Header, send_error
from zimage.serve.guard import SESSION, Guard

SLOWEST = 1024  # bytes a second that a body must have on average once its first pause is used up
LARGE = 8  # bodies of the largest size that memory is for, at once
LONGEST_TOKEN = 4096  # bytes of a body for the session, which anybody may send
GONE: Message = {"type": "http.disconnect"}
AGAIN: tuple[Header, ...] = ((b"retry-after", b"5"),)


class BodyLimits:
    """A body has at most so many bytes, pauses at most so long, and does not drip; all together fit in memory.

    What reads it is told that the client has gone; its answer to that is replaced by ours.
    """

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app, self.idle, self.most = app, guard.settings.idle_timeout, guard.settings.max_upload << 20
        self.held = 0  # bytes of all bodies whose requests are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        most = LONGEST_TOKEN if scope["path"] == SESSION else self.most
        body = _Body(self, receive, send, most)
        if int(Headers(scope=scope).get("content-length", 0)) > most:
            return await send_error(scope, send, 413, body.too_large)
        try:
            await self.app(scope, body.receive, body.send)
        except Exception:
            if body.fault is None:
                raise
        finally:
            self.held -= body.got
        if body.fault and not body.answered:
            await send_error(scope, send, *body.fault)


class _Body:
    """One request's body on its way in, and its answer on the way out."""

    def __init__(self, limits: BodyLimits, receive: Receive, send: Send, most: int):
        self._limits, self._receive, self._send, self._most = limits, receive, send, most
        self.fault: tuple[int, str] | tuple[int, str, tuple[Header, ...]] | None = None
        self.answered = False
        self.got = 0
        self._whole, self._waited = False, 0.0
        unit = f"{most >> 20} MiB with its uploads" if most >> 20 else f"{most:,} bytes here"
        self.too_large = f"a request may have {unit}"

    async def receive(self) -> Message:
        if self.fault is None and not self._whole:
            message = await self._next()
        elif self.fault is None:
            message = await self._receive()
        return GONE if self.fault else message

    async def _next(self) -> Message:
        """The next piece; one that is too much, or comes too late, is a fault."""
        try:
            message = await self._in_time()
        except TimeoutError:
            self.fault = 408, "the body came too slowly"
            return GONE
        size = len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        self.got += size
        self._limits.held += size
        if self.got > self._most:
            self.fault = 413, self.too_large
        elif self._limits.held > LARGE * self._limits.most:
            self.fault = 503, "the server has too many uploads at once", AGAIN
        return message

    async def _in_time(self) -> Message:
        """Neither may a piece take too long, nor may all pauses together for what has come."""
        loop, idle = asyncio.get_running_loop(), self._limits.idle
        start = loop.time()
        async with asyncio.timeout(min(idle, idle + self.got / SLOWEST - self._waited)):
            message = await self._receive()
        self._waited += loop.time() - start
        return message

    async def send(self, message: Message) -> None:
        if self.fault and not self.answered:
            return
        self.answered = True
        await self._send(message)
