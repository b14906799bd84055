"""Text from a server: what is sent, and one clear line for everything that can go wrong."""

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from chat_server import DRIPS, OK, Reply, dripping, said, serving

from zimage.errors import RemoteError, RequestError
from zimage.settings.rewriting import Sampling
from zimage.text import remote
from zimage.text.generate import split_thinking

KEY = "sk-secret-0123456789"
MESSAGES = [{"role": "system", "content": "rewrite"}, {"role": "user", "content": "a cat ☕"}]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def complete(url: str, **settings):
    return remote.complete(url, "qwen", MESSAGES, settings.pop("sampling", Sampling()), **settings)


def failure(chat, **settings) -> str:
    with pytest.raises(RemoteError) as error:
        complete(chat.url, **{"timeout": 5.0, "api_key": KEY, **settings})
    line = str(error.value)
    assert "\n" not in line
    assert KEY not in line
    assert line.startswith(chat.url)
    assert error.value.__cause__ is None
    return line


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_question_and_the_answer(suffix):
    sampling = Sampling(temperature=0.25, top_p=0.5, top_k=7, min_p=0.125, presence_penalty=1.5)
    with serving(said("<think>hm</think>\na small cat ☕")) as chat:
        text = complete(chat.url + suffix, sampling=sampling, max_tokens=99, seed=5, api_key=KEY)
    assert split_thinking(text) == ("hm", "a small cat ☕")
    assert chat.paths == ["/v1/chat/completions"]
    assert chat.keys == [f"Bearer {KEY}"]
    assert chat.asked == [
        {
            "model": "qwen",
            "messages": MESSAGES,
            "temperature": 0.25,
            "top_p": 0.5,
            "presence_penalty": 1.5,
            "top_k": 7,
            "min_p": 0.125,
            "max_tokens": 99,
            "seed": 5,
            "stream": False,
        }
    ]


def test_without_key_and_seed():
    with serving(said("yes")) as chat:
        assert complete(chat.url) == "yes"
    assert chat.keys == [None]
    assert "seed" not in chat.asked[0]


@pytest.mark.parametrize(
    "first", [Reply(status=500), Reply(status=503), Reply(status=429), Reply(hang_up=True), Reply(b"{}" * 99, cut=True)]
)
def test_what_may_pass_is_tried_three_times(first):
    with serving(first, first, said("at last")) as chat:
        assert complete(chat.url) == "at last"
    with serving(first) as chat:
        failure(chat)
    assert len(chat.asked) == 3


def test_a_server_that_knows_no_top_k_is_asked_without():
    refusal = Reply({"error": {"message": "Unrecognized request argument supplied: top_k"}}, 400)
    with serving(refusal, said("yes")) as chat:
        assert complete(chat.url) == "yes"
    assert "top_k" in chat.asked[0]
    assert not {"top_k", "min_p"} & set(chat.asked[1])
    with serving(refusal) as chat:
        assert "Unrecognized request argument" in failure(chat)


