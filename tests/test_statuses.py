"""Exit statuses of every command: 2 for usage, 1 for the rest; and the last net, which no known kind reaches."""

import itertools
import os
import random
import sys

import pytest
from fuzz import commands as fuzz

import zimage.cli
from zimage.cli import main

USAGE = {
    "gen": ["a", "--steps", "0"],
    "batch": ["rows.jsonl", "-o", "out", "--steps", "0"],
    "sweep": ["a", "-o", "out", "--vary", "stepz=1"],
    "compare": ["nowhere"],
    "view": ["nowhere", "--port", "65536"],
    "serve": ["--port", "65536"],
    "rewrite": ["a", "--max-tokens", "0"],
    "encode": ["a"],
    "see": ["x.png", "--vision-layer", "0"],
    "tokens": ["a", "--hidden-layer", "0"],
    "metrics": ["nowhere"],
    "info": ["--batch-size", "0"],
    "templates list": ["--category", "nothing-like-it"],
    "templates show": ["nothing-like-it"],
    "templates search": [],
    "config show": ["--steps", "0"],
    "config profiles": ["--config", "nowhere.toml"],
    "config path": ["--config"],
    "config example": ["x"],
    "weights verify": [],
    "weights convert": ["x", "y.safetensors", "--shard-size", "x"],
    "weights fetch": [],
}
MISSING = {
    "gen": ["a", "--model", "nowhere"],
    "rewrite": ["a", "--model", "nowhere"],
    "encode": ["a", "-o", "x.safetensors", "--model", "nowhere"],
    "tokens": ["a", "--model", "nowhere"],
    "info": ["nowhere"],
    "weights verify": ["nowhere"],
    "weights convert": ["nowhere", "y.safetensors"],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_command_is_here():
    assert {" ".join(names) for names, _ in fuzz.commands()} == USAGE.keys() == fuzz.REST.keys()


@pytest.mark.parametrize("command", USAGE)
def test_wrong_usage_is_2(command, capsys):
    assert main([*command.split(), *USAGE[command]]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert main([*command.split(), "--no-such-option"]) == 2


@pytest.mark.parametrize("command", MISSING)
def test_a_missing_file_is_1(command, capsys):
    assert main([*command.split(), *MISSING[command]]) == 1
    said = capsys.readouterr()
    assert "nowhere" in said.out + said.err
    assert "Traceback" not in said.err


def broken(kind):
    def fail(*_, **__):
        raise kind("what\nhappened\x1b[2J")

    return fail


@pytest.mark.parametrize("kind", [TypeError, RecursionError, AssertionError, OSError, KeyError])
def test_the_net_is_one_line_and_says_how_to_get_the_traceback(kind, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["zimage.cli.config"], "resolve_options", broken(kind))
    assert main(["config", "show"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: internal fault ({kind.__name__}: ")
    assert err.endswith("run it again with ZIMAGE_DEBUG=1 for the traceback and please report it\n")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    monkeypatch.setenv("ZIMAGE_DEBUG", "1")
    assert main(["config", "show"]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "in fail" in err
    assert "\x1b" not in err


def test_the_most_verbose_shows_the_traceback_too(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["zimage.cli.gen"], "resolve_options", broken(TypeError))
    assert main(["gen", "a", "-vv"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_running_out_of_memory_is_no_fault_of_the_program(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["zimage.cli.config"], "resolve_options", broken(MemoryError))
    assert main(["config", "show"]) == 1
    assert capsys.readouterr().err == "error: out of memory; choose a smaller size\n"


def test_an_error_of_the_system_names_its_file(capsys, monkeypatch):
    def fail(*_):
        os.stat("nowhere/x")

    monkeypatch.setattr(sys.modules["zimage.cli.config"], "resolve_options", fail)
    assert main(["config", "show"]) == 1
    assert capsys.readouterr().err == "error: nowhere/x: No such file or directory\n"


def test_no_mutated_value_of_any_option_reaches_the_net(tmp_path, capsys, monkeypatch):
    reached = []
    monkeypatch.setattr(zimage.cli, "unexpected", lambda error, verbose: reached.append(error) or 1)
    count = int(os.environ.get("ZIMAGE_FUZZ", "60"))
    for name, call in itertools.islice(fuzz.cases(random.Random(2), tmp_path), count):
        call()
        assert not reached, (name, reached)
        said = capsys.readouterr().err
        assert said.count("error: ") <= 1, name
        assert all(len(line) <= 2010 for line in said.splitlines()), name
