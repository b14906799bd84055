"""The model hub, by its own library's client and login: the only file that imports `huggingface_hub` (extra `hub`).

Nothing that a hub says is trusted. Its listing is read within limits of size and time and checked word by word; a file
is read no further than was announced. The library's own calls do neither, and its downloads keep 10 MB at a time, which
an interruption loses, so requests are made here.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from zimage.errors import CheckpointError, FetchError, RequestError, install_hint
from zimage.formats.hub_cache import is_repository
from zimage.formats.json_text import json_object
from zimage.text.connections import Connections
from zimage.text.remote import checked_url
from zimage.weights.manifest import BLOB, SHA256, is_needed, is_size

HOME = "https://huggingface.co"
LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")
LISTING_TIME = 60.0  # seconds for the whole of it
LISTING_SIZE = 8 << 20  # bytes; a repository of 20,000 files
MOST_FILES = 1000  # that a render may need
PATIENCE, LEAST = 120.0, 64 << 10  # a transfer brings that many bytes in so many seconds, or is given up
RETRIES = 5  # in a row that bring nothing
PAUSES = (1.0, 2.0, 4.0, 8.0, 8.0)  # seconds before each of them
BUSY = (408, 429)
MOST_REDIRECTS = 6


@dataclass(frozen=True)
class Remote:
    """A file as the hub describes it: a large one by sha256, others by git's hash of their content."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit that a render needs."""

    commit: str
    files: tuple[Remote, ...]


class Sink(Protocol):
    """Where a file's bytes go; `size` counts those that are there."""

    size: int

    def write(self, data: bytes) -> None: ...

    def restart(self) -> None: ...


