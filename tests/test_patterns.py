"""Patterns of output names, and the hint of unknown words: what people and files may write into them."""

import json
import os
import time

import pytest

from zimage.cli.hints import unknown_words
from zimage.cli.patterns import check_pattern
from zimage.cli.target import Target
from zimage.errors import CheckpointError, RequestError

GOOD = {
    "{prompt}-{seed}.png": "a-cat-7.png",
    "{seed:08}.png": "00000007.png",
    "{index:>3}.png": "  1.png",
    "{index:03d}.png": "001.png",
    "{seed:x}.png": "7.png",
    "{prompt:.3}.png": "a-c.png",
    "{prompt:_<8}.png": "a-cat___.png",
    "{width}x{height}, {{{steps}}}.png": "64x48, {8}.png",
    "{seed:100}.png": f"{7:100}.png",
}
BAD = (
    "{seed:>1000000000}.png", "{seed:>101}.png", "{prompt:.999999999}.png", "{seed:{width}}.png", "{prompt.upper}.png",
    "{prompt.__class__}.png", "{prompt[0]}.png", "{seed!r}.png", "{0}.png", "{}.png", "{x}.png", "{", "}",
    "{seed", "{seed:%}.png", "{seed:,}.png", "{seed:+}.png", "{prompt:d}.png", "{seed:s}.png", "x" * 2000 + ".png",
    "{" * 100_000, "{seed}" * 10_000 + ".png", "{seed:" + "9" * 5000 + "}.png",
)  # fmt: skip
REQUEST = {"prompt": "a cat", "seed": 7, "width": 64, "height": 48, "steps": 8}


@pytest.mark.parametrize("pattern", GOOD)
def test_patterns_that_are_filled(tmp_path, pattern):
    assert Target(str(tmp_path / pattern), 1)._name(REQUEST, 0) == GOOD[pattern]
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", BAD, ids=lambda pattern: pattern[:20])
def test_patterns_that_are_refused_at_once(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    begun = time.perf_counter()
    with pytest.raises(RequestError, match=r"^output") as error:
        Target(pattern, 1)
    assert len(str(error.value)) < 300
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize(
    "content", ["[]", "{", "{}", '{"words": 5}', '{"words": ["a"], "objects": [1], "colours": []}', "[" * 10_000]
)
def test_a_vocabulary_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"vocabulary\.json"):
        unknown_words(tmp_path, ["a cat"])


def test_long_words_are_not_compared_for_minutes(tmp_path):
    words = ["x" * 99 for _ in range(1000)]
    (tmp_path / "vocabulary.json").write_text(json.dumps({"words": words, "objects": ["cat"], "colours": ["red"]}))
    begun = time.perf_counter()
    hint = unknown_words(tmp_path, ["x" * 99_000 + "y", " ".join("ab"[i % 2] * (i % 60 + 3) for i in range(3000))])
    assert "it knows 1 objects (cat …) on red" in hint
    assert len(hint) < 800
    assert time.perf_counter() - begun < 3
    (tmp_path / "vocabulary.json").unlink()
    os.mkfifo(tmp_path / "vocabulary.json")
    assert unknown_words(tmp_path, ["a cat"]) is None
