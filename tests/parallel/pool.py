"""Rank processes for tests: started once for each number of ranks, for many cases."""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from zimage.parallel.ranks import Ranks, joined

DEADLINE = 120.0  # seconds that a case may take


class Pools:
    """A group of processes for each number of ranks, started when it is first asked for."""

    def __init__(self):
        self._groups: dict[int, Group] = {}

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(ranks, *arguments) on so many ranks; what each of them returned. Raises what the first one raised.

        The function is a top-level one of a module that the processes can import.
        """
        if size not in self._groups:
            self._groups[size] = Group(size)
        try:
            answers = self._groups[size].run(function, arguments)
        except TimeoutError:
            self._groups.pop(size).close()
            raise
        for error in (value for is_error, value in answers if is_error):
            raise error
        return [value for _, value in answers]

    def close(self) -> None:
        while self._groups:
            self._groups.popitem()[1].close()


class Group:
    """Processes that wait for functions. They end with the group, or with the process that started it."""

    def __init__(self, size: int):
        # Forked from a server that has imported all: interpreters that import torch each would take half a minute.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["zimage.pipeline", "zimage.parallel.divided", "torch.distributed"])
        self._folder = tempfile.TemporaryDirectory(prefix="zimage-ranks-")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            meeting = f"file://{self._folder.name}/meeting"
            process = context.Process(target=serve, args=(rank, size, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], arguments: tuple) -> list[tuple[bool, Any]]:
        """Each rank's answer: whether it is an error, and that or the result. Raises TimeoutError."""
        deadline, found = time.monotonic() + DEADLINE, []
        for pipe in self._pipes:
            pipe.send((function, arguments))
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                raise TimeoutError(f"rank {rank} did not answer; those before it said {found!r:.2000}")
            found.append(pipe.recv())
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def serve(rank: int, size: int, meeting: str, pipe: Connection) -> None:
    """A rank: runs what comes through the pipe until that is closed."""
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), DEADLINE, meeting, rank, size), contextlib.suppress(EOFError):
        while True:
            pipe.send(_answer(*pipe.recv()))
    os._exit(0)


def _answer(function: Callable[..., Any], arguments: tuple) -> tuple[bool, Any]:
    """(False, the result), or (True, the error), as its traceback where it cannot be sent."""
    try:
        return False, function(Ranks(), *arguments)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return True, RuntimeError(traceback.format_exc())
        return True, error
