"""Requests to an ASGI app without a socket, with headers that no client would send."""

import asyncio
import json
from collections.abc import Iterable
from typing import NamedTuple

HOST = ("host", "127.0.0.1:7860")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


async def asked(app, method="GET", path="/api/jobs", headers=(HOST,), body: Iterable[bytes] = (), client="10.0.0.1"):
    """The answer to one request. A piece of `body` may be a number: seconds without any."""
    pieces, sent = iter(body), []
    whole = False

    async def receive():
        nonlocal whole
        if whole:
            await asyncio.sleep(3600)
        piece = next(pieces, None)
        while isinstance(piece, float):
            await asyncio.sleep(piece)
            piece = next(pieces, None)
        whole = piece is None
        return {"type": "http.request", "body": piece or b"", "more_body": not whole}

    async def send(message):
        sent.append(message)

    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("127.0.0.1", 7860),
        "client": (client, 50000),
    }
    await app(scope, receive, send)
    start, *rest = sent
    headers = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
    return Answer(start["status"], headers, b"".join(message.get("body", b"") for message in rest))


class Instant(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer when nothing else is to be done: time-outs without waiting."""

    now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()


def run(coroutine):
    """Its result, on a clock of its own; it may not wait for threads."""
    with asyncio.Runner(loop_factory=Instant) as runner:
        return runner.run(coroutine)


def ask(app, method="GET", path="/api/jobs", headers=(HOST,), body=(), client="10.0.0.1"):
    return run(asked(app, method, path, headers, body, client))
