"""What every request has to pass before anything reads it: one small rule a class, in plain ASGI, the outermost first.

None of them knows what the server is for. What is refused is answered in the form of its path (`answers`). How long
a header may take, and what happens to bodies that nobody reads, is for `listening`: ASGI begins after the header.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zimage.serve.access import AccessLog
from zimage.serve.answers import Header, send_error
from zimage.serve.guard import FREE, HEALTH, SESSION, Guard, Rule, client_of
from zimage.serve.hosts import Place
from zimage.serve.incoming import BodyLimits

log = logging.getLogger("zimage")

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS: tuple[Header, ...] = (
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
)
NO_STORE: Header = (b"cache-control", b"no-store")
CLOSE: Header = (b"connection", b"close")
MOST_HEADERS, LONGEST_HEAD, LONGEST_PATH = 64, 16 << 10, 2048  # headers, their bytes, bytes of a path
NO_HEADER = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]|^[ \t]|[ \t]\Z")
STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")  # controls, and what is a slash on Windows
SAFE = ("GET", "HEAD")


class Fault(NamedTuple):
    """Why a request is refused."""

    status: int
    message: str
    headers: tuple[Header, ...] = ()


class SecurityHeaders:
    """Every answer tells browsers what it may be used for, and is kept nowhere unless it says so itself."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = {name.lower() for name, _ in message.get("headers", ())}
                more = [header for header in (*SECURITY_HEADERS, NO_STORE) if header[0] not in named]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self.app(scope, receive, add)


class LastNet:
    """A fault of the program is answered like any error, and told in the log; a client hears nothing of it."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                _check_headers(message.get("headers", ()))
                started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception as error:
            log.error("a request ended in a fault of the program: %s", type(error).__name__, exc_info=error)
            if started:
                raise
            await send_error(scope, send, 500, "the server failed at this; its log says more")


class Check:
    """A rule on a request's head alone."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app, self.guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self.fault(scope, Headers(scope=scope))
        if fault is None:
            await self.app(scope, receive, send)
        else:
            await send_error(scope, send, *fault)

    def fault(self, scope: Scope, headers: Headers) -> Fault | None:
        raise NotImplementedError


class HeadSize(Check):
    """Headers in number and bytes, and the path in bytes."""

    def fault(self, scope: Scope, headers: Headers) -> Fault | None:
        size = sum(len(name) + len(value) for name, value in headers.raw)
        if len(headers.raw) > MOST_HEADERS or size > LONGEST_HEAD:
            return Fault(431, f"a request may have {MOST_HEADERS} headers of {LONGEST_HEAD:,} bytes in all")
        if len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"]) > LONGEST_PATH:
            return Fault(414, f"path and query may have {LONGEST_PATH:,} bytes")
        return None


class PlainPath(Check):
    """Paths that begin with a slash and lead down only; nothing in them steers a log or a file system."""

    def fault(self, scope: Scope, headers: Headers) -> Fault | None:
        path = scope["path"]
        climbs = {".", ".."} & set(path.split("/"))
        if not path.startswith("/") or climbs or STEERING.search(path):
            return Fault(400, "the path cannot be used; it should be plain, such as /api/jobs")
        return None


class OneLength(Check):
    """A body has one length: proxies and servers that read another one each would see other requests."""

    def fault(self, scope: Scope, headers: Headers) -> Fault | None:
        lengths = headers.getlist("content-length")
        if len(lengths) + len(headers.getlist("transfer-encoding")) > 1:
            return Fault(400, "a request should have one Content-Length or one Transfer-Encoding", (CLOSE,))
        if lengths and not (lengths[0].isascii() and lengths[0].isdigit()):
            return Fault(400, "Content-Length should be a whole number", (CLOSE,))
        return None


class KnownHost(Check):
    """The name that was looked up is the server's: see `hosts`."""

    def fault(self, scope: Scope, headers: Headers) -> Fault | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            return Fault(400, "a request should have one Host header")
        if not self.guard.hosts.includes(hosts[0], Place(*(scope.get("server") or ("", None)))):
            return Fault(403, f"Host {hosts[0][:80]!r} is not this server; allow a name of its own with --allow-host")
        return None


