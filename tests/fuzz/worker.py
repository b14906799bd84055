"""The process in which mutated inputs are tried: it may hang or be killed without taking the tests with it.

Reads orders, one JSON object per line, from standard input: {"kind", "seed", "chunk", "first", "count"}. Writes
a line before each case and one after it to the file descriptor that it is given.
"""

import importlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import conftest  # noqa: E402 - keeps the settings of whoever runs this away
import torch  # noqa: E402

import zimage.cli  # noqa: E402
from zimage.errors import ZImageError  # noqa: E402
from zimage.pipeline import ZImage  # noqa: E402, F401 - what every case needs is part of the memory before the first

STATUSES = (0, 1, 2)
NETTED: list[BaseException] = []  # what the command line's last net caught


def main() -> None:
    torch.set_num_threads(1)
    conftest.pytest_configure(None)
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    if hasattr(zimage.cli, "unexpected"):
        zimage.cli.unexpected = _watched(zimage.cli.unexpected)
    for order in map(json.loads, sys.stdin):
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        os.chdir(folder)
        try:
            for line in run(folder=folder, **order):
                print(json.dumps(line), file=answers, flush=True)
        finally:
            os.chdir("/")
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps({"done": True}), file=answers, flush=True)


def run(kind: str, seed: int, chunk: int, first: int, count: int, folder: Path):
    chance = random.Random(f"{kind} {seed} {chunk}")
    cases = importlib.import_module(f"fuzz.{kind}").cases(chance, folder)
    for name, call in itertools.islice(cases, first, count):
        yield {"begin": name}
        yield {"name": name, **_tried(call)}


def _tried(call) -> dict:
    NETTED.clear()
    before = peak(reset=True)
    begun = time.monotonic()
    try:
        status = call()
        fault = f"status {status}" if type(status) is int and status not in STATUSES else ""
        outcome = "refused" if type(status) is int and status else "accepted"
    except ZImageError as error:
        outcome, fault = "refused", _misshapen(str(error))
    except SystemExit as error:
        outcome, fault = "refused", f"SystemExit {error}"
    except BaseException:
        outcome, fault = "fault", traceback.format_exc()
    if NETTED:
        outcome, fault = "netted", "".join(traceback.format_exception(NETTED[0]))
    return {"outcome": outcome, "fault": fault[-3000:], "seconds": time.monotonic() - begun, "peak": peak() - before}


def _misshapen(text: str) -> str:
    """What is wrong with the text of an error."""
    if not 10 < len(text) <= 2000:
        return f"an error of {len(text)} characters: {text[:200]}"
    return "" if text.isprintable() or "\u200d" in text or "\u200c" in text else f"not printable: {text!r}"


def peak(reset: bool = False) -> int:
    """The most memory that this process has held in bytes, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _watched(unexpected):
    def watched(error: BaseException, *rest, **more):
        NETTED.append(error)
        return unexpected(error, *rest, **more)

    return watched


if __name__ == "__main__":
    main()