DEEP = b"[" * 100_000
FAULTS = {
    "key": (Reply({"error": {"message": f"Incorrect API key: {KEY}"}}, 401), r"refused the key \(401\); check api_key"),
    "forbidden": (Reply(status=403), r"refused the key \(403\)"),
    "page": (Reply(b"<html>not here</html>", 404), r"does not know this page or model \(404\)$"),
    "model": (Reply({"error": "no model 'qwen'"}, 404), r"\(404\): no model 'qwen'"),
    "status": (Reply({"detail": f"busy with\n{KEY}"}, 500), r"status 500: busy with \[key\]"),
    "html": (Reply(b"<html>hello</html>"), "something other than JSON"),
    "bytes": (Reply(b"\xff\xfe\x00"), "something other than JSON"),
    "nested": (Reply(DEEP), "something other than JSON"),
    "empty": (Reply(b""), "something other than JSON"),
    "list": (Reply([1]), r"without choices\[0\].message.content"),
    "fields": (Reply({"choices": []}), r"without choices\[0\].message.content"),
    "error as 200": (Reply({"error": {"message": "overloaded"}}), "content: overloaded"),
    "null": (said(None, finish_reason="length"), "not text; max_tokens may be too small"),
    "number": (said(7), "not text$"),
    "surrogate": (said("\ud800"), "not text$"),
    "huge": (said("x" * 4_100_000), "more than 4 MB"),
    "huge error": (Reply(b"x" * 5_000_000, 418), "status 418$"),
    "long error": (Reply({"error": "x" * 390 + KEY}, 418), "x…$"),
    "redirect": (Reply(status=302, location="ftp://example.com/x?key=1"), "has moved .*: ftp://example.com/x$"),
    "permanent": (Reply(status=308, location="https://example.com"), "has moved .*: https://example.com"),
    "silent": (Reply(silent=True), "did not answer within 0.2 seconds"),
    "drip": (Reply(b"x" * 1000, drip=0.05), "did not answer within 0.2 seconds"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_clear_line(fault):
    reply, says = FAULTS[fault]
    with serving(reply) as chat:
        line = failure(chat, timeout=0.2 if fault in ("silent", "drip") else 5.0)
    assert re.search(says, line), line
    assert len(chat.asked) == (3 if reply.status == 500 else 1)


def test_a_server_that_is_not_there():
    with serving(said("x")) as chat:
        pass
    start = time.monotonic()
    assert "cannot be reached: " in failure(chat)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("drip", DRIPS)
def test_one_deadline_holds_for_all_that_a_server_may_drip(drip):
    scheme = "https" if drip.startswith("TLS") else "http"
    with dripping(*DRIPS[drip]) as address:
        start = time.monotonic()
        with pytest.raises(RemoteError, match=r"^\S+ did not answer within 0.4 seconds$"):
            complete(f"{scheme}://{address}", timeout=0.4)
        assert 0.3 < time.monotonic() - start < 1.5
        _no_thread_is_left()


def test_a_name_that_is_looked_up_for_ever_ends_too(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(5) or [])
    start = time.monotonic()
    with pytest.raises(RemoteError, match=r"^http://host\S+ did not answer within 0.4 seconds$"):
        complete("http://host", timeout=0.4)
    assert time.monotonic() - start < 1.5
    released.set()
    _no_thread_is_left()


def test_a_connection_that_is_never_taken_ends_too():
    with socket.socket() as listener, contextlib.ExitStack() as others:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # what waits to be taken fills the queue
            other = others.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        start = time.monotonic()
        with pytest.raises(RemoteError, match=r"did not answer within 0.4 seconds$"):
            complete(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.4)
    assert time.monotonic() - start < 1.5
    _no_thread_is_left()


def _no_thread_is_left():
    for thread in threading.enumerate():
        if thread.name == "zimage-remote":
            thread.join(1.5)
            assert not thread.is_alive()


def test_the_deadline_covers_all_tries(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.3, 60))
    start = time.monotonic()
    with serving(Reply(status=503)) as chat:
        assert "status 503" in failure(chat, timeout=1.0)
    assert len(chat.asked) == 2
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200", b"nonsense\r\n\r\n", OK + b"x" * 200_000])
def test_an_answer_that_breaks_off_is_one_line(begin):
    with dripping(begin, [b""], 0) as address, pytest.raises(RemoteError, match=r"^http") as error:
        complete(f"http://{address}", timeout=0.5)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("location", ["http://[", "//\x80:x", "http://h:99999/", "x" * 9000, "\x1b[31mred", ""])
def test_a_location_that_is_none_is_one_line(location):
    with serving(Reply(status=302, location=location)) as chat:
        line = failure(chat)
    assert "has moved (302)" in line
    assert line.isprintable()
    assert len(line) < 500
    assert len(chat.asked) == 1


def test_a_server_that_sends_in_circles_is_asked_once():
    with serving(Reply(status=307, location="/v1/chat/completions")) as chat:
        failure(chat)
    assert len(chat.asked) == 1


def test_a_key_with_spaces_is_not_shown_either():
    key = "sk  with  spaces"
    with (
        serving(Reply({"error": f"what is {key}?"}, 418)) as chat,
        pytest.raises(RemoteError, match=r"what is \[key\]\?$"),
    ):
        complete(chat.url, api_key=key)


@pytest.mark.parametrize("status", [200, 404, 418])
def test_what_a_server_says_cannot_steer_the_terminal(status):
    with serving(Reply({"error": "\x1b]0;owned\x07 \x9b31m \u202ered"}, status)) as chat:
        assert failure(chat).isprintable()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("http_proxy", "socks5://127.0.0.1:9"), ("http_proxy", "nonsense://x"), ("http_proxy", "http://[")],
)
def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.delenv("no_proxy")
    with pytest.raises(RemoteError, match=r"^http://h/v1/chat/completions cannot be reached: ") as error:
        complete("http://h", timeout=1.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("host", ["h..x", "x" * 70, "a" * 64 + ".com", "127.0.0.1:1"])
def test_a_host_that_cannot_be_one(host):
    with pytest.raises(RemoteError, match=" cannot be reached: "):
        complete(f"http://{host}", timeout=5.0)


def test_without_httpx_the_extra_is_named():
    code = (
        "import sys; sys.modules['httpx'] = None\n"
        "from zimage.text.remote import complete\nfrom zimage.settings.rewriting import Sampling\n"
        "try: complete('http://127.0.0.1:9', 'm', [], Sampling())\nexcept Exception as e: print(type(e).__name__, e)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.startswith("RemoteError")
    assert 'pip install "zimage-torch[remote]"' in said
    assert 'pip install -e ".[remote]"' in said


def test_bytes_are_sent_and_answered_as_they_are():
    with serving(Reply(b"\0\x1b[1m\xff", 418)) as server:
        call = remote.Call(server.url, KEY, 5.0)
        answer = call.ask("POST", b"[1]", {"Content-Type": "application/octet-stream"})
    assert (answer.status, answer.body, answer.headers["content-length"]) == (418, b"\0\x1b[1m\xff", "6")
    assert (server.asked, server.keys) == ([[1]], [f"Bearer {KEY}"])


def test_an_upload_that_nobody_reads_ends_too():
    with dripping(b"", (), 0) as address, pytest.raises(RemoteError, match=r"did not answer within 0\.4 seconds"):
        remote.Call(f"http://{address}", None, 0.4).ask("PUT", bytes(50_000_000))


def test_a_redirect_is_not_followed_with_the_key():
    with serving(said("stolen")) as other, serving(Reply(status=307, location=other.url)) as chat:
        failure(chat)
    assert other.keys == []


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://host", "http://", "http://[::1", "http://h:99999", "http://h/a b", "http://ü.de",
     "http://user:pw@host", "http://host/v1?key=x", "file:///etc/passwd"],
)  # fmt: skip
def test_a_url_that_cannot_be_one(url):
    with pytest.raises(RequestError, match="url") as error:
        complete(url)
    assert "pw" not in str(error.value)


@pytest.mark.parametrize("key", ["", " ", f"{KEY}\n", f"{KEY}\r\nHost: x", f"ü{KEY}"])
def test_a_key_that_no_header_can_carry_is_not_shown(key):
    with pytest.raises(RequestError, match="api_key") as error:
        complete("http://127.0.0.1:9", api_key=key)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_none(timeout):
    with pytest.raises(RequestError, match="timeout"):
        complete("http://127.0.0.1:9", timeout=timeout)
