"""Commands as processes of their own, without the seconds that each would take to import torch: forks of one process.

`python -m tests.warm` reads cases as JSON lines, runs each in a fork of the warmed process and answers {"status"}.
Before a command its `setup` runs, Python statements that may close or replace descriptors; then Python's streams are
made from them, as they are when a process starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Warm:
    """A process that has imported what takes time."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, "-m", "tests.warm"], cwd=ROOT, text=True, **pipes)

    def run(self, folder, *args, setup="", encoding="utf-8"):
        """(exit status, standard output, standard error) of a command in `folder`."""
        case = {"args": [str(arg) for arg in args], "setup": setup, "encoding": encoding, "folder": str(folder)}
        print(json.dumps(case), file=self._process.stdin, flush=True)
        status = json.loads(self._process.stdout.readline())["status"]
        streams = [Path(folder, name) for name in (".out", ".err")]
        texts = [stream.read_bytes().decode(errors="replace") for stream in streams]
        for stream in streams:
            stream.unlink()
        return status, *texts

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _child(case):
    os.chdir(case["folder"])
    for number, name in ((1, ".out"), (2, ".err")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    exec(case["setup"], {"os": os})
    sys.stdin, sys.stdout, sys.stderr = (_stream(number, case["encoding"]) for number in range(3))
    from zimage.__main__ import main

    sys.argv[1:] = case["args"]
    sys.exit(main())  # with all that Python does at its end


def _stream(number, encoding):
    try:
        os.fstat(number)
    except OSError:
        return None
    return open(number, "w" if number else "r", encoding=encoding, closefd=False)


def _serve():
    import torch

    torch.set_num_threads(1)
    import zimage.cli
    import zimage.pictures.files
    import zimage.pipeline  # noqa: F401

    lines = os.fdopen(os.dup(0), encoding="utf-8")
    for line in iter(lines.readline, ""):
        child = os.fork()
        if child == 0:
            _child(json.loads(line))
        print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)


if __name__ == "__main__":
    _serve()
