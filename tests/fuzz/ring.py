"""Runs mutated inputs in a worker process, and tells which of them were not handled.

python tests/fuzz/ring.py --seed 7 --cases 20000 [KIND …]      progress and findings; exit status 1 if there are any
"""

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

OTHERS = ("__init__", "corpus", "ring", "worker")
KINDS = tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in OTHERS))
CHUNK = 25  # cases from one random state: a case is found again by its kind, seed, chunk and number
SECONDS = 10.0
MEMORY = 200 << 20  # bytes above what the process held before the case


@dataclass(frozen=True)
class Case:
    """What makes a case again: its kind, and its number in a chunk of those that a seed gives."""

    kind: str
    seed: int
    chunk: int
    number: int

    def __str__(self) -> str:
        return f"{self.kind} --seed {self.seed}, chunk {self.chunk}, case {self.number}"


@dataclass(frozen=True)
class Finding:
    """A case that was not handled, and what happened."""

    case: Case
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.case} ({self.name}): {self.what}"


@dataclass
class Tally:
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0


class Worker:
    """A worker process, started when it is needed and again after a case that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this object

    def answers(self, order: dict[str, Any], first: float = 90.0) -> Iterator[dict[str, Any]]:
        """The worker's lines for an order. Raises TimeoutError where it hangs and EOFError where it died."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        seconds = first  # setting a kind up may take a while
        while not (line := self._line(seconds)).get("done"):
            yield line
            seconds = SECONDS + 5

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            os.close(self._pipe)
            self._process = None

    def _start(self) -> None:
        read, write = os.pipe()
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(write)]
        streams = {"stdin": subprocess.PIPE, "stdout": self._output, "stderr": self._output}
        self._process = subprocess.Popen(command, text=True, pass_fds=(write,), **streams)  # type: ignore[call-overload]
        os.close(write)
        self._pipe, self._read = read, b""

    def _line(self, seconds: float) -> dict[str, Any]:
        while b"\n" not in self._read:
            if not select.select([self._pipe], [], [], seconds)[0]:
                self.stop()
                raise TimeoutError
            data = os.read(self._pipe, 1 << 16)
            if not data:
                self.stop()
                raise EOFError
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)


def run(worker: Worker, kind: str, seed: int, cases: int, tally: Tally, chunk: int = CHUNK) -> None:
    """Try `cases` mutated inputs of a kind, `chunk` of them from one random state."""
    for number in range(-(-cases // chunk)):
        done, count = 0, min(chunk, cases - number * chunk)
        while done < count:
            done += _run(worker, Case(kind, seed, number, done), count, tally)


def _run(worker: Worker, case: Case, count: int, tally: Tally) -> int:
    """Try the cases of a chunk from `case` on, up to one that ends the worker; returns how many were tried."""
    first, name = case.number, "setting up"
    order = {"kind": case.kind, "seed": case.seed, "chunk": case.chunk, "first": first, "count": count}
    try:
        for line in worker.answers(order):
            name = line.get("begin", name)
            if "outcome" in line:
                _take(line, case, tally)
                case = replace(case, number=case.number + 1)
        return count - first  # those that the kind does not have count as tried
    except TimeoutError:
        outcome, what = "hung", f"it took more than {SECONDS:g} s"
    except EOFError:
        outcome, what = "died", "the process died"
    tally.outcomes[outcome] += 1
    tally.findings.append(Finding(case, name, what))
    return case.number - first + 1


def _take(line: dict[str, Any], case: Case, tally: Tally) -> None:
    found = lambda what: tally.findings.append(Finding(case, line["name"], what))  # noqa: E731
    tally.outcomes[line["outcome"]] += 1
    tally.slowest, tally.largest = max(tally.slowest, line["seconds"]), max(tally.largest, line["peak"])
    if line["fault"]:
        found(line["fault"])
    elif line["seconds"] > SECONDS:
        found(f"it took {line['seconds']:.1f} s")
    elif line["peak"] > MEMORY:
        found(f"it took {line['peak'] / 1e6:.0f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}. Default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="cases from one random state")
    options = parser.parse_args()
    worker, wrong, kinds = Worker(), 0, options.kinds or KINDS
    for kind in kinds:
        tally, begun = Tally(), time.monotonic()
        run(worker, kind, options.seed, options.cases // len(kinds), tally, options.chunk)
        print(
            f"{kind}: {dict(tally.outcomes)}, slowest {tally.slowest:.1f} s, largest {tally.largest / 1e6:.0f} MB, "
            f"{time.monotonic() - begun:.0f} s",
            flush=True,
        )
        for finding in tally.findings:
            print("  ", finding, flush=True)
        wrong += len(tally.findings)
    worker.stop()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
