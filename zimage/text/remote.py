"""Text from a server that speaks OpenAI's chat completions, as vLLM, llama.cpp and hosted models do.

Whatever goes wrong is one line that names the server and never holds the key. Redirects are not followed: they would
carry the key to whoever they name.
"""

import http.client
import json
import logging
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from zimage.errors import RemoteError, RequestError
from zimage.settings.declared import Sampling

log = logging.getLogger("zimage")

PAUSES = (0.5, 1.5)  # seconds before the second and the third try
BUSY = 429
MAX_ANSWER = 4_000_000  # bytes
CHUNK = 1 << 16
SHOWN = 400  # characters of an error, which may quote the server
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
    """The answer of `model` to messages ({"role": …, "content": …}), thoughts and all; see `generate.split_thinking`.

    `url` is the server's, with or without /v1/chat/completions. `timeout`: seconds to wait in each of at most three
    tries, which broken connections, 429 and 5xx get. Raises RequestError for arguments that cannot be used, and
    RemoteError.
    """
    call = _Call(endpoint(url), _checked_key(api_key), _checked_timeout(timeout))
    asked = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "stream": False}
    asked |= {name: getattr(sampling, name) for name in ("temperature", "top_p", "presence_penalty", *EXTENSIONS)}
    if seed is not None:
        asked["seed"] = seed
    return call.content_of(call.ask(asked))


def endpoint(url: str) -> str:
    """Where completions are asked for on the server `url`. Raises RequestError."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise RequestError("the server's url cannot be used; it should look like http://localhost:8000")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RequestError("the server's url should hold no password, query or fragment; a key is given as api_key")
    base = url.rstrip("/")
    if base.endswith("/chat/completions"):
        return base
    return base + ("/chat/completions" if base.endswith("/v1") else "/v1/chat/completions")


def _checked_key(key: str | None) -> str | None:
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise RequestError("api_key is empty or holds characters that no key has (spaces around it, line ends)")
    return key


def _checked_timeout(seconds: float) -> float:
    if not 0 < seconds <= 86_400:  # nor NaN
        raise RequestError(f"timeout {seconds} should be above 0 and at most 86400 seconds")
    return seconds


class _Refused(Exception):
    """A status other than 200, with what the server said."""

    def __init__(self, status: int, said: str):
        self.status, self.said = status, said


class _Call:
    """One question to one server."""

    def __init__(self, address: str, key: str | None, timeout: float):
        self.address, self.key, self.timeout = address, key, timeout
        self.opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, asked: Mapping[str, Any]) -> bytes:
        """The body of the server's answer."""
        try:
            return self._patiently(asked)
        except _Refused as refused:
            named = [name for name in EXTENSIONS if name in refused.said]
            if refused.status not in (400, 422) or not named:
                raise self._error(_meaning(refused)) from None
            log.warning("%s does not know %s; asking without", self.address, " and ".join(EXTENSIONS))
        try:
            return self._patiently({name: value for name, value in asked.items() if name not in EXTENSIONS})
        except _Refused as refused:
            raise self._error(_meaning(refused)) from None

    def _patiently(self, asked: Mapping[str, Any]) -> bytes:
        """Three tries where a later one may succeed. Raises RemoteError or _Refused."""
        for pause in (*PAUSES, None):
            try:
                return self._once(asked)
            except _Refused as refused:
                if pause is None or (refused.status != BUSY and refused.status < 500):
                    raise
            except TimeoutError:
                raise self._error(f"did not answer within {self.timeout:g} seconds") from None
            except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last for a host that is no name
                if pause is None or isinstance(error, ssl.SSLError):
                    raise self._error(f"cannot be reached: {_one_line(error)}") from None
            time.sleep(pause)
        raise AssertionError("unreachable: the last try returns or raises")

    def _once(self, asked: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "zimage"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.address, json.dumps(asked).encode(), headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                return self._body(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise _Refused(error.code, self._explanation(error, deadline)) from None
        except urllib.error.URLError as error:
            raise (error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason))) from None

    def _body(self, response: Any, deadline: float) -> bytes:
        """All of it, within the time and the size there are; a body that comes drop by drop ends too."""
        chunks, size = [], 0
        while chunk := response.read1(CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_ANSWER:
                raise self._error(f"sent an answer of more than {MAX_ANSWER // 1_000_000} MB")
            if time.monotonic() > deadline:
                raise TimeoutError
        if getattr(response, "length", None):
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(chunks)

    def _explanation(self, error: urllib.error.HTTPError, deadline: float) -> str:
        """Where a redirect leads, or what the body says, if it can be read."""
        if 300 <= error.code < 400:
            return error.headers.get("Location", "").split("?")[0]
        try:
            return _said(self._body(error, deadline))
        except (OSError, http.client.HTTPException, RemoteError):
            return ""

    def content_of(self, body: bytes) -> str:
        """choices[0].message.content of a chat completion. Raises RemoteError."""
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise self._error("answered with something else than JSON; is this a chat server's url?") from None
        try:
            choice = answer["choices"][0]
            content = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            said = _said(body)
            raise self._error("answered without choices[0].message.content" + (f": {said}" if said else "")) from None
        if not isinstance(content, str) or content != content.encode(errors="ignore").decode():
            why = "; max_tokens may be too few" if choice.get("finish_reason") == "length" else ""
            raise self._error(f"answered with a content that is no text{why}")
        return content

    def _error(self, what: str) -> RemoteError:
        line = f"{self.address} {what}"
        line = line if self.key is None else line.replace(self.key, "[key]")
        return RemoteError(line if len(line) <= SHOWN else line[:SHOWN] + "…")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the redirect becomes an error."""


def _meaning(refused: _Refused) -> str:
    """What a status means, with what the server says of it: but of a key that it may quote."""
    status, said = refused.status, f": {refused.said}" if refused.said else ""
    if status in (401, 403):
        return f"refused the key ({status}); check api_key"
    if 300 <= status < 400:
        return f"has moved ({status}); give the url it has moved to{said}"
    if status == 404:
        return f"knows no such page or model (404){said}"
    return f"answered with status {status}{said}"


def _said(body: bytes) -> str:
    """The message of an error's body on one line: {"error": {"message": …}}, {"error": …} or plain text."""
    try:
        found = json.loads(body)
        for name in ("error", "detail", "message"):
            found = found.get(name, found) if isinstance(found, dict) else found
    except (ValueError, RecursionError):
        found = body[:CHUNK].decode(errors="replace")
        found = "" if found.lstrip().startswith("<") else found  # a page for browsers
    return _one_line(found if isinstance(found, str) else json.dumps(found))


def _one_line(message: Any) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(message)).split())
