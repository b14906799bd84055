"""What goes to a terminal: foreign text, and streams that are closed, full, gone or of another encoding."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from zimage.cli import main, terminal
from zimage.errors import OutputError

ROOT = Path(__file__).parent.parent
GEN = ["gen", "猫", "--seed", "1", "--steps", "1", "--width", "32", "--height", "32", "--device", "cpu"]
CLOSED = "os.close({0})"
FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), {0})"
GONE = "r, w = os.pipe(); os.dup2(w, {0}); os.close(r); os.close(w)"
STREAMS = {
    "closed output": CLOSED.format(1),
    "closed errors": CLOSED.format(2),
    "all closed": "; ".join(map(CLOSED.format, range(3))),
    "full output": FULL.format(1),
    "full errors": FULL.format(2),
    "both full": FULL.format(1) + ";" + FULL.format(2),
    "gone output": GONE.format(1),
    "gone errors": GONE.format(2),
    "latin-1": "",
    "ascii": "",
}


def stream(kind):
    return {"setup": STREAMS[kind], "encoding": kind if kind in ("latin-1", "ascii") else "utf-8"}


@pytest.fixture(scope="module")
def commands():
    process = warm.Warm()
    yield process
    process.close()


@pytest.mark.parametrize("kind", STREAMS)
def test_a_render_saves_all_pictures_whatever_becomes_of_its_streams(commands, tmp_path, kind):
    status, out, err = commands.run(tmp_path, *GEN, "-n", "2", **stream(kind))
    assert (status, sorted(os.listdir(tmp_path))) == (0, ["猫-1.png", "猫-2.png"]), err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    if kind == "full output":
        assert err.count("warning: standard output cannot be written: No space left on device") == 1
    if kind in ("latin-1", "ascii"):
        assert out.splitlines() == ["\\u732b-1.png", "\\u732b-2.png"]


def test_json_of_a_render_that_cannot_be_written_is_a_warning(commands, tmp_path):
    status, _, err = commands.run(tmp_path, *GEN, "--json", **stream("full output"))
    assert (status, os.listdir(tmp_path)) == (0, ["猫-1.png"])
    assert "No space left on device" in err
    status, out, _ = commands.run(tmp_path, *GEN, "-o", "👨\u200d👩.png", "--json", **stream("latin-1"))
    assert json.loads(out)["images"][0]["path"] == "👨\u200d👩.png"


LISTINGS = [["templates", "list"], ["config", "show"], ["gen", "--help"], ["info"], ["tokens", "猫", "--show"]]


@pytest.mark.parametrize("command", LISTINGS, ids=lambda command: command[0])
def test_a_listing_ends_quietly_when_its_reader_goes_and_fails_where_it_cannot_be_written(commands, tmp_path, command):
    for kind in ("gone output", "latin-1", *(["closed output", "gone errors"] if command[0] == "info" else [])):
        status, _, err = commands.run(tmp_path, *command, **stream(kind))
        assert status == 0, (kind, err)
        assert "error" not in err
        assert "Traceback" not in err
    status, _, err = commands.run(tmp_path, *command, **stream("full output"))
    assert status == 1
    assert err.splitlines()[-1] == "error: standard output cannot be written: No space left on device"
    assert "Traceback" not in err


def test_standard_input_that_is_closed_or_not_text(commands, tmp_path):
    rest = [*GEN[2:], "-q"]
    status, _, err = commands.run(tmp_path, "gen", "-", *rest, setup=CLOSED.format(0))
    assert (status, err) == (2, "error: standard input is closed; pass the prompt as an argument\n")
    feed = "r, w = os.pipe(); os.write(w, b'a \\xff cat'); os.close(w); os.dup2(r, 0)"
    status, _, err = commands.run(tmp_path, "gen", "-", *rest, setup=feed)
    assert status == 2
    assert "standard input is not UTF-8" in err
    feed = "r, w = os.pipe(); os.write(w, b' a cat\\n'); os.close(w); os.dup2(r, 0)"
    assert commands.run(tmp_path, "gen", "-", *rest, setup=feed)[:2] == (0, "a-cat-1.png\n")


def test_a_file_opened_later_does_not_get_the_number_of_a_closed_stream(commands, tmp_path):
    """Or whatever a library prints would stand in it."""
    setup = STREAMS["all closed"] + "; import zimage.cli.terminal as t; t.open_streams(); f = open('x', 'w')"
    setup += "; open('number', 'w').write(str(f.fileno()))"
    commands.run(tmp_path, "--version", setup=setup)
    assert int((tmp_path / "number").read_text()) > 2


def test_a_real_pipe_to_a_reader_of_one_line():
    command = f"{sys.executable} -m zimage templates list | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0"
    assert "rror" not in done.stderr


# ---------------------------------------------------------------------- foreign text


def test_foreign_text_cannot_steer_a_terminal(capsys):
    terminal.out("\x1b]0;owned\x07 猫\u202e\nnext\x9b2J 　👨‍👩")
    assert capsys.readouterr().out == "\\x1b]0;owned\\x07 猫\\u202e\nnext\\x9b2J 　👨‍👩\n"
    terminal.note("\x1b[2J\ud800")
    assert capsys.readouterr().err == "\\x1b[2J\\ud800\n"
    terminal.out_json({"a": "猫 \x9b \U000e0001 \ud800"})
    said = capsys.readouterr().out
    assert said.isascii()
    assert json.loads(said) == {"a": "猫 \x9b \U000e0001 \ud800"}
    terminal.out_json({"a": "猫"})
    assert capsys.readouterr().out == '{"a": "猫"}\n'


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_message_clears_the_progress_line_first(monkeypatch):
    """Also one of the library's log, a result, an error."""
    import logging

    from zimage.cli.progress import Progress

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["config", "path", "--config", os.devnull]) == 0  # the log's handler is set
    progress = Progress(quiet=False)
    for say in (
        lambda: terminal.note("x"),
        lambda: terminal.out("x"),
        lambda: progress.note("x"),
        lambda: logging.getLogger("zimage").warning("x"),
        lambda: main(["gen", "--width", "0"]),
    ):
        screen.truncate(0)
        screen.seek(0)
        progress.show("1/4 ███")
        say()
        assert screen.getvalue().startswith("\r\033[K1/4 ███\r\033[K"), screen.getvalue()
        assert screen.getvalue().endswith("\n")
    screen.truncate(0)
    screen.seek(0)
    progress.note("no line stands there")
    assert screen.getvalue() == "no line stands there\n"


def test_nothing_but_the_terminal_prints():
    """And nothing else knows the streams, but to ask whether they are terminals."""
    for file in sorted((ROOT / "zimage" / "cli").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        allowed = {
            id(argument)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "terminal.is_terminal"
            for argument in call.args
        }
        used = {
            ast.unparse(node)
            for node in ast.walk(tree)
            if (isinstance(node, ast.Attribute | ast.Name)) and id(node) not in allowed
        }
        forbidden = {
            "print",
            "input",
            "click.echo",
            "click.secho",
            "click.style",
            "sys.stdout",
            "sys.stderr",
        }
        if file.name != "terminal.py":
            assert not used & forbidden, file.name


def test_a_stream_that_is_full_says_so(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match="standard output cannot be written: No space left on device"):
            terminal.out("x")
        terminal.out("x")  # what comes after is not waited for
