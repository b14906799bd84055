"""The processes of a batch, found by what Linux tells: whose child each is, and what Ray calls it."""

import os
import signal
from pathlib import Path

WORKER = "ray::MapWorker(Map(Worker)"


def below(pid: int) -> dict[int, str]:
    """All processes that a process has started, directly or not, by their command lines."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except (OSError, IndexError):  # it has just ended
            continue
    found, level = {}, {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found |= {child: names.get(child, "") for child in level}
    return found


def workers(pid: int) -> list[int]:
    """Those that draw."""
    return sorted(child for child, name in below(pid).items() if name.startswith(WORKER))


def kill(pid: int) -> None:
    """End a process as the kernel does it when memory is short."""
    os.kill(pid, signal.SIGKILL)