class Hub:
    """One repository. Every failure is a FetchError, except RequestError for an unusable name or endpoint, or where the
    library is not installed.
    """

    def __init__(self, repository: str, endpoint: str | None = None):
        _require_library()
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session

        self.repository, self._connections = check_repository(repository), Connections()
        self.endpoint = _checked_endpoint(endpoint or constants.ENDPOINT)
        self.knows_login = _may_know_login(self.endpoint, constants.ENDPOINT)
        # A compressed transfer could not be resumed at one of the file's bytes, and might unpack to any size.
        self._headers = build_hf_headers(library_name="zimage", token=None if self.knows_login else False)
        self._headers["Accept-Encoding"] = "identity"
        # A client of our own, of the library's kind: the library's is shared, and reads redirects without a limit.
        session, timeout = get_session(), constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._client = type(session)(event_hooks=session.event_hooks, timeout=timeout)

    def listing(self, revision: str | None) -> Listing:
        """What the repository holds at a branch, tag or commit (default: its main branch)."""
        place = quote(revision or "main", safe="", errors="replace")
        url = f"{self.endpoint}/api/models/{self.repository}/revision/{place}?blobs=true"
        with self._one_line(f"revision {revision or 'main'}"):
            text = self._connections.within(LISTING_TIME, lambda: self._text(url))
            return _checked_listing(json_object("its listing", text, LISTING_SIZE))

    def read(self, remote: Remote, commit: str, sink: Sink, watch: Callable[[], None]) -> None:
        """Append to `sink` what it lacks of a file, resuming by itself after short breaks.

        `watch` is called in this thread while bytes arrive in another.
        """
        url = f"{self.endpoint}/{self.repository}/resolve/{commit}/{quote(remote.path)}"
        patience = _Patience(sink, watch)
        with self._one_line(remote.path):
            self._connections.within(float("inf"), lambda: self._transfer(url, remote, sink), patience.look)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _text(self, url: str) -> bytes:
        with self._answer(url, {}) as response:
            text = bytearray()
            for piece in response.iter_raw():
                text += piece
                if len(text) > LISTING_SIZE:
                    raise ValueError(f"more than {LISTING_SIZE >> 20} MB")
            return bytes(text)

    def _transfer(self, url: str, remote: Remote, sink: Sink) -> None:
        """Raises FetchError, and what the client raises after some tries that brought nothing."""
        from huggingface_hub import errors

        tries, reached = 0, sink.size
        while sink.size < remote.size:
            try:
                self._read_on(url, sink)
                broke: Exception = _Again(f"it broke off after {sink.size:,} bytes")
            except (errors.HTTPError, _Again) as error:
                broke = error
            tries = 0 if sink.size > reached else tries + 1
            reached = max(reached, sink.size)
            if tries > RETRIES:
                raise broke
            if sink.size < remote.size:
                time.sleep(PAUSES[max(tries - 1, 0)])

    def _read_on(self, url: str, sink: Sink) -> None:
        """Read what one answer brings."""
        with self._answer(url, {"Range": f"bytes={sink.size}-"} if sink.size else {}) as response:
            if sink.size and response.status_code != 206:  # the hub sends all of it again
                sink.restart()
            for piece in response.iter_raw():
                sink.write(piece)

    @contextlib.contextmanager
    def _answer(self, url: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """A response of status 2xx, its body not yet read. Raises _Refused, or _Again where a later try may succeed.

        Redirects are followed one by one: the client strips the login from one to another host, but reads its body.
        """
        request = self._client.build_request("GET", url, headers={**self._headers, **headers})
        for _ in range(MOST_REDIRECTS):
            request.extensions["trace"] = self._connections.trace
            with contextlib.closing(self._client.send(request, stream=True)) as response:
                if response.next_request is None:
                    _check_status(response)
                    yield response
                    return
                request = response.next_request
            if urlsplit(self.endpoint).scheme == "https" != request.url.scheme:
                raise ValueError("it redirects to an address without encryption, which is not followed")
        raise ValueError(f"it redirects more than {MOST_REDIRECTS} times")

    @property
    def place(self) -> str:
        return f"{self.repository} at {self.endpoint}"

    @contextlib.contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        """Turn the client's errors, which run over many lines and vary with the HTTP package, into one line each."""
        from huggingface_hub import errors

        try:
            yield
        except _Refused as answer:
            raise FetchError(f"{self.place} {self._meaning(answer, what)}") from None
        except (errors.HTTPError, ConnectionError, _Again) as error:
            raise FetchError(f"{self.place} cannot be reached ({_brief(error)}) for {what}; {AGAIN}") from error
        except TimeoutError:
            raise FetchError(f"{self.place} sent too little for too long for {what}; {AGAIN}") from None
        except OSError as error:
            if error.errno is not None:
                raise  # of this machine: the disk, not the hub
            raise FetchError(f"{self.place} cannot be asked ({_brief(error)}) for {what}") from error
        except (ValueError, CheckpointError) as error:
            raise FetchError(f"{self.place} gave no usable answer ({_brief(error)}) for {what}") from error

    def _meaning(self, answer: "_Refused", what: str) -> str:
        login = "log in with `hf auth login`"
        if not self.knows_login:
            login += f" and set HF_ENDPOINT={self.endpoint} (by https), since a login is sent to no other endpoint"
        if answer.code == "GatedRepo":
            return f"is gated: accept its terms there, then {login}"
        if answer.code == "RevisionNotFound":
            return f"has no {what}; name a branch, a tag or a commit"
        if answer.code == "RepoNotFound" or answer.status == 401:
            return f"was not found; it may be private: {login}"
        return f"answered {answer.status} for {what}; {AGAIN}"


AGAIN = "run the same command again to resume"


class _Refused(Exception):
    """A status that no later try betters, and the hub's word for it."""

    def __init__(self, status: int, code: str):
        super().__init__(status)
        self.status, self.code = status, code


class _Again(Exception):
    """What passes: a busy hub, an answer that broke off."""


class _Patience:
    """Gives a transfer up that brings too little for too long, whatever it drips."""

    def __init__(self, sink: Sink, watch: Callable[[], None]):
        self._sink, self._watch = sink, watch
        self._since, self._size = time.monotonic(), sink.size

    def look(self) -> None:
        """Raises TimeoutError."""
        self._watch()
        now, size = time.monotonic(), self._sink.size
        if abs(size - self._size) >= LEAST:
            self._since, self._size = now, size
        elif now - self._since > PATIENCE:
            raise TimeoutError


def _check_status(response: Any) -> None:
    if response.status_code in BUSY:
        raise _Again(f"status {response.status_code}")
    if not 200 <= response.status_code < 300:
        raise _Refused(response.status_code, response.headers.get("X-Error-Code", ""))


def check_repository(name: str) -> str:
    """The name of a repository, if it can be one. Raises RequestError."""
    if not is_repository(name):
        raise RequestError(f"{name[:80]!r} is not a repository; write turbo, base or OWNER/NAME")
    return name


def _checked_endpoint(url: str) -> str:
    try:
        return checked_url(url)
    except RequestError as error:
        raise error.with_text(f"endpoint {url[:80]!r} cannot be used: {error}") from None


def _may_know_login(endpoint: str, configured: str) -> bool:
    """Whether the user's token is sent: to the library's own hub or the one that HF_ENDPOINT names, and encrypted."""
    parts = urlsplit(endpoint)
    hidden = parts.scheme == "https" or LOOPBACK.fullmatch(parts.hostname or "") is not None
    return hidden and _origin(endpoint) in (_origin(HOME), _origin(configured))


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _checked_listing(about: Mapping[str, Any]) -> Listing:
    """Raises ValueError for whatever is not as a hub lists it; files that no render needs are passed over."""
    commit, siblings = about.get("sha"), about.get("siblings")
    if not isinstance(commit, str) or not BLOB.fullmatch(commit):
        raise ValueError("it names no commit")
    if not isinstance(siblings, list) or not all(isinstance(sibling, dict) for sibling in siblings):
        raise ValueError("it lists no files")
    files = tuple(_described(sibling) for sibling in siblings if is_needed(sibling.get("rfilename")))
    if len(files) > MOST_FILES:
        raise ValueError(f"it lists {len(files):,} files of a model; at most {MOST_FILES:,} are fetched")
    if len({file.path.casefold() for file in files}) < len(files):
        raise ValueError("it lists two files of one name")
    return Listing(commit, files)


def _described(sibling: Mapping[str, Any]) -> Remote:
    path, lfs = sibling["rfilename"], sibling.get("lfs")
    if lfs is not None and not isinstance(lfs, dict):
        raise ValueError(f"its entry for {path} is not one that a hub lists for a file")
    # Of a large file, git's hash is that of its pointer.
    size, sha256, blob = (
        (lfs.get("size"), lfs.get("sha256"), None) if lfs else (sibling.get("size"), None, sibling.get("blobId"))
    )
    if size is None:
        raise ValueError(f"it states no size for {path}, so it cannot be checked")
    if not is_size(size):
        raise ValueError(f"it states the size of {path} as {str(size)[:40]!r}")
    for kind, pattern, value in (("sha256", SHA256, sha256), ("blobId", BLOB, blob)):
        if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
            raise ValueError(f"it states the {kind} of {path} as {str(value)[:40]!r}, which is not one")
    return Remote(path, size, sha256, blob)


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _require_library() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError:
        raise RequestError(f"fetching needs huggingface_hub, the extra `hub`: {install_hint('hub')}") from None
