"""Mutated values of every option and argument of every command, made from the commands' own declarations."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from zimage.cli import cli, main
from zimage.settings.merging import FIELDS

Call = Callable[[], object]
WORDS = ("", " ", "x", "-", "--", "{", "%s", "猫", "\x1b]0;x\x07", "a\nb", "\u202e", "\ud800", "\udcff", "x" * 2000)
NUMBERS = ("-1", "0", "1e3", "0x10", "½", "nan", "inf", "-inf", "1e400", "1_0", "٣", str(2**31), str(2**63), "9" * 5000)
PATHS = ("fifo", "fifo.png", "fifo.safetensors", "folder", "folder.png", "empty", "empty.png", "empty.safetensors")
PATHS += ("null.png", "loop", "/dev/zero", "/dev/full", "~nosuch/x", "../../x", "x\0y", "y" * 300, "y" * 5000, ".", "/")
SIZES = (
    "832x1216",
    "0x0",
    "16x16384",
    "1e3x16",
    "16x",
    "x",
    "3:2",
    "1:0",
    "0:0",
    "nan:1",
    "-1:-1",
    "1e308:1e-308",
    "16:1:1",
)
FIFOS = ("fifo", "fifo.png", "fifo.safetensors")
# What waits for a pipe that somebody else writes to, as it should: the shell makes such pipes of <(…).
READS_PIPES = ("prompt_file", "config", "named", "toml")
OUT = ("target", "folder")  # what is written as root may replace a device
QUICK = ["--steps", "1", "--width", "32", "--height", "32", "--device", "cpu", "--dtype", "fp32", "-q", "-o", "out"]
# What a command needs beside the value at hand; `batch` ends before Ray is started, `weights fetch` with a usage error
# before the network, `serve` with settings that contradict each other before it listens.
REST = {
    "gen": ["a cat", *QUICK],
    "batch": ["nowhere.jsonl", "-o", "out"],
    "sweep": ["a cat", *QUICK, "--vary", "steps=1"],
    "compare": ["nowhere"],
    "view": ["nowhere"],
    "serve": ["--hidden-layer", "-2", "--layer-weights=-2:1"],
    "rewrite": ["a cat", "--max-tokens", "1", "--device", "cpu"],
    "encode": ["a cat", "-o", "out.safetensors", "--device", "cpu"],
    "see": ["null.png", "--device", "cpu"],
    "tokens": ["a cat"],
    "metrics": ["folder"],
    "info": [],
    "templates list": [],
    "templates show": ["photo-overcast"],
    "templates search": ["film"],
    "config show": [],
    "config profiles": [],
    "config path": [],
    "config example": [],
    "weights verify": ["empty.safetensors"],
    "weights convert": ["empty.safetensors", "new.safetensors"],
    "weights fetch": ["turbo", "--no-such-option"],
}


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command by its names, groups aside."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def cases(chance: random.Random, folder: Path) -> Iterator[tuple[str, Call]]:
    """Command lines with one mutated value, without an end: what was mutated, and a call that runs it."""
    here = _things(folder / "one" / "two" / "three")
    known = [(names, command) for names, command in commands() if command.params]
    while True:
        names, command = chance.choice(known)
        parameter = chance.choice(command.params)
        value = chance.choice(_values(parameter))
        arguments = [*names, *_with(parameter, value, REST[" ".join(names)])]
        yield f"{' '.join(names)}: {parameter.name} = {value!r:.60}", _running(here, arguments)


def _values(parameter: click.Parameter) -> tuple[str, ...]:
    name = parameter.name or ""
    field = FIELDS.get(name)
    is_path = isinstance(parameter.type, click.Path) or (field is not None and field.metadata["path"])
    if is_path or name in (
        "image",
        "mask",
        "embeddings",
        "reference",
        "control",
        "picture",
        "config",
        "named",
        "output",
        "model",
    ):
        paths = [path for path in PATHS if name not in OUT or not path.startswith("/dev")]
        return (*WORDS, *(path for path in paths if name not in READS_PIPES or path not in FIFOS))
    return (*WORDS, *SIZES) if name in ("size", "aspect") else (*WORDS, *NUMBERS)


def _with(parameter: click.Parameter, value: str, rest: list[str]) -> list[str]:
    """The value among what the command needs: behind its option, or in the place of the first arguments."""
    if isinstance(parameter, click.Option):
        flag = parameter.opts[-1]
        return [
            *rest,
            f"{flag}={value}" if flag.startswith("--") else flag,
            *([] if flag.startswith("--") else [value]),
        ]
    options = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    place = 1 if parameter.name == "target" else 0
    return [*rest[options:], "--", *rest[:place], value, *rest[place + 1 : options]]


def _running(here: Path, arguments: list[str]) -> Call:
    def call() -> int:
        with contextlib.chdir(here):
            status = main(arguments)
        assert status in (0, 1, 2)
        assert not list(here.glob(".*-*")), "a temporary file is left"
        return status

    return call


def _things(here: Path) -> Path:
    """A folder with everything that a path may lead to."""
    here.mkdir(parents=True, exist_ok=True)
    for name in ("folder", "folder.png", "out"):
        (here / name).mkdir(exist_ok=True)
    for name in FIFOS:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(here / name)
    for name in ("empty", "empty.png", "empty.safetensors"):
        (here / name).touch()
    for name, target in (("null.png", "/dev/null"), ("loop", "loop")):
        with contextlib.suppress(FileExistsError):
            (here / name).symlink_to(target)
    return here
