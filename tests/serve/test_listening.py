"""A real server on a real socket: who waits, floods, drips or does not read; how it starts, and how it ends.

What our connections do, and uvicorn's do not, is tried on both, so that no test passes for another reason.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zimage.errors import RequestError
from zimage.serve.binding import bind, url_of
from zimage.serve.token import read_token
from zimage.settings.serving import ServeSettings

SCRIPT = Path(__file__).with_name("listened.py")
TOKEN = "correct-horse-battery"
SETTINGS = {"port": 0, "header_timeout": 0.2, "idle_timeout": 0.2, "grace": 0.5, "max_upload": 1}
PATIENCE = 1.5  # seconds in which what has a time-out of 0.2 ends, on a busy machine too


class Process:
    """The server as a process of its own."""

    def __init__(self, **options):
        command = [sys.executable, str(SCRIPT), json.dumps({**SETTINGS, **options})]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rpartition(":")[2]) if self.url else 0

    def connect(self, small=False):
        client = socket.socket()
        if small:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(("127.0.0.1", self.port))
        return client

    def head(self, path="/", method="GET", version="1.1", *more):
        lines = [f"{method} {path} HTTP/{version}", f"Host: 127.0.0.1:{self.port}", *more, "", ""]
        return "\r\n".join(lines).encode()

    def tell(self, data):
        """Everything that the server answers to bytes until it closes."""
        with self.connect() as client:
            client.sendall(data)
            return received(client)

    def refusal(self, data):
        """The head and the body of the first answer, which names its length."""
        with self.connect() as client:
            client.sendall(data)
            client.settimeout(5)
            answer = client.makefile("rb")
            head = b"".join(iter(answer.readline, b"\r\n"))
            return head, answer.read(int(re.search(rb"content-length: (\d+)", head.lower())[1]))

    def get(self, path="/"):
        return self.tell(self.head(path, "GET", "1.1", "Connection: close"))

    def running(self):
        return json.loads(self.get("/running").partition(b"\r\n\r\n")[2].split(b"\r\n")[1])

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def end(self):
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out.split(), err


def received(client, seconds=10.0):
    client.settimeout(seconds)
    answer = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while piece := client.recv(1 << 16):
            answer += piece
    return answer


def is_closed(client, seconds=0.05):
    client.settimeout(seconds)
    try:
        while client.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@contextlib.contextmanager
def process(**options):
    started = Process(**options)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


@pytest.fixture(scope="module")
def server():
    with process() as started:
        yield started
        started.signal()
        assert started.end() == (0, ["stopped", "closed"], "")  # and no line of all that went on below


@pytest.fixture(scope="module")
def plain():
    with process(plain=True) as started:
        yield started


# ---------------------------------------------------------------- what uvicorn lets through


def drip(client, piece, seconds=PATIENCE):
    """Send a piece again and again; whether the server closes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            client.sendall(piece)
        except ConnectionError:
            return True
        if is_closed(client):
            return True
    return False


def slow_header(server):
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: ")
        return drip(client, b"a")


def slow_second_header(server):
    with server.connect() as client:
        client.sendall(server.head())
        client.recv(1 << 16)
        return drip(client, b"G")


def silence(server):
    with server.connect() as client:
        return is_closed(client, PATIENCE)


def an_unread_body(server):
    with server.connect() as client:
        client.sendall(server.head("/", "POST", "1.1", "Content-Length: 100000"))
        return drip(client, b"a")


def an_unread_body_in_chunks(server):
    with server.connect() as client:
        client.sendall(server.head("/", "POST", "1.1", "Transfer-Encoding: chunked"))
        return drip(client, b"1\r\na\r\n")


def an_unread_answer(server):
    with server.connect(small=True) as client:
        client.sendall(server.head("/big"))
        end = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < end:
            if server.running()["/big"] == 0:
                return True
            time.sleep(0.2)
        return False


def crumbs(server):
    """A body in chunks of one byte: the time until the next client is answered."""
    with server.connect() as client, contextlib.suppress(ConnectionError):
        client.sendall(server.head("/read", "POST", "1.1", "Transfer-Encoding: chunked"))
        client.sendall(b"1\r\na\r\n" * 60_000)
        client.sendall(b"1\r\na\r\n")
        start = time.monotonic()
        server.get()
        return time.monotonic() - start < 0.2  # 0.002; uvicorn alone takes 0.4
    return True


def a_crowd(server):
    """More idle connections than the process may open files: the next client is answered all the same."""
    with contextlib.ExitStack() as crowd:
        for _ in range(450):
            crowd.enter_context(server.connect()).sendall(b"GET")
        with server.connect() as client:
            client.sendall(server.head())
            return received(client, 0.5).startswith(b"HTTP/1.1 200")


