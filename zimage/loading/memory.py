"""The machine's memory, and running out of it."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from zimage.errors import OutOfMemory
from zimage.formats.pages import PAGE, libc

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt
KEPT = 64 << 20  # bytes: an activation of a step is kept, a whole map of a VAE is returned at once


def available_memory(device: torch.device) -> int:
    """Bytes that can be used on `device` without pushing anything else out."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min(int(free.split()[1]) * 1024, _container_memory())


def process_memory() -> int:
    """Bytes of this process that are resident now, pages of mapped files included."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * PAGE if statm.is_file() else 0


@contextlib.contextmanager
def out_of_memory_in(stage: str) -> Iterator[None]:
    """Turn a lack of memory inside into one line: an OutOfMemory that names the stage and the size asked for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        raise OutOfMemory(
            f"out of memory in the {stage} stage"
            + (f", allocating {_readable(asked[1])}" if asked else "")
            + "; set memory (--memory GB) below what is free, or choose a smaller size"
        ) from None


def _is_shortage(error: Exception) -> bool:
    """Whether memory was lacking; PyTorch has a class for this error on NVIDIA GPUs only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "out of memory"))


def _readable(size: str) -> str:
    """The size in GB where PyTorch counts in bytes, as it does on a CPU."""
    number, unit = size.split()
    return f"{int(number) / 1e9:.3g} GB" if unit == "bytes" else size


def _container_memory() -> int:
    """Bytes left under a container's limit (control groups, version 2); a very large number where there is none."""
    group = Path("/sys/fs/cgroup")
    if not (group / "memory.max").is_file() or (group / "memory.max").read_text().strip() == "max":
        return sys.maxsize
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / "memory.current").read_text()) - int(statistics["file"])  # cached files make room when asked
    return max(int((group / "memory.max").read_text()) - used, 0)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next activation, until `release_cached`. For the whole process.

    By default every map above some 100 KB is new memory from the kernel, zeroed page by page when first written: 8 % of
    a full-size step.
    """
    if sys.platform == "linux" and hasattr(libc(), "mallopt"):
        for option, size in ((M_MMAP_THRESHOLD, KEPT), (M_TRIM_THRESHOLD, KEPT), (M_TOP_PAD, KEPT)):
            libc().mallopt(option, size)


def release_cached(device: torch.device) -> None:
    """Return freed memory, so that the next stage and other programs can use it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc(), "malloc_trim"):
        libc().malloc_trim(0)
