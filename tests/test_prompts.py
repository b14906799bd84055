"""Prompts of any content, length and origin: drawn, or refused at once in one line."""

import io
import logging
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from zimage.cli import main
from zimage.cli.prompts import file_prompts
from zimage.errors import RequestError
from zimage.settings.captions import LONGEST_TEXT, MAX_TEXT_TOKENS
from zimage.settings.declared import Request
from zimage.settings.loading import LoadSettings

SIZE = {"width": 64, "height": 64, "steps": 1, "seed": 1}
GEN = ["--width", "64", "--height", "64", "--steps", "1", "--seed", "1"]
BAD = {
    "\ud800 a cat": "prompt is not valid text; it must be valid UTF-8",
    "a cat \udc80": "prompt is not valid text",
    "a\0c\0a\0t": "prompt contains a null character at 1; is it text in UTF-16?",
    "x" * (LONGEST_TEXT + 1): f"prompt has 100,001 characters; it may have at most {LONGEST_TEXT:,}",
    "猫" * 10**6: "prompt has 1,000,000 characters",
}


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(command, *arguments):
        options = ["--dtype", "fp32", "--device", "cpu", "--model", str(tiny_folder)]
        status = main([command, *options, *(GEN if command == "gen" else []), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.parametrize("prompt", BAD, ids=lambda text: ascii(text[:8]))
def test_what_is_no_prompt_is_refused_by_the_library(pipe, prompt):
    calls = [
        lambda: pipe.tokenize(prompt),
        lambda: pipe.count_tokens(prompt),
        lambda: pipe.encode(prompt),
        lambda: pipe.encode(["a cat", prompt]),
        lambda: pipe.rewrite(prompt),
        lambda: pipe.generate(prompt, **SIZE),
        lambda: pipe.generate(["a cat", prompt], **SIZE),
        lambda: pipe.prepare(Request(prompt=prompt)),
    ]
    for call in calls:
        begun = time.perf_counter()
        with pytest.raises(RequestError) as error:
            call()
        assert str(error.value).startswith(BAD[prompt]), str(error.value)[:200]
        assert error.value.fields == ("prompt",)
        assert time.perf_counter() - begun < 1


@pytest.mark.parametrize("name", ["system_prompt", "thinking_content", "assistant_content"])
@pytest.mark.parametrize("prompt", BAD, ids=lambda text: ascii(text[:8]))
def test_so_are_chat_parts(pipe, name, prompt):
    with pytest.raises(RequestError) as error:
        pipe.encode("a cat", **{name: prompt})
    assert str(error.value).startswith(BAD[prompt].replace("prompt", name))


@pytest.mark.parametrize("command", ["gen", "tokens", "encode", "rewrite"])
@pytest.mark.parametrize("prompt", BAD, ids=lambda text: ascii(text[:8]))
def test_and_by_every_command(run, command, prompt):
    status, out, err = run(command, prompt, *(["-o", "x.safetensors"] if command == "encode" else []))
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert f"error: {BAD[prompt]}" in last
    assert not os.listdir()


def test_control_characters_are_drawn(pipe, run):
    """But for zero they are text like any other: the tokenizer knows every byte."""
    odd = "a\tcat\r\n\x1b[31m\x07\x85\u202e\u2028\ufeff\ufffe\U0010ffff"
    assert pipe.model.tokenizer.decode(pipe.tokenize(odd)).count("\x1b[31m\x07") == 1
    assert run("gen", odd, "-o", "odd.png")[0] == 0
    assert run("gen", "--from", "odd.png", "-o", "again.png")[0] == 0
    assert Path("odd.png").read_bytes() == Path("again.png").read_bytes()


def test_a_text_of_too_many_tokens(pipe, run, tmp_path):
    """Within the longest prompt, and beyond what the text encoder was trained for."""
    many = "cat " * 20_000  # bytes are tokens here
    for call in (pipe.tokenize, pipe.encode, pipe.rewrite, lambda p: pipe.generate(p, **SIZE)):
        with pytest.raises(RequestError, match=f"it may have at most {MAX_TEXT_TOKENS:,}"):
            call(many)
    body = "---\nname: long\ndescription: x\ncategory: test\n---\n" + "cat " * 15_000
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "long.md").write_text(body)
    status, _, err = run("gen", "a cat", "--templates", "own", "--template", "long", "--long-prompt", "pool")
    assert status == 2
    assert "tokens with its template and chat parts" in err.splitlines()[-1]


def test_a_long_prompt_is_warned_of_before_it_is_encoded(pipe, caplog):
    logging.getLogger("zimage").propagate = True
    request = Request.from_mapping({"prompt": "cat " * 500, **SIZE})
    with caplog.at_level("WARNING", logger="zimage"):
        pipe.prepare(request)
    assert "tokens; the model was trained for at most 224" in caplog.text


# ------------------------------------------------------------------ files and standard input


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a cat\nna\xefve", "is not UTF-8: byte 0xef at 8"),
        ("a cat".encode("utf-16"), "is not UTF-8: byte 0xff at 0"),
        ("a cat".encode("utf-16-le"), "prompt contains a null character at 1"),
        (b"\xed\xb2\x80", "is not UTF-8: byte 0xed at 0"),
        (b"x" * (16 << 20) + b"y", "has more than 16,777,216 bytes"),
        (b"x" * 200_000, "prompt has 200,000 characters"),
    ],
)
def test_text_in_other_encodings_is_named_with_its_place(run, monkeypatch, tmp_path, content, words):
    (tmp_path / "prompts.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
    for arguments in (["--file", "prompts.txt"], ["-"]):
        status, out, err = run("gen", *arguments)
        assert (status, out) == (2, "")
        assert words in err.splitlines()[-1]
        assert len(err.splitlines()) == 1


def test_standard_input_is_utf_8_whatever_the_terminal_is_set_to(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffeine Möwe\n".encode()), encoding="latin-1"))
    assert run("gen", "-", "-q")[1] == "eine-möwe-1.png\n"


@pytest.mark.parametrize("closed", [None, io.StringIO()])
def test_closed_standard_input(run, monkeypatch, closed):
    if closed is not None:
        closed.close()
    monkeypatch.setattr(sys, "stdin", closed)
    assert run("gen", "-")[::2] == (2, "error: standard input is closed; pass the prompt as an argument\n")


def test_files_that_are_none(run, tmp_path):
    assert "No such file" in run("gen", "--file", "absent.txt")[2]
    assert "Is a directory" in run("gen", "--file", ".")[2]
    assert "has more than" in run("gen", "--file", "/dev/zero")[2]
    assert "cannot be read" in run("gen", "--file", "x" * 5000)[2]


def test_a_pipe_that_the_user_names_is_read_as_it_comes(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("a cat\na dog\n"))
    writer.start()
    status, out, _ = run("gen", "--file", "pipe", "-q")
    writer.join()
    assert (status, out) == (0, "a-cat-1.png\na-dog-1.png\n")


@pytest.mark.parametrize("name", ["model", "attention", "cache_folder", "device", "text_encoder"])
def test_zero_characters_in_any_setting(name):
    with pytest.raises(RequestError, match=f"{name} .*null character|{name} 'a.*is not known"):
        LoadSettings.from_mapping({name: "a\0b"})


def test_a_line_of_a_file_ends_where_editors_end_it(tmp_path):
    """Pages and PDFs bring other separators along; they are blanks of one prompt."""
    (tmp_path / "prompts.txt").write_bytes("a\u2028cat\x0cin\x85rain\r\na dog\ra fox\n".encode())
    assert file_prompts(tmp_path / "prompts.txt") == ["a\u2028cat\x0cin\x85rain", "a dog", "a fox"]
