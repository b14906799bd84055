"""`gen -o -`: one PNG on standard output, and nothing else there."""

import io
import json
import subprocess
import sys

import pytest
from PIL import Image

from tests import warm
from zimage.cli import main
from zimage.cli.target import Piped
from zimage.errors import RequestError

GONE = "r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)"
FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"


@pytest.fixture(scope="module")
def commands():
    process = warm.Warm()
    yield process
    process.close()


@pytest.fixture
def usual(tiny_folder):
    return [
        "gen",
        "a cat",
        "--steps",
        "1",
        "--size",
        "32x48",
        "--seed",
        "3",
        "--model",
        str(tiny_folder),
        "--dtype",
        "fp32",
    ]


def test_it_is_the_file_that_would_be_saved(usual, tmp_path, capfdbinary):
    assert main([*usual, "-o", str(tmp_path / "x.png")]) == 0
    capfdbinary.readouterr()
    assert main([*usual, "-o", "-"]) == 0
    said = capfdbinary.readouterr()
    assert said.out == (tmp_path / "x.png").read_bytes()
    with Image.open(io.BytesIO(said.out)) as image:
        assert json.loads(image.info["zimage"])["request"]["seed"] == 3
    assert b"seed 3\n1 image in " in said.err  # what is told goes to standard error
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_quiet_is_quiet(usual, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*usual, "-o", "-", "-q"]) == 0
    assert capfdbinary.readouterr().err == b""
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_may_come_and_a_picture_go_through_pipes(usual, tmp_path):
    command = [sys.executable, "-m", "zimage", "gen", "-", *usual[2:], "-o", "-", "-q"]
    done = subprocess.run(command, input=b"a cat", capture_output=True, cwd=tmp_path, check=True)
    assert Image.open(io.BytesIO(done.stdout)).size == (32, 48)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["-n", "2"], "takes one picture, and 2 are asked for"),
        (["--each", "a dog"], "takes one picture, and 2 are asked for"),
        (["--json"], "leave out --json"),
        (["--save-state", "state"], "a state goes on with the pictures that are saved"),
        (["--resume", "state"], "a state goes on with the pictures that are saved"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(usual, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    assert main([*usual, "-o", "-", *more]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_a_closed_stream_and_one_of_text_are_refused(monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    for stream, said in ((Terminal(io.BytesIO()), "is a terminal"), (None, "is closed"), (io.StringIO(), "text only")):
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(RequestError, match=said):
            Piped(1, False, False)


def test_a_reader_that_has_gone_is_a_quiet_end(commands, usual, tmp_path):
    assert commands.run(tmp_path, *usual, "-o", "-", "-q", setup=GONE) == (1, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_kept(commands, usual, tmp_path):
    status, _, err = commands.run(tmp_path, *usual, "-o", "-", "-q", setup=FULL)
    assert status == 1
    assert err == "error: standard output cannot be written: No space left on device; the picture is in a-cat-3.png\n"
    with Image.open(tmp_path / "a-cat-3.png") as image:
        assert image.size == (32, 48)


def test_a_file_of_that_name_is_not_lost(usual, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*usual, "-o", "./-.png"]) == 0
    assert (tmp_path / "-.png").is_file()
