"""Hints to the kernel on which mapped weights come next and which are no longer needed.

Weights on the CPU are views of memory-mapped files. Read lazily, they arrive in page faults of 4 KB, at half the disk's
speed, while the processor waits; announced in the order of use, they are read ahead of the computation.
"""

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable
from functools import cache

from torch import Tensor

MADV_DONTNEED = 4
MADV_POPULATE_READ = 22  # Linux 5.14: read the pages and map them, without the faults
PAGE = mmap.PAGESIZE


class Prefetch:
    """A thread that reads mapped weights into memory in the order given; `stop` ends it early.

    They are asked for one by one as it comes to them. `after`: another one, which finishes first, since two at once
    would share the disk.
    """

    def __init__(self, tensors: Iterable[Tensor], after: "Prefetch | None" = None):
        self._after = after
        self._tensors = tensors  # held, so that they stay mapped
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="zimage-prefetch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return once no page is being read, so that the file may be unmapped."""
        self._stopped.set()
        self._thread.join()

    def finish(self) -> None:
        """Return once everything has been read."""
        self._thread.join()

    def _work(self) -> None:
        if self._after is not None:
            self._after.finish()
            self._after = None
        chunk = 32 << 20  # small enough to stop soon, large enough to stream
        for tensor in self._tensors:
            start, length = _pages(tensor) if tensor.device.type == "cpu" and tensor.numel() else (0, 0)
            for offset in range(0, length, chunk):
                if self._stopped.is_set():
                    return
                _madvise(start + offset, min(chunk, length - offset), MADV_POPULATE_READ)


def forget_pages(tensor: Tensor) -> None:
    """Drop from memory the pages of a mapped tensor that is not read again; the file keeps them."""
    if tensor.device.type == "cpu":
        start, length = _pages(tensor)
        _madvise(start, length, MADV_DONTNEED)


def _pages(tensor: Tensor) -> tuple[int, int]:
    """Address and length of the whole pages inside the tensor's bytes."""
    begin = -(-tensor.data_ptr() // PAGE) * PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
    return begin, max(end - begin, 0)


def _madvise(address: int, length: int, advice: int) -> None:
    """A hint only: with a kernel that does not know it only the speed changes, so its answer is ignored."""
    if length and sys.platform == "linux":
        libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)


@cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
