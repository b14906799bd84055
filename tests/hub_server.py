"""A model hub for tests: the few addresses that huggingface_hub calls, served from memory, failing where told to."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0de"


@dataclass
class FakeHub:
    """Files of one repository. `log` holds the (method, path, Range) of every request for a file."""

    repository: str
    files: dict[str, bytes]
    url: str = ""
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    corrupt: set[str] = field(default_factory=set)  # sent with one bit turned
    break_after: dict[str, int] = field(default_factory=dict)  # bytes after which the line goes dead, then 503
    stall_after: dict[str, int] = field(default_factory=dict)  # bytes after which nothing comes any more
    status: dict[str, int] = field(default_factory=dict)  # path → status to answer with
    ranges: bool = True  # whether a Range is heeded
    hashes: bool = True  # whether the listing states them
    tamper: Callable[[dict], object] = lambda info: info  # what becomes of the listing; bytes are sent as they are
    extra: bytes = b""  # sent after every file's content, and counted
    told: list[tuple[str, str | None]] = field(default_factory=list)  # by place: the Authorization that came along
    released: threading.Event = field(default_factory=threading.Event)

    def transfers(self) -> list[str]:
        return [path for method, path, _ in self.log if method == "GET"]

    def info(self) -> dict:
        return {"id": self.repository, "sha": COMMIT, "siblings": [self._sibling(p, c) for p, c in self.files.items()]}

    def _sibling(self, path: str, content: bytes) -> dict:
        about = {"rfilename": path, "size": len(content)}
        if self.hashes:
            about["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path.endswith(".safetensors"):
                sha256 = hashlib.sha256(content).hexdigest()
                about["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
        return about


@contextlib.contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """`hub` at `hub.url`, on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that has heard enough
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def repository_of(folder: Path) -> dict[str, bytes]:
    """A model folder's files, with some that no render needs."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    extra = {
        "README.md": b"card",
        "text_encoder/pytorch_model.bin": b"pickle",
        "assets/a.png": b"x",
        "../evil.json": b"",
    }
    return {**files, "model_index.json": b'{"_class_name": "ZImagePipeline"}', **extra}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        repository = re.escape(self.hub.repository)
        if path.startswith("/api/"):
            self.hub.told.append(("api", self.headers.get("Authorization")))
        if match := re.fullmatch(rf"/api/models/{repository}/revision/(.+)", path):
            known = match[1] in ("main", COMMIT)
            listing = self.hub.tamper(self.hub.info()) if known else b""
            listing = listing if isinstance(listing, bytes) else json.dumps(listing).encode()
            self._send(200 if known else 404, listing, with_body,
                       {} if known else {"X-Error-Code": "RevisionNotFound"})  # fmt: skip
        elif match := re.fullmatch(rf"/{repository}/resolve/{COMMIT}/(.+)", path):
            self._resolve(match[1], with_body)
        elif match := re.fullmatch(r"/storage/(.+)", path):
            self._file(match[1], with_body)
        else:
            self._send(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})

    def _resolve(self, path: str, with_body: bool) -> None:
        """Large files lie on another host, which must not be told who asks."""
        self.hub.told.append(("hub", self.headers.get("Authorization")))
        if not path.endswith(".safetensors"):
            return self._file(path, with_body)
        place = self.hub.url.replace("127.0.0.1", "localhost")
        self._send(302, b"", with_body, {"Location": f"{place}/storage/{path}", "X-Repo-Commit": COMMIT})

    def _file(self, path: str, with_body: bool) -> None:
        wanted = self.headers.get("Range")
        if "localhost" in self.headers["Host"]:
            self.hub.told.append(("storage", self.headers.get("Authorization")))
        self.hub.log.append((self.command, path, wanted))
        if path in self.hub.status or path not in self.hub.files:
            return self._send(self.hub.status.get(path, 404), b"", with_body, {})
        content = self.hub.files[path]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
        if path in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        wanted = wanted if self.hub.ranges else None
        begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._send(206 if wanted else 200, content[begin:] + self.hub.extra, with_body, headers, path, begin)

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict, path: str = "", begin: int = 0) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        for limits, then in ((self.hub.break_after, self._break), (self.hub.stall_after, self._stall)):
            if path in limits:
                self.wfile.write(body[: max(limits[path] - begin, 0)])
                self.wfile.flush()
                return then(path)
        self.wfile.write(body)

    def _break(self, path: str) -> None:
        self.hub.break_after.pop(path)
        self.hub.status[path] = 503
        self.close_connection = True

    def _stall(self, _path: str) -> None:
        self.hub.released.wait(60)
        self.close_connection = True
