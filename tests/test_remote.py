"""Text from a server: what is sent, and one clear line for everything that can go wrong."""

import re
import time

import pytest
from chat_server import Reply, said, serving

from zimage.errors import RemoteError, RequestError
from zimage.settings.declared import Sampling
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
    "page": (Reply(b"<html>not here</html>", 404), r"no such page or model \(404\)$"),
    "model": (Reply({"error": "no model 'qwen'"}, 404), r"\(404\): no model 'qwen'"),
    "status": (Reply({"detail": f"busy with\n{KEY}"}, 500), r"status 500: busy with \[key\]"),
    "html": (Reply(b"<html>hello</html>"), "something else than JSON"),
    "bytes": (Reply(b"\xff\xfe\x00"), "something else than JSON"),
    "nested": (Reply(DEEP), "something else than JSON"),
    "empty": (Reply(b""), "something else than JSON"),
    "list": (Reply([1]), r"without choices\[0\].message.content"),
    "fields": (Reply({"choices": []}), r"without choices\[0\].message.content"),
    "error as 200": (Reply({"error": {"message": "overloaded"}}), "content: overloaded"),
    "null": (said(None, finish_reason="length"), "no text; max_tokens may be too few"),
    "number": (said(7), "no text$"),
    "surrogate": (said("\ud800"), "no text$"),
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
