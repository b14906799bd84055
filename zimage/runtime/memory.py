"""What the machine has, and telling the kernel which mapped weights come next or are done with.

Weights on the CPU are views of memory-mapped files. Read lazily they arrive 4 KB fault by fault, at half the disk's
speed and while the processor waits; announced in the order of use they stream in ahead of the computation.
"""

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt
MADV_DONTNEED = 4
MADV_POPULATE_READ = 22  # Linux 5.14: read the pages and map them, without the faults
PAGE = mmap.PAGESIZE


def available_memory(device: torch.device) -> int:
    """Bytes that can be used on `device` without pushing anything else out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min(int(free.split()[1]) * 1024, _container_memory())


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

    By default every map of more than some 100 KB is new memory from the kernel, zeroed page by page when first written:
    8 % of a full-size step.
    """
    if sys.platform == "linux" and hasattr(_libc(), "mallopt"):
        for option, size in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 64 << 20)):
            _libc().mallopt(option, size)


def release_cached(device: torch.device) -> None:
    """Hand freed memory back, so that the next stage and other programs can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


class Prefetch:
    """Brings mapped weights into memory from another thread, in the order given; `stop` ends it early."""

    def __init__(self, tensors: Iterable[Tensor]):
        self._ranges = [_pages(t) for t in tensors if t.device.type == "cpu" and t.numel()]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="zimage-prefetch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the pages are no longer being touched, so that they may be unmapped."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        chunk = 32 << 20  # small enough to stop soon, large enough to stream
        for start, length in self._ranges:
            for offset in range(0, length, chunk):
                if self._stopped.is_set():
                    return
                _madvise(start + offset, min(chunk, length - offset), MADV_POPULATE_READ)


def forget_pages(tensor: Tensor) -> None:
    """Drop the pages of a mapped tensor that was copied elsewhere and is not read again; they stay in the file."""
    if tensor.device.type == "cpu":
        start, length = _pages(tensor)
        _madvise(start, length, MADV_DONTNEED)


def _pages(tensor: Tensor) -> tuple[int, int]:
    """Address and length of the whole pages inside the tensor's bytes."""
    begin = -(-tensor.data_ptr() // PAGE) * PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
    return begin, max(end - begin, 0)


def _madvise(address: int, length: int, advice: int) -> None:
    """A hint only: a kernel that does not know it changes nothing but the speed, so its answer is not looked at."""
    if length and sys.platform == "linux":
        _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
