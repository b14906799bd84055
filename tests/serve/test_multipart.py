"""Bodies of several parts, as browsers and other programs write them, and as attackers do."""

import time

import httpx
import pytest

from zimage.serve.multipart import MOST_PARTS, Part, parts_of
from zimage.serve.refusals import Malformed

TYPE = "multipart/form-data; boundary=x"


def body(*parts, boundary="x"):
    pieces = [f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n" for head, content in parts]
    return b"".join(pieces) + f"--{boundary}--\r\n".encode()


def field(name, content=b"a"):
    return f'Content-Disposition: form-data; name="{name}"', content


def test_what_a_client_writes_is_read():
    files = {"image": ("a cat.png", b"\x89PNG\r\n--\r\n\r\n", "image/png"), "mask": ("", b"")}
    request = httpx.Request("POST", "http://x", data={"request": '{"prompt": "é"}'}, files=files)
    request.read()
    first, image, mask = parts_of(request.headers["content-type"], request.content)
    assert (first.name, first.text, first.filename) == ("request", '{"prompt": "é"}', None)
    assert image == Part("image", b"\x89PNG\r\n--\r\n\r\n", "a cat.png")
    assert mask.name == "mask"


def test_a_preamble_an_epilogue_and_a_quoted_boundary_are_legal():
    text = b"preamble\r\n" + body(field("a"), boundary="x y") + b"epilogue"
    assert parts_of('Multipart/Form-Data; charset=punycode; boundary="x y"', text) == [Part("a", b"a")]
    assert parts_of(TYPE, b"--x--") == []


def test_contents_of_any_bytes_are_whole():
    for content in (b"", b"\r\n", b"--y", b"\r\n--", bytes(range(256)), b"\r\n\r\n"):
        assert parts_of(TYPE, body(field("a", content), field("b"))) == [Part("a", content), Part("b", b"a")]


DAMAGED = {
    "no boundary": ("multipart/form-data", body(field("a"))),
    "an empty boundary": ("multipart/form-data; boundary=", body(field("a"))),
    "a long boundary": (f"multipart/form-data; boundary={'x' * 71}", body(field("a"), boundary="x" * 71)),
    "another type": ("application/json; boundary=x", body(field("a"))),
    "an empty body": (TYPE, b""),
    "no end": (TYPE, body(field("a"))[:-6]),
    "another boundary": (TYPE, body(field("a"), boundary="y")),
    "no header": (TYPE, b"--x\r\na\r\n--x--"),
    "a header without an end": (TYPE, body(("a" * 5000, b""))),
    "no name": (TYPE, body(("Content-Disposition: form-data", b""))),
    "another disposition": (TYPE, body(('Content-Disposition: attachment; name="a"', b""))),
    "text after a boundary": (TYPE, b"--xy\r\nContent-Disposition: form-data; name=a\r\n\r\n\r\n--x--"),
    "too many parts": (TYPE, body(*[field("a")] * (MOST_PARTS + 1))),
    "a long name of a file": (TYPE, body((f'Content-Disposition: form-data; name="a"; filename="{"b" * 5000}"', b""))),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_damaged_is_refused(kind):
    with pytest.raises(Malformed):
        parts_of(*DAMAGED[kind])


def test_as_many_parts_as_are_allowed_are_read():
    assert len(parts_of(TYPE, body(*[field("a")] * MOST_PARTS))) == MOST_PARTS


def test_text_is_utf8():
    with pytest.raises(Malformed, match="'a' should be text in UTF-8"):
        _ = parts_of(TYPE, body(field("a", b"\xff")))[0].text


@pytest.mark.parametrize(
    "text", [b"--x\r\n" * 200_000, b"\r" * 10**6, b"\r\n--" * 250_000, b"--x" + b" " * 10**6, b"--x\r\n" + b":" * 10**6]
)
def test_no_body_takes_long(text):
    start = time.process_time()
    with pytest.raises(Malformed):
        parts_of(TYPE, text)
    assert time.process_time() - start < 0.2
