"""`gen --gpus N`: torchrun's engine starts N ranks of a command on this computer, and ends all when one of them fails.

Its agent watches the processes and keeps the store in which they meet. What it would tell of their end, in pages,
becomes one line: the words that the ranks left (`environment.py`) say which of them failed first.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from zimage import interrupts
from zimage.errors import ZImageError
from zimage.parallel.environment import KILLED, LAUNCHED, LOST, REASONS, word_of
from zimage.parallel.guard import GRACE

LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # what ranks on one computer talk over, whatever its network is


def launch(count: int, arguments: Sequence[str]) -> None:
    """Run `zimage ARGUMENTS` on `count` ranks until all have ended well.

    Raises ZImageError with the line and the exit status of what failed first, and Interrupt where this process is told
    to end; no rank is left then.
    """
    with _silence(), tempfile.TemporaryDirectory(prefix="zimage-ranks-") as folder, _environment(_of_ranks(count)):
        try:
            with _signals():
                elastic_launch(_config(count, folder), sys.executable)("-m", "zimage", *arguments)
        except ChildFailedError as error:
            raise failure(error.failures, count) from None


def _config(count: int, folder: str) -> LaunchConfig:
    """One machine, no second try, words in a folder; signals are handled here."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"{LAUNCHED}{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        signals_to_handle="",
        shutdown_timeout=int(GRACE) + 2,
    )


def failure(failures: Mapping[int, ProcessFailure], count: int) -> ZImageError:
    """What explains the others: an error, else a rank that was killed, the lowest rank of these."""
    told = {rank: _told(rank, count, one) for rank, one in failures.items()}
    rank = min(told, key=lambda rank: (REASONS.index(told[rank][1]), rank))
    error = ZImageError(told[rank][0])
    error.exit_status = max(failures[rank].exitcode, 1)  # of a rank that a signal ended it is negative
    return error


def _told(rank: int, count: int, end: ProcessFailure) -> tuple[str, str]:
    """A line on a rank's end, and the reason."""
    line, reason = word_of(end.error_file_data)
    if reason in REASONS:
        return (f"rank {rank}: {line}" if rank else line), reason
    how = f"was killed ({end.signal_name()})" if end.exitcode < 0 else f"ended with status {end.exitcode}"
    # What the agent ends itself explains nothing.
    ended = end.exitcode in (-signal.SIGTERM, *(128 + number for number in interrupts.SIGNALS))
    return f"rank {rank} of {count} {how}, and all others were ended", LOST if ended else KILLED


def _of_ranks(count: int) -> dict[str, str]:
    """Variables that each rank gets, unless the user has set them: its share of the cores, where to talk, no logs."""
    talk = {"GLOO_SOCKET_IFNAME": LOOPBACK[sys.platform]} if sys.platform in LOOPBACK else {}
    share = max(1, torch.get_num_threads() // count)
    return {"OMP_NUM_THREADS": str(share), "TORCH_CPP_LOG_LEVEL": "ERROR", **talk}


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Raise Interrupt for a signal, once the engine has ended all ranks; one that is ignored (`nohup`) stays so.

    To ranks each is a SIGTERM: in its first moments Python answers to Ctrl-C with pages.
    """
    told: list[int] = []

    def arrived(number: int, frame: FrameType | None) -> NoReturn:
        told.append(number)
        raise SignalException("told to end", signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, arrived)
    try:
        yield
    except SignalException:
        raise interrupts.Interrupt(told[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The engine logs what becomes one line; nothing else runs in this process meanwhile."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
