"""A chat server for tests: answers from a list, each served once, the last one again and again."""

import contextlib
import itertools
import json
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """A status with a body, or something that goes wrong."""

    body: Any = None  # JSON, or bytes as they are
    status: int = 200
    location: str | None = None
    cut: bool = False  # the line goes dead after half of the body
    hang_up: bool = False  # before anything is answered
    silent: bool = False  # nothing comes
    drip: float = 0.0  # seconds between single bytes


@dataclass
class FakeChat:
    replies: list[Reply]
    url: str = ""
    asked: list[dict] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)


def said(text: Any, **more: Any) -> Reply:
    """A completion as servers send it."""
    return Reply({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, **more}]})


@contextlib.contextmanager
def serving(*replies: Reply) -> Iterator[FakeChat]:
    """A server at `url` on a free port of this machine."""
    chat = FakeChat(list(replies))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"chat": chat}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield chat
    finally:
        chat.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
EVER = itertools.repeat
DRIPS = {  # what a server sends at once, what it goes on to send, and the pause before each piece
    "nothing": (b"", (), 0),
    "status line": (b"HTTP/1.1 200 ", EVER(b"O"), 0.02),
    "header": (OK + b"X-Name: ", EVER(b"x"), 0.02),
    "headers": (OK, (b"X-%d: x\r\n" % i for i in itertools.count()), 0.02),
    "body": (OK + b"Content-Length: 99999\r\n\r\n", EVER(b"x"), 0.02),
    "body without an end": (OK + b"\r\n", EVER(b"x"), 0.02),
    "chunk": (CHUNKED + b"fffff\r\n", EVER(b"x"), 0.02),
    "chunks": (CHUNKED, EVER(b"1\r\nx\r\n"), 0.02),
    "chunk size": (CHUNKED, EVER(b"0"), 0.02),
    "chunk extension": (CHUNKED + b"5;", EVER(b"x"), 0.02),
    "trailer": (CHUNKED + b"1\r\nx\r\n0\r\nX-Name: ", EVER(b"x"), 0.02),
    "100 Continue": (b"", EVER(b"HTTP/1.1 100 Continue\r\n\r\n"), 0.02),
    "flood of 100 Continue": (b"", EVER(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), 0),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: http://", EVER(b"x"), 0.02),
    "error": (b"HTTP/1.1 500 No\r\nContent-Length: 99999\r\n\r\n", EVER(b"x"), 0.02),
    "TLS": (b"", (), 0),
    "TLS record": (b"\x16\x03\x03\x3f\xff", EVER(b"x"), 0.02),
}


@contextlib.contextmanager
def dripping(begin: bytes, forever: Iterable[bytes], pause: float) -> Iterator[str]:
    """The address of a server that reads nothing, sends `begin`, and then piece after piece, with a pause before each.

    After five seconds it hangs up, so that a client without a deadline of its own fails its test and does not stop it.
    """
    done = threading.Event()

    def drip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.sendall(begin)
            for piece in forever:
                if done.wait(pause):
                    return
                connection.sendall(piece)
            if not forever:
                done.wait()  # silence

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        timer = threading.Timer(5, done.set)
        timer.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            timer.cancel()
            done.set()
            listener.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    chat: FakeChat

    def do_POST(self) -> None:
        chat = self.chat
        chat.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        chat.paths.append(self.path)
        chat.keys.append(self.headers["Authorization"])
        reply = chat.replies.pop(0) if len(chat.replies) > 1 else chat.replies[0]
        if reply.silent:
            chat.released.wait(10)
        if not (reply.silent or reply.hang_up):
            self._send(reply)

    def _send(self, reply: Reply) -> None:
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        if reply.location:
            self.send_header("Location", reply.location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side may have heard enough
            for piece in [body[i : i + 1] for i in range(len(body))] if reply.drip else [body]:
                self.wfile.write(piece[: len(piece) // 2] if reply.cut else piece)
                self.chat.released.wait(reply.drip)

    def log_message(self, *_: Any) -> None:
        pass
