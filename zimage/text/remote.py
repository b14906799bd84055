"""Calls to servers, each with one deadline, and text from servers that speak OpenAI's chat completions.

Whatever goes wrong is one line that names the server, never holds the key and never steers a terminal. Redirects are
not followed: they would carry the key and the prompt to another host.
"""

import contextlib
import functools
import json
import logging
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from zimage.errors import CheckpointError, RemoteError, RequestError, ZImageError
from zimage.formats.json_text import json_value
from zimage.settings.rewriting import Sampling
from zimage.text.connections import Connections, pause_for

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("zimage")

PAUSES = (0.5, 1.5)  # seconds before the second and the third try
BUSY = 429
MAX_ANSWER = 4_000_000  # bytes
QUOTED = 1 << 16  # bytes of a body that an error may quote
SHOWN = 400  # characters of an error, which may quote the server
CHAT = "/v1/chat/completions"
EXTENSIONS = ("top_k", "min_p")  # vLLM's and llama.cpp's, which stricter servers refuse


def complete(
    url: str,
    model: str,
    messages: Sequence[Mapping[str, str]],
    sampling: Sampling,
    max_tokens: int = 512,
    seed: int | None = None,
    timeout: float = 120.0,
    api_key: str | None = None,
) -> str:
    """The answer of `model` to messages ({"role": …, "content": …}), thoughts included; see `generate.split_thinking`.

    `url` is the server's, with or without /v1/chat/completions. `timeout`: seconds for everything, at most three tries
    included. Raises RequestError for arguments that cannot be used, and RemoteError.
    """
    call = Call(endpoint(url), api_key, timeout)
    asked = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "stream": False}
    asked |= {name: getattr(sampling, name) for name in ("temperature", "top_p", "presence_penalty", *EXTENSIONS)}
    if seed is not None:
        asked["seed"] = seed
    answer = call.ask("POST", asked)
    if answer.status in (400, 422) and any(name in _said(answer.body) for name in EXTENSIONS):
        log.warning("%s does not know %s; asking without", call.address, " and ".join(EXTENSIONS))
        answer = call.ask("POST", {name: value for name, value in asked.items() if name not in EXTENSIONS})
    return _content(call, answer)


def endpoint(url: str, path: str = CHAT) -> str:
    """The address of a page, by default of chat completions, on the server `url`. Raises RequestError."""
    base, page = checked_url(url), path.removeprefix("/v1")
    if base.endswith(page):
        return base
    return base + (page if base.endswith("/v1") else path)


