"""How long a call takes on a device: CUDA events on a GPU, with an L2 cache that holds nothing of the last call."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Written before every call: more than any GPU's L2 (RTX 4090: 72 MB), which would else hold the inputs of small ops.
FLUSH = 256 << 20
# Before that the GPU waits about a millisecond, in which the host launches the call: where a launch takes longer than
# the writing, the times of small kernels would be those of launching them.
HEAD_START = 2_000_000  # of its clock's ticks


class Timing(NamedTuple):
    """The median of some calls in milliseconds, their range and their number."""

    ms: float
    least: float
    most: float
    calls: int


def timed(call: Callable[[], Any], device: torch.device | str, repeats: int, seconds: float = 60.0) -> Timing:
    """Time a call after one that is not timed, until `repeats` calls or `seconds` are used up, at least once."""
    once = _on_gpu if torch.device(device).type == "cuda" else _on_cpu
    call()
    measured: list[float] = []
    until = time.perf_counter() + seconds
    while not measured or (len(measured) < repeats and time.perf_counter() < until):
        measured.append(once(call, device))
    return Timing(statistics.median(measured), min(measured), max(measured), len(measured))


def _on_cpu(call: Callable[[], Any], device: torch.device | str) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _on_gpu(call: Callable[[], Any], device: torch.device | str) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    torch.empty(FLUSH, dtype=torch.int8, device=device).zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