ATTACKS = [
    slow_header,
    slow_second_header,
    silence,
    an_unread_body,
    an_unread_body_in_chunks,
    an_unread_answer,
    crumbs,
    a_crowd,
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_the_connection_ends(server, attack):
    assert attack(server)


def test_uvicorn_alone_would_not_end_them(plain):
    with ThreadPoolExecutor() as pool:
        assert not any(pool.map(lambda attack: attack(plain), ATTACKS[:-2]))
    assert not crumbs(plain)
    assert not a_crowd(plain)


# ---------------------------------------------------------------- what is no HTTP, or an odd one

REFUSED = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    "another protocol": (b"SSH-2.0-OpenSSH\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 400),
    "a zero byte": (b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "no host, in 1.0": (b"GET / HTTP/1.0\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: HOST\r\nHost: HOST\r\n\r\n", 400),
    "a user": (b"GET / HTTP/1.1\r\nHost: a@HOST\r\n\r\n", 403),
    "another host": (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
    "an absolute form": (b"GET http://evil.example/ HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
    "an authority": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
    "a space in a name": (b"GET / HTTP/1.1\r\nHost : HOST\r\n\r\n", 400),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na", 400),
    "a negative length": (b"POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: -1\r\n\r\n", 400),
    "chunks and a length": (
        b"POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "another coding": (b"POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    "a huge header": (b"GET / HTTP/1.1\r\nHost: HOST\r\nX: " + b"a" * 40_000, 431),
    "a large header": (b"GET / HTTP/1.1\r\nHost: HOST\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431),
    "a path that climbs": (b"GET /page/%2e%2e/api HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
    "a line break in a path": (b"GET /a%0d%0aX:%20b HTTP/1.1\r\nHost: HOST\r\n\r\n", 400),
    "a bad chunk": (
        b"POST /read HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\nzz\r\n\r\n",
        400,
    ),
    "a long line of a chunk": (
        b"POST /read HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 40_000,
        431,
    ),
    "crumbs": (
        b"POST /read HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 200,
        413,
    ),
    "a long body": (
        b"POST /read HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n"
        + (b"10000\r\n%s\r\n" % bytes(1 << 16)) * 17,
        413,
    ),
    "a pausing body": (b"POST /read HTTP/1.1\r\nHost: HOST\r\nContent-Length: 9\r\n\r\na", 408),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_odd_is_refused_in_words(server, kind):
    data, status = REFUSED[kind]
    head, body = server.refusal(data.replace(b"HOST", f"127.0.0.1:{server.port}".encode()))
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]["message"]
    assert b"content-security-policy: default-src 'none'" in head.lower()
    assert b"uvicorn" not in head


def test_the_rest_of_a_refused_body_is_read_so_that_the_answer_arrives(server):
    with server.connect() as client:
        client.sendall(server.head("/read", "POST", "1.1", f"Content-Length: {4 << 20}"))
        client.sendall(bytes(4 << 20))
        assert received(client, 1).startswith(b"HTTP/1.1 413")


def test_ordinary_requests_are_answered(server):
    assert server.get().startswith(b"HTTP/1.1 200")
    assert server.tell(server.head("/", "GET", "1.0")).startswith(b"HTTP/1.1 200")
    two = server.tell(server.head() + server.head("/", "GET", "1.1", "Connection: close"))
    assert two.count(b"HTTP/1.1 200") == 2
    upgrade = ("Connection: Upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")
    assert server.tell(server.head("/", "GET", "1.1", *upgrade)).startswith(b"HTTP/1.1 200")
    body = ("Content-Length: 5", "Expect: 100-continue", "Connection: close")
    answer = server.tell(server.head("/read", "POST", "1.1", *body) + b"12345")
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
    assert b"\r\ndate: " in server.get().lower()
    assert b"\r\nserver: " not in server.get().lower()


def test_small_chunks_are_read_as_long_as_they_are_few_or_grow(server):
    few, large = b"1\r\na\r\n" * 90, (b"800\r\n%s\r\n" % bytes(2048)) * 300
    head = server.head("/read", "POST", "1.1", "Transfer-Encoding: chunked", "Connection: close")
    answer = server.tell(head + few + large + few + b"0\r\n\r\n")
    assert b"\r\n%d\r\n" % (180 + 2048 * 300) in answer


def test_a_body_follows_its_header_at_once(server):
    """And not once the client has acknowledged the header, 40 ms later (Nagle's algorithm)."""
    waits = []
    with server.connect() as client:
        for _ in range(20):
            client.sendall(server.head())
            answer, start = client.recv(1 << 16), time.monotonic()
            while not answer.endswith(b"0\r\n\r\n"):
                answer += client.recv(1 << 16)
            waits.append(time.monotonic() - start)
    assert sorted(waits)[10] < 0.03


def test_garbage_while_an_answer_runs_ends_it_quietly(server):
    with server.connect() as client:
        client.sendall(server.head("/events", "POST", "1.1", "Transfer-Encoding: chunked"))
        assert b"data: 1" in client.recv(1 << 16) + client.recv(1 << 16)
        client.sendall(b"garbage\r\n")
        assert is_closed(client, 2)


def test_streams_outlive_the_time_outs(server):
    with server.connect() as client:
        client.sendall(server.head("/events"))
        time.sleep(0.7)
        assert not is_closed(client)


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(number):
    with process() as server, server.connect() as stream, server.connect():
        stream.sendall(server.head("/events"))
        stream.recv(1 << 16)
        server.signal(number)
        assert server.end() == (0, ["stopped", "closed"], "")


def test_while_jobs_end_requests_are_answered():
    with process(stop=0.7, grace=2) as server:
        server.signal()
        time.sleep(0.3)
        assert server.get().startswith(b"HTTP/1.1 200")
        assert server.end() == (0, ["stopped", "closed"], "")


def test_jobs_that_do_not_end_are_left():
    with process(stop=60) as server:
        server.signal()
        status, said, warned = server.end()
        assert (status, said) == (0, ["closed"])
        assert "did not end in time" in warned


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(number):
    with process(stop=60, grace=60) as server:
        server.signal(number)
        time.sleep(0.3)
        server.signal(number)
        assert server.end() == (128 + number, [], "error: interrupted\n")


# ---------------------------------------------------------------- the start


def test_an_error_at_the_start_is_the_app_s_own():
    with process(fails="the model is missing") as server:
        assert server.end() == (1, [], "error: the model is missing\n")


def settings(**named):
    return ServeSettings(**{"port": 0, **named})


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"port {port} is in use; pass another one with --port") as caught:
            bind(settings(port=port), None)
        assert caught.value.fields == ("port",)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("198.51.100.7", "host 198.51.100.7 is not an address of this computer"),
        ("no-such-host.invalid", "host 'no-such-host.invalid' is not a known name or address"),
        ("a" * 300, "is not a known name or address"),
    ],
)
def test_a_host_that_cannot_be_listened_on_is_one_line(host, message):
    with pytest.raises(RequestError, match=message) as caught:
        bind(settings(host=host), TOKEN)
    assert caught.value.fields == ("host",)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_computers_need_a_token(host):
    with pytest.raises(RequestError, match=r"so clients need a token.*--token-file, or set ZIMAGE_TOKEN") as caught:
        bind(settings(host=host), None)
    assert "host" in caught.value.fields
    listeners = bind(settings(host=host), TOKEN)
    assert listeners
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:"), ("localhost", "http://localhost:"), ("0.0.0.0", "http://127.0.0.1:")],
)
def test_the_url_leads_to_the_server(host, url):
    listeners = bind(settings(host=host), TOKEN)
    ports = {listener.getsockname()[1] for listener in listeners}
    assert len(ports) == 1
    assert url_of(settings(host=host), listeners) == f"{url}{ports.pop()}"
    for listener in listeners:
        listener.close()
    assert url_of(settings(host="::1"), listeners[:0] or [_Named()]) == "http://[::1]:7860"


class _Named:
    def getsockname(self):
        return ("::1", 7860)


# ---------------------------------------------------------------- the token


def test_the_token_comes_from_the_file_then_from_the_variable(tmp_path, caplog):
    file = tmp_path / "token"
    file.write_text(f"  {TOKEN}\n")
    file.chmod(0o600)
    assert read_token(settings(token_file=str(file)), {"ZIMAGE_TOKEN": "x" * 20}) == TOKEN
    assert read_token(settings(), {"ZIMAGE_TOKEN": "x" * 20}) == "x" * 20
    assert read_token(settings(), {"ZIMAGE_TOKEN": ""}) is None
    assert caplog.messages == []
    file.chmod(0o644)
    assert read_token(settings(token_file=str(file)), {}) == TOKEN
    assert caplog.messages == [
        f"other users of this computer can read the token in {file}; change that with: chmod 600 {file}"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 characters; it should have 16 to 1,024"),
        (b"x" * 15, "has 15 characters"),
        (b"  " + b"x" * 15 + b"\n", "has 15 characters"),
        (b"x" * 1025, "has 1025 characters"),
        (b"x" * 5000, "has 5,000 bytes"),
        (b"x" * 16 + b"\n" + b"y" * 16, "should be one line"),
        (b"x" * 16 + b" y", "should be one line"),
        ("é".encode() * 16, "should be one line of letters, digits and signs of ASCII"),
        (b"\xff" * 16, "should hold text"),
    ],
)
def test_a_token_that_cannot_be_used_is_one_line(tmp_path, content, message):
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        read_token(settings(token_file=str(file)), {})
    assert caught.value.fields == ("token_file",)
    assert "x" * 15 not in str(caught.value)


def test_a_token_is_read_from_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "is a named pipe"), ("", "is a folder"), ("none", "is missing")):
        with pytest.raises(RequestError, match=message):
            read_token(settings(token_file=str(tmp_path / name)), {})