def checked_url(url: str) -> str:
    """The url of a server, without a slash at its end. Raises RequestError."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise RequestError("the server's url cannot be used; it should look like http://localhost:8000")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RequestError("the server's url should not hold a password, query or fragment; pass a key as api_key")
    return url.rstrip("/")


def _content(call: "Call", answer: "Answer") -> str:
    """choices[0].message.content of a chat completion. Raises RemoteError."""
    if answer.status != 200:
        raise call.refused(answer)
    try:
        found = json_value("the answer", answer.body)
    except CheckpointError:
        raise call.error("answered with something other than JSON; is this the url of a chat server?") from None
    try:
        choice = found["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise call.error(f"answered without choices[0].message.content{_quoted(answer.body)}") from None
    if not isinstance(content, str) or content != content.encode(errors="ignore").decode():
        why = "; max_tokens may be too small" if choice.get("finish_reason") == "length" else ""
        raise call.error(f"answered with a content that is not text{why}")
    return content


# Calls of any kind ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a server sent, its body as the bytes that came; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def may_pass(self) -> bool:
        """Whether a later try may succeed."""
        return self.status == BUSY or self.status >= 500


class Call:
    """A call to the server at `address`, with a deadline `timeout` seconds from now over all its tries and questions.

    `key` is sent to this address only and never shown; messages call it `secret`. An answer may have `limit` bytes.
    Raises RequestError, and RemoteError without httpx.
    """

    def __init__(
        self,
        address: str,
        key: str | None = None,
        timeout: float = 120.0,
        limit: int = MAX_ANSWER,
        secret: str = "api_key",
    ):
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
            raise RequestError(f"{secret} is empty or holds characters that no key has (spaces around it, line ends)")
        if not 0 < timeout <= 86_400:  # nor NaN
            raise RequestError(f"timeout {timeout} should be above 0 and at most 86400 seconds")
        _need_httpx()
        self.address, self.key, self.timeout, self.limit, self.secret = address, key, timeout, limit, secret
        self._deadline = time.monotonic() + timeout

    def ask(self, method: str, content: object = None, headers: Mapping[str, str] | None = None) -> Answer:
        """The server's answer, whatever its status but a redirect. `content`: bytes, None, or what is sent as JSON.

        Broken connections, 429 and 5xx get at most three tries. Raises RemoteError.
        """
        sent = self._headers()
        if not isinstance(content, bytes | None):
            content, sent["Content-Type"] = json.dumps(content).encode(), "application/json"
        for pause in (*PAUSES, float("inf")):
            try:
                answer = self._once(method, content, {**sent, **(headers or {})})
                if not answer.may_pass or not self._has_left(pause):
                    return answer
            except ConnectionError as error:
                if not self._has_left(pause):
                    raise self.error(f"cannot be reached: {error}") from None
            pause_for(pause)
        raise AssertionError("unreachable: the last try returns or raises")

    def stream(self, silence: float, headers: Mapping[str, str] | None = None) -> Iterator[bytes]:
        """The body of a GET in pieces as they come, with the deadline for its beginning and then none.

        `silence`: seconds between two pieces after which the server is taken to be gone. Raises RemoteError, also where
        the body breaks off, and what `refused` makes of another status than 200.
        """
        import httpx

        request = httpx.Request("GET", self.address, headers={**self._headers(), **(headers or {})})
        exchange = _Exchange(request, self.limit)
        with self._told(), exchange.opened(self._deadline - time.monotonic(), silence) as response:
            if response.status_code != 200:
                raise self.refused(exchange.answer(response))
            yield from response.iter_raw()

    def accepted(self, content: object) -> Answer:
        """What the server answers to a POST, where it does what it is asked. Raises RemoteError."""
        answer = self.ask("POST", content)
        if answer.status != 200:
            raise self.refused(answer)
        return answer

    def error(self, what: str) -> RemoteError:
        """The server's address and `what`, on one line, fit to be shown."""
        line = _one_line(f"{self.address} {what}")
        line = line if self.key is None else line.replace(_one_line(self.key), "[key]")
        return RemoteError(line if len(line) <= SHOWN else line[:SHOWN] + "…")

    def refused(self, answer: Answer) -> ZImageError:
        """What a status means, and what the server says about it, except about a key, which it may quote."""
        status, said = answer.status, _quoted(answer.body)
        if status in (401, 403):
            return self.error(f"refused the key ({status}); check {self.secret}")
        if status == 404:
            return self.error(f"does not know this page or model (404){said}")
        return self.error(f"answered with status {status}{said}")

    def _has_left(self, seconds: float) -> bool:
        return seconds < self._deadline - time.monotonic()

    def _once(self, method: str, content: bytes | None, headers: Mapping[str, str]) -> Answer:
        """Raises ConnectionError where a later try may succeed, else RemoteError."""
        import httpx

        with self._told():
            request = httpx.Request(method, self.address, content=content, headers=headers)
            return _Exchange(request, self.limit).within(self._deadline - time.monotonic())

    def _headers(self) -> dict[str, str]:
        sent = {"Accept-Encoding": "identity", "User-Agent": "zimage"}
        return sent if self.key is None else {**sent, "Authorization": f"Bearer {self.key}"}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what goes wrong into a ConnectionError where a later try may succeed, else into a RemoteError."""
        import httpx

        try:
            yield
        except ZImageError:
            raise
        except (TimeoutError, httpx.TimeoutException):
            raise self.error(f"did not answer within {self.timeout:g} seconds") from None
        except _Unusable as answer:
            raise self.error(str(answer)) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:
            # The last two for a host that cannot be one, and for a proxy that the environment names.
            if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError) and not _is_of_tls(error):
                raise ConnectionError(str(error)) from None
            raise self.error(f"cannot be reached: {error}") from None


class _Unusable(Exception):
    """What makes an answer unusable: what follows the server's name in an error."""


