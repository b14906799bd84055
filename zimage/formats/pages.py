"""Telling the kernel which mapped weights come next or are done with.

Weights on the CPU are views of memory-mapped files. Read lazily they arrive 4 KB fault by fault, at half the disk's
speed and while the processor waits; announced in the order of use they stream in ahead of the computation.
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
    """Brings mapped weights into memory from another thread, in the order given; `stop` ends it early.

    `after`: begin when that one is done, since two at once would share the disk.
    """

    def __init__(self, tensors: Iterable[Tensor], after: "Prefetch | None" = None):
        self._after = after
        self._tensors = [t for t in tensors if t.device.type == "cpu" and t.numel()]  # held: so they stay mapped
        self._ranges = [_pages(t) for t in self._tensors]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="zimage-prefetch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the pages are no longer being touched, so that they may be unmapped."""
        self._stopped.set()
        self._thread.join()

    def finish(self) -> None:
        """Returns when all has been read."""
        self._thread.join()

    def _work(self) -> None:
        if self._after is not None:
            self._after.finish()
            self._after = None
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
        libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)


@cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
