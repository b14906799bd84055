"""HTTP for an ASGI app, by uvicorn: what happens on a connection before and after a request, and how the server ends.

uvicorn waits for a header as long as a client likes, reads what nobody asked for, and takes as many connections as
there are files. Here a header has its time; of a body that was refused, some is read, so that the client gets to the
answer; who does not read what it asked for is left; and when all places are taken, whoever has waited longest without
a request makes room.
"""

import asyncio
import contextlib
import functools
import json
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import Server

from zimage import interrupts
from zimage.serve.answers import error_body, phrase
from zimage.serve.binding import bind, url_of
from zimage.serve.safety import NO_STORE, SECURITY_HEADERS
from zimage.settings.serving import ServeSettings

log = logging.getLogger("zimage")

LONGEST_HEAD = 32 << 10  # bytes; `safety` has a smaller limit, and an answer in the form of the path
FREE_CHUNKS, SMALLEST_CHUNK = 100, 64  # chunks of any size, then bytes that they must have on average
FAULTS = {413: "the chunks of the body are too small", 431: "the header is too large"}
KEEP_ALIVE = 15  # seconds that a connection may be idle between two requests
LINGER = 5.0  # seconds for the rest of a body that nobody reads
BACKLOG = 128  # connections that the system accepts before the server does
MOST_CONNECTIONS = 2000
STALLED = 60.0  # seconds that a client may read nothing of an answer
END = 2  # seconds for answers to end once the server does
SAVING = 10.0  # seconds beyond the grace time in which a job's state is saved
Stop = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Seconds and connections."""

    header_timeout: float
    connections: int
    linger: float
    stalled: float


class Http(h11.Connection):
    """HTTP in which bodies do not come in crumbs: each chunk costs as much as a small request, in the event loop."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, LONGEST_HEAD)
        self._chunks = self._got = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._got = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._got += len(event.data)
            if self._chunks > FREE_CHUNKS + self._got // SMALLEST_CHUNK:
                raise h11.RemoteProtocolError(FAULTS[413], error_status_hint=413)
        return event


class Connection(H11Protocol):
    """A client's connection, with a time for what uvicorn gives none."""

    def __init__(self, *args: Any, limits: Limits, **named: Any):
        super().__init__(*args, **named)
        self.conn = Http()
        self.limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._awaited = ""
        self.since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _drop_if_unread(transport, self.limits.stalled)
        self._await("header")
        if len(self.connections) > self.limits.connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._await("")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where h11 finds no HTTP, also in the middle of a body; h11 knows the status."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        self.refuse(status, FAULTS.get(status, "this is not HTTP/1.1"))

    def _should_upgrade(self) -> bool:
        return False

    def refuse(self, status: int, message: str) -> None:
        """Answer, where nothing has been answered yet, and end the connection."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body("", status, message)).encode()
            kind, close = (b"content-type", b"application/json"), (b"connection", b"close")
            length = (b"content-length", str(len(body)).encode())
            headers = [kind, length, close, NO_STORE, *SECURITY_HEADERS]
            answer = h11.Response(status_code=status, headers=headers, reason=phrase(status).encode())
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _look(self) -> None:
        """Wait for what is due now: the rest of a header, the rest of a body, or nothing."""
        theirs = self.conn.their_state
        if theirs is h11.IDLE and self.timeout_keep_alive_task is None:
            self._await("header")
        elif theirs is h11.SEND_BODY and self.cycle.response_complete:
            self._await("rest")
        else:
            self._await("")

    def _await(self, awaited: str) -> None:
        if awaited == self._awaited:
            return
        if self._timer is not None:
            self._timer.cancel()
        seconds = self.limits.linger if awaited == "rest" else self.limits.header_timeout
        self._awaited, self.since = awaited, self.loop.time()
        self._timer = self.loop.call_later(seconds, self._too_late) if awaited else None

    def _too_late(self) -> None:
        if self._awaited == "rest" or not self.conn.trailing_data[0]:
            self.transport.close()
        else:
            self.refuse(408, "the header came too slowly")

    def _make_room(self) -> None:
        others = [c for c in self.connections if isinstance(c, Connection) and c is not self and c.is_waiting]
        if others:
            min(others, key=lambda other: other.since).transport.abort()
        else:
            self.refuse(503, "the server has too many connections")

    @property
    def is_waiting(self) -> bool:
        """Whether it is open without a request, or with a part of a header."""
        return self.conn.their_state is h11.IDLE and not self.transport.is_closing()


def _drop_if_unread(transport: asyncio.Transport, seconds: float) -> None:
    """Let the system end a connection whose client takes nothing, also where it is closed here and not empty yet."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # of Linux
    if option is not None:
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, round(seconds * 1000))


class _Server(Server):
    """uvicorn's server, told when it is ready and when it is to end; a second signal ends it at once."""

    def __init__(self, config: Config, ready: Callable[[], None], stop: Stop, grace: float):
        super().__init__(config)
        self._ready, self._stop, self._grace = ready, stop, grace

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started and not self.should_exit:
            self._ready()

    async def shutdown(self, sockets: Any = None) -> None:
        """Requests are answered while jobs end, so that whoever watches them sees it."""
        try:
            async with asyncio.timeout(self._grace + SAVING):
                await self._stop()
        except TimeoutError:
            log.warning("the jobs did not end in time; they go on when the server is started again")
        finally:
            await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
        heard = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in heard:
            signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in heard.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            interrupts.leave(sig)
        self.should_exit = True


class _Lifespan:
    """An app, whose error at its start is kept: uvicorn only says that there was one."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.error: BaseException | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            if scope["type"] == "lifespan":
                self.error = error
            raise


def serve(
    app: ASGIApp,
    settings: ServeSettings,
    token: str | None,
    on_ready: Callable[[str], None],
    on_stop: Stop,
) -> None:
    """Serve an app until a signal; `on_ready` gets the URL, `on_stop` ends the jobs within the grace time.

    Raises RequestError where it cannot listen, and what the app raises at its start.
    """
    sockets = bind(settings, token)
    lifespan, url = _Lifespan(app), url_of(settings, sockets)
    server = _Server(_config(lifespan, settings), lambda: on_ready(url), on_stop, settings.grace)
    try:
        server.run(sockets)
    except SystemExit:
        if lifespan.error is not None:
            raise lifespan.error from None
        raise
    finally:
        for listener in sockets:
            listener.close()


def most_connections() -> int:
    """Half of the files that a process may open: pictures, workers and the index take some as well."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MOST_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(MOST_CONNECTIONS, soft // 2) if soft > 0 else MOST_CONNECTIONS


def _config(app: ASGIApp, settings: ServeSettings) -> Config:
    """uvicorn without logs of its own: `safety` writes a line per request, and tells of faults."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    limits = Limits(settings.header_timeout, most_connections(), LINGER, STALLED)
    return Config(
        app,
        http=cast(type[asyncio.Protocol], functools.partial(Connection, limits=limits)),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=END,
    )