class OwnPages(Check):
    """Pages of other sites ask nothing: neither with an Origin, nor as a picture, script or form of theirs.

    Links from them to a page of ours are opened. Programs send none of these headers.
    """

    def fault(self, scope: Scope, headers: Headers) -> Fault | None:
        host = headers.get("host", "")
        if not all(self.guard.hosts.is_own(origin, host) for origin in headers.getlist("origin")):
            return Fault(403, "pages of other sites may not ask this server; allow a name of its own with --allow-host")
        site = headers.get("sec-fetch-site", "none")
        opened = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") in (None, "document")
        if site not in ("same-origin", "none") and not (opened and scope["method"] in SAFE):
            return Fault(403, "pages of other sites may not ask this server")
        return None


class FewTries:
    """Whoever sends wrong tokens has to wait; what needs none, and cookies, which nobody can guess, go on."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app, self.guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        brake, address = self.guard.brake, client_of(scope)
        if not self.guard.door.is_locked or not _tries(scope):
            return await self.app(scope, receive, send)
        if wait := brake.wait(address):
            again: Header = (b"retry-after", str(int(wait) + 1).encode())
            return await send_error(scope, send, 429, "too many wrong tokens; wait before the next", (again,))

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 401:
                brake.count(address)
            await send(message)

        await self.app(scope, receive, count)


class NeedsToken(Check):
    """Everything but the page, which asks for the token, and whether the server lives."""

    def fault(self, scope: Scope, headers: Headers) -> Fault | None:
        if _is_free(scope) or self.guard.door.opens(headers.get("authorization"), headers.get("cookie")):
            return None
        wrong = "authorization" in headers
        message = "the token is wrong" if wrong else "a token is needed: send it as Authorization: Bearer TOKEN"
        return Fault(401, message, ((b"www-authenticate", _challenge(headers)),))


class FewAtOnce:
    """As many requests at once as the loop serves well; whether the server lives can always be asked."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app, self.guard, self.running = app, guard, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.running >= self.guard.most_requests and scope["path"] != HEALTH:
            again: Header = (b"retry-after", b"1")
            return await send_error(scope, send, 503, "the server has too many requests at once", (again,))
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1


class WholeAnswers:
    """Files are sent as a whole: parts of them, by the thousand and overlapping, are work that no client needs."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [header for header in scope["headers"] if header[0] != b"range"]
        await self.app({**scope, "headers": headers}, receive, send)


RULES: tuple[Rule, ...] = (
    AccessLog,
    SecurityHeaders,
    LastNet,
    HeadSize,
    PlainPath,
    OneLength,
    KnownHost,
    OwnPages,
    FewTries,
    NeedsToken,
    FewAtOnce,
    BodyLimits,
    WholeAnswers,
)


def protected(app: ASGIApp, guard: Guard, rules: Sequence[Rule] = RULES) -> ASGIApp:
    """The app behind the rules. WebSockets are not spoken and are closed."""
    outermost = app
    for rule in reversed(rules):
        outermost = rule(outermost, guard)

    async def entry(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await (outermost if scope["type"] == "http" else app)(scope, receive, send)

    return entry


def _check_headers(headers: Iterable[Header]) -> None:
    """Raise ValueError for what cannot be a header: the connection could not even say that something failed."""
    for name, value in headers:
        if NO_HEADER.search(value) or (not name.isalnum() and not name.replace(b"-", b"").isalnum()):
            raise ValueError(f"the header {name!r} of an answer cannot be sent")


def _is_free(scope: Scope) -> bool:
    return scope["path"] in FREE or scope["path"].startswith("/page/")


def _tries(scope: Scope) -> bool:
    """Whether a request holds a token that may be wrong."""
    if _is_free(scope):
        return scope["path"] == SESSION and scope["method"] == "POST"
    return any(name == b"authorization" for name, _ in scope["headers"])


def _challenge(headers: Headers) -> bytes:
    """Scripts of the page are not told of Basic, for which browsers would open a window of their own."""
    by_script = headers.get("sec-fetch-mode", "navigate") != "navigate"
    return b'Bearer realm="zimage"' + (b"" if by_script else b', Basic realm="zimage", charset="UTF-8"')
