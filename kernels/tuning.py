"""Which configuration of a kernel is quickest on a GPU: timed once per class of sizes, then remembered on disk.

Only kernels whose results do not depend on their configuration are tuned, so a choice changes no bit. The file lies
beside the kernels that Triton has compiled; one that cannot be read, written or understood costs another timing.
"""

import contextlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zimage.kernels.backend import KernelError

log = logging.getLogger("zimage")

RUNS, ROUNDS = 10, 3  # calls between two events; the best round counts
_lock = threading.Lock()


class Configuration(NamedTuple):
    """How a product is cut up."""

    rows: int  # of the results of one program
    columns: int
    depth: int  # columns of the factors that are multiplied at a time
    warps: int
    stages: int  # depths that are on their way


def quickest(
    name: str, x: Tensor, outputs: int, configurations: Sequence[Configuration], run: Callable[[Configuration], object]
) -> Configuration:
    """The quickest configuration for x (M, K) and a number of outputs; the first where that cannot be told.

    Sizes of one class have the same K, outputs, and largest power of two in M. Compiled code serves every M, so it
    takes what is known of the largest one.
    """
    if torch.compiler.is_compiling():
        return configurations[known(name, x.shape[1], outputs, x.device, configurations)]
    if x.device.type != "cuda":
        return configurations[0]
    key = _key(name, x.shape[1], outputs, x.device, 1 << (len(x).bit_length() - 1))
    found = _table().get(key)
    if found not in configurations:
        found = _timed(key, x.device, configurations, run) if may_time() else None
    return found or configurations[0]


def may_time() -> bool:
    """Whether kernels may be run for their time alone: not while a CUDA graph is recorded."""
    return not torch.cuda.is_current_stream_capturing()


def known(name: str, columns: int, outputs: int, device: torch.device, configurations: Sequence[Configuration]) -> int:
    """The place of the configuration that was chosen for the most rows; 0 where none was."""
    keys = [_key(name, columns, outputs, device, 1 << power) for power in range(32)]
    found = [_table()[key] for key in keys if _table().get(key) in configurations]
    return configurations.index(found[-1]) if found else 0


# As torch.compiler.assume_constant_result does, which would load the compiler (seconds, 150 MB) into every process.
vars(known)["_dynamo_marked_constant"] = True


@cache
def _key(name: str, columns: int, outputs: int, device: torch.device, rows: int) -> str:
    import triton

    gpu = torch.cuda.get_device_name(device)
    return f"{name}, {gpu}, Triton {triton.__version__}: {columns} to {outputs}, {rows} rows"


def _timed(
    key: str,
    device: torch.device,
    configurations: Sequence[Configuration],
    run: Callable[[Configuration], object],
) -> Configuration:
    with _lock, torch.cuda.device(device):
        found = _table().get(key)
        if found is None or found not in configurations:  # unless another thread was here
            found = fastest(configurations, run)
            log.debug("%s: %s is the quickest configuration", key, tuple(found))
            _keep(key, found)
    return found


def fastest(configurations: Sequence[Configuration], run: Callable[[Configuration], object]) -> Configuration:
    """The configuration with the shortest best round, of those that can be built. Raises KernelError if none can."""
    able = [c for c in configurations if _is_built(run, c)]
    if not able:
        run(configurations[0])  # which says why
    times = {c: min(_milliseconds(run, c) for _ in range(ROUNDS)) for c in able}
    return min(able, key=times.__getitem__)


def _is_built(run: Callable[[Configuration], object], configuration: Configuration) -> bool:
    """Whether a first call succeeds: a GPU may lack the shared memory for one of them."""
    try:
        run(configuration)
    except KernelError as error:
        log.debug("%s cannot be built: %s", tuple(configuration), error)
        return False
    return True


def _milliseconds(run: Callable[[Configuration], object], configuration: Configuration) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(RUNS):
        run(configuration)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


# ------------------------------------------------------------------ on disk


@cache
def _table() -> dict[str, Configuration]:
    """Key → configuration, at first what the file says."""
    return read(file())


def _keep(key: str, configuration: Configuration) -> None:
    _table()[key] = configuration
    try:
        write(file(), read(file()) | {key: configuration})
    except OSError as error:
        log.debug("the choice is not remembered: %s", error)


def file() -> Path:
    """Where choices are remembered: in Triton's cache (TRITON_CACHE_DIR)."""
    from triton import knobs

    return Path(knobs.cache.dir, "zimage-tuning.json")


def read(path: Path) -> dict[str, Configuration]:
    """What a file remembers; nothing if there is none, or one of another kind."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {key: Configuration(*map(int, numbers)) for key, numbers in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        log.debug("%s is not a file of kernel timings: %s", path, error)
        return {}


def write(path: Path, choices: dict[str, Configuration]) -> None:
    """Replace the file at once, so that no reader sees half of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(descriptor, "w", encoding="utf-8") as new:
            json.dump(choices, new, indent=1)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
