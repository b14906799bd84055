"""The process that measures: it works through the rows and tells what it does, one JSON message a line.

Messages: ["about", {…}] once, ["section", name], ["begin", row's name], ["row", {…}], ["end"]; or ["no", reason] where
there is nothing to measure on. `watch.py` reads them, and ends the process where it hangs.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from typing import Any

import torch

from bench.card.models import free
from bench.card.rows import Bench, Row, Section, Task, attempt
from bench.card.sections import SECTIONS
from bench.machine import describe_gpu, describe_machine

Message = list[Any]
LEAST_SECONDS = 2.0  # of a section, for another row to begin


@dataclasses.dataclass(frozen=True)
class Work:
    """What to measure, as plain values: `only` are "SECTION" or "SECTION/ROW" with * for any text."""

    sizes: list[int]
    repeats: int
    small: bool
    folder: str
    only: list[str]
    skip: list[str]  # rows that need no measuring, as "SECTION/ROW"
    left: dict[str, float]  # seconds of each section


def messages(work: Work) -> Iterator[Message]:
    """Measure, and tell what comes of it."""
    if not torch.cuda.is_available():
        yield ["no", "card needs an NVIDIA GPU, and PyTorch sees none here"]
        return
    device = torch.device("cuda", torch.cuda.current_device())
    yield ["about", {"machine": describe_machine(), **describe_gpu(device)}]
    bench = Bench(device, tuple(work.sizes), work.repeats, work.small, work.folder)
    for section in SECTIONS:
        if any(only.split("/")[0] == section.name for only in work.only) or not work.only:
            yield ["section", section.name]
            yield from _section(section, bench, work)
            free(device)
    yield ["end"]


def _section(section: Section, bench: Bench, work: Work) -> Iterator[Message]:
    until = time.monotonic() + work.left[section.name]
    for task in wanted(section, bench, work.only, work.skip):
        row: Row = {"section": section.name, "name": task.name}
        if time.monotonic() > until - LEAST_SECONDS:
            yield ["row", {**row, "not_run": "the section's time was over"}]
            continue
        yield ["begin", task.name]
        started = time.monotonic()
        yield ["row", {**row, **attempt(task), "took_s": round(time.monotonic() - started, 2)}]
        if not _is_alive():
            yield ["lost", "the GPU has to be started anew"]
            return


def wanted(section: Section, bench: Bench, only: Collection[str], skip: Collection[str]) -> Iterator[Task]:
    """The rows of a section that are asked for."""
    for task in section.rows(bench):
        name = f"{section.name}/{task.name}"
        if name not in skip and (
            not only or any(name == o or fnmatch(name, o if "/" in o else f"{o}/*") for o in only)
        ):
            yield task


def _is_alive() -> bool:
    """Whether the GPU still answers this process: after an illegal access nothing does."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Tell the messages on what was standard output; whatever else is printed goes to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for message in messages(Work(**json.loads(sys.argv[1]))):
            out.write(json.dumps(message) + "\n")
            out.flush()
            if message[0] == "lost":
                os._exit(1)  # what ends a process in order would wait for the GPU


if __name__ == "__main__":
    main()