class _Exchange:
    """One request and its answer."""

    def __init__(self, request: "httpx.Request", limit: int):
        self._request, self._limit, self._connections = request, limit, Connections()

    def within(self, seconds: float) -> Answer:
        """Raises TimeoutError, _Unusable, and what httpx raises."""
        return self._connections.within(seconds, lambda: self._answer(seconds))

    def _answer(self, seconds: float) -> Answer:
        with self._client(seconds) as client:
            return self.answer(client.send(self._request, stream=True))

    @contextlib.contextmanager
    def opened(self, seconds: float, silence: float) -> Iterator["httpx.Response"]:
        """The response within `seconds`, its body yet to come. Raises as `within`."""
        with self._client(silence) as client:
            yield self._connections.within(seconds, lambda: client.send(self._request, stream=True))

    def answer(self, response: "httpx.Response") -> Answer:
        """A response with its body. Raises _Unusable, and what httpx raises."""
        import httpx

        try:
            body = self._body(response)
        except (_Unusable, httpx.HTTPError):
            if response.is_success:
                raise
            body = b""  # the status says enough
        return Answer(response.status_code, dict(response.headers), body)

    def _client(self, silence: float) -> "httpx.Client":
        """`silence`: seconds that reading or writing a piece may take."""
        import httpx

        self._request.extensions = {"timeout": httpx.Timeout(silence).as_dict(), "trace": self._connections.trace}
        return httpx.Client(verify=_certificates(), event_hooks={"response": [_stop_at_redirect]})

    def _body(self, response: "httpx.Response") -> bytes:
        body = bytearray()
        for piece in response.iter_raw():
            body += piece
            if len(body) > self._limit:
                raise _Unusable(f"sent an answer of more than {self._limit / 1e6:g} MB")
        return bytes(body)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Those that are trusted here: reading them takes longer than encoding a short prompt."""
    return ssl.create_default_context()


def _stop_at_redirect(response: "httpx.Response") -> None:
    """Before httpx reads the location, which may be any text."""
    if 300 <= (status := response.status_code) < 400:
        location = response.headers.get("location", "").split("?")[0]
        raise _Unusable(f"has moved ({status}); pass the url that it has moved to: {location}")


def _need_httpx() -> None:
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise RemoteError(
            "asking a server needs httpx, the extra `remote`; run: "
            'pip install "zimage-torch[remote]" (in a clone: pip install -e ".[remote]")'
        ) from None


def _is_of_tls(error: BaseException | None) -> bool:
    """Whether what stands behind an error is a certificate or a handshake."""
    return error is not None and (isinstance(error, ssl.SSLError) or _is_of_tls(error.__cause__ or error.__context__))


def _quoted(body: bytes) -> str:
    said = _said(body)
    return f": {said}" if said else ""


def _said(body: bytes) -> str:
    """The message of an error's body on one line: {"error": {"message": …}}, {"error": …} or plain text."""
    try:
        found = json_value("the answer", body)
        for name in ("error", "detail", "message"):
            found = found.get(name, found) if isinstance(found, dict) else found
    except CheckpointError:
        found = body[:QUOTED].decode(errors="replace")
        found = "" if found.lstrip().startswith("<") else found  # a page for browsers
    return _one_line(found if isinstance(found, str) else json.dumps(found))


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
