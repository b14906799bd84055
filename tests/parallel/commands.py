"""Commands on several ranks, as processes that a test may kill; none outlives its test."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = "render.state"
LONG = ("a red cat", "--seed", "1", "--steps", "1000", "--images", "9", "--width", "64", "--height", "64")
LONG = (*LONG, "--save-state", STATE)


class Command:
    """`zimage ARGUMENTS`, or `torchrun … -m zimage ARGUMENTS`, in a folder."""

    def __init__(self, folder: Path, *arguments: object, torchrun: int = 0):
        program = [sys.executable, "-m", "zimage"]
        if torchrun:
            started = ["--standalone", "--nproc-per-node", str(torchrun)]
            program = [sys.executable, "-m", "torch.distributed.run", *started, "-m", "zimage"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            self.process = subprocess.Popen(
                [*program, *map(str, arguments)],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.folder, self.seen = folder, dict[int, int]()

    def ranks(self, count: int) -> list[int]:
        """The process ids of its ranks, once they are started."""
        while len(self.seen) < count:
            assert self.process.poll() is None, self.err
            self.seen = {rank: pid for pid in _children(self.process.pid) if (rank := _rank(pid)) is not None}
            time.sleep(0.01)
        return [self.seen[rank] for rank in range(count)]

    def until_it_draws(self) -> None:
        """Wait until a step is in the state that it keeps, which is written before the first one, too."""
        state, sizes = self.folder / STATE, set[int]()
        while len(sizes) < 2:
            assert self.process.poll() is None, self.err
            sizes |= {state.stat().st_size} if state.exists() else set()
            time.sleep(0.01)

    def end(self, seconds: float = 30.0) -> int:
        """The exit status, and no process is left; it has so long to end."""
        status = self.process.wait(seconds)
        deadline = time.monotonic() + 5
        while any(map(_runs, self.seen.values())):
            assert time.monotonic() < deadline, "a rank is left"
            time.sleep(0.01)
        return status

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def errors(self) -> list[str]:
        """The lines of standard error that are not notes."""
        return [line for line in self.err.splitlines() if not line.startswith(("model:", "hint:", "seed ", "64×64"))]

    def kill(self) -> None:
        for pid in (self.process.pid, *self.seen.values(), *_children(self.process.pid)):
            if _runs(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _children(parent: int) -> list[int]:
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return []
    return list(map(int, text.split()))


def _rank(pid: int) -> int | None:
    """The rank that a process is, by its environment."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = [one for one in variables if one.startswith(b"RANK=")]
    return int(found[0].removeprefix(b"RANK=")) if found else None


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
