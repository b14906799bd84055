"""Rank processes for tests: started once, for many cases on any number of ranks up to theirs."""

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

LARGEST = 5  # ranks
DEADLINE = 120.0  # seconds that a case may take


class Pool:
    """LARGEST processes that wait for functions. They end with the pool, or with the process that started it."""

    def __init__(self):
        # Forked from a server that has imported all: five interpreters that import torch would take half a minute.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["zimage.pipeline", "zimage.parallel.divided", "torch.distributed"])
        self._folder = tempfile.TemporaryDirectory(prefix="zimage-ranks-")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(LARGEST):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, f"{self._folder.name}/meeting", theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(ranks, *arguments) on so many ranks; what each of them returned. Raises what the first one raised.

        The function is a top-level one of a module that the processes can import.
        """
        for pipe in self._pipes:  # all of them make the group
            pipe.send((size, function, arguments))
        answers = self._answers()
        for error in (value for is_error, value in answers if is_error):
            raise error
        return [value for _, value in answers[:size]]

    def _answers(self) -> list[tuple[bool, Any]]:
        deadline = time.monotonic() + DEADLINE
        found = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer; what the others said: {found}")
            found.append(pipe.recv())
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def serve(rank: int, meeting: str, pipe: Connection) -> None:
    """A rank: runs what comes through the pipe until that is closed."""
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), DEADLINE, f"file://{meeting}", rank, LARGEST):
        groups = {size: torch.distributed.new_group(list(range(size))) for size in range(1, LARGEST + 1)}
        with contextlib.suppress(EOFError):  # whoever asked has ended
            while True:
                size, function, arguments = pipe.recv()
                pipe.send(_answer(groups[size], rank, size, function, arguments))
    os._exit(0)


def _answer(group, rank: int, size: int, function: Callable[..., Any], arguments: tuple) -> tuple[bool, Any]:
    """(False, the result), or (True, the error with its traceback as text where it cannot be sent)."""
    if rank >= size:
        return False, None
    try:
        return False, function(Ranks(group), *arguments)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(traceback.format_exc())
        return True, error
