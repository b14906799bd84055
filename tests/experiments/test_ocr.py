"""Quoted texts: found in prompts, compared with what was seen, and read from pictures."""

import sys
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw, ImageFont

from zimage.errors import RequestError
from zimage.experiments.metrics.ocr import Reader, plain, quoted_texts, similarity


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a bakery called "CRUMB"', ["CRUMB"]),
        ("a sign “Open at 7” beside „Zu“ and «Fermé»", ["Open at 7", "Zu", "Fermé"]),
        ("「営業中」 on a door, ‘closed’ below", ["営業中", "closed"]),
        ("the dog's bone isn't the cat's", []),
        ('"…" and "" are nothing', []),
        ('one "open mark', []),
    ],
)
def test_quoted_texts(prompt, texts):
    assert quoted_texts(prompt) == texts


@pytest.mark.parametrize(
    ("wanted", "seen", "expected"),
    [
        ("crumb", "crumb", 1),
        ("crumb", "freshcrumbbakery", 1),
        ("crumb", "crunb", 0.8),
        ("crumb", "crmb", 0.8),
        ("crumb", "xcruumbx", 0.8),
        ("crumb", "", 0),
        ("ab", "zzzzzz", 0),
        ("kitten", "sitting", 1 - 2 / 6),  # "sittin"
    ],
)
def test_similarity(wanted, seen, expected):
    assert similarity(wanted, seen) == pytest.approx(expected)


def test_what_recognisers_guess_does_not_count():
    assert plain("Öpen  at\n7 — ＡＢ!") == "öpenat7ab"


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(RequestError, match=r"pip install .*\[metrics\]") as raised:
        Reader()
    assert raised.value.fields == ("metric",)


@pytest.fixture(scope="module")
def reader():
    for package in ("rapidocr", "onnxruntime"):
        pytest.importorskip(package, reason="the extra metrics is not installed")
    return Reader()


def sign(text: str) -> Image.Image:
    board = Image.new("RGB", (240, 240), "#204060")
    ImageDraw.Draw(board).text((20, 90), text, "white", ImageFont.load_default(48))
    return board


def test_texts_are_read(reader):
    prompt = 'a sign that says "OPEN 24"'
    assert reader.score(sign("OPEN 24"), prompt) == 1
    assert reader.score(sign("CAFE"), prompt) < 0.5


def test_every_quoted_text_counts(reader, monkeypatch):
    monkeypatch.setattr(reader, "lines", lambda picture: ["OPEN", "24"])
    assert reader.score(sign(""), '"Open 24" over "ZQWK"') == 0.5
    assert reader.score(sign(""), "a sign that quotes nothing") is None


def test_colours_reach_the_recogniser_as_it_expects_them(reader, monkeypatch):
    seen = []
    monkeypatch.setattr(reader, "_engine", lambda pixels: seen.append(pixels) or SimpleNamespace(txts=None))
    assert reader.lines(Image.new("RGB", (2, 1), (255, 128, 0))) == []
    assert seen[0][0, 0].tolist() == [0, 128, 255]
