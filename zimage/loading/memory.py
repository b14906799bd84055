"""The machine's memory, and running out of it."""

import contextlib
import ctypes
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from zimage.errors import OutOfMemory, RequestError
from zimage.formats.pages import PAGE, libc

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt
KEPT = 64 << 20  # bytes: an activation of a step is kept, a whole map of a VAE is returned at once


# What PyTorch, CUDA's libraries and Metal say where memory is lacking. A library that cannot begin to work on a GPU
# ("not initialized") nearly always lacks the memory for it.
SHORTAGE = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Invalid buffer size|Failed to allocate private MTLBuffer"
    r"|CU(BLAS|DNN)_STATUS_(NOT_INITIALIZED|ALLOC_FAILED)|CUDNN_STATUS_INTERNAL_ERROR_\w*ALLOCATION_FAILED"
)


def available_memory(device: torch.device) -> int:
    """Bytes that can be used on `device` without pushing anything else out."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return max(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), 0)
    return _host_memory()


def _host_memory() -> int:
    if sys.platform == "win32":
        return _windows_memory()
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # macOS: all that the machine has
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min(int(free.split()[1]) * 1024, _container_memory())


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows' GlobalMemoryStatusEx."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("physical", "available", "pages", "pages_left")),
        *((name, ctypes.c_uint64) for name in ("virtual", "virtual_left", "extended_left")),
    )


def _windows_memory() -> int:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not vars(ctypes)["windll"].kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return status.available


def check_processes(count: int, each: int, fields: tuple[str, ...]) -> None:
    """Raise RequestError where so many processes of `each` bytes, without models, do not fit; `fields` ask for them."""
    needed, free = count * each / 1e9, available_memory(torch.device("cpu")) / 1e9
    if needed > free:
        text = f"{count:,} processes need more than {needed:.1f} GB without their models, and {free:.1f} GB are free"
        raise RequestError(f"{text}; pass fewer {' or '.join(fields)}", fields=fields)


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
        traceback.clear_frames(error.__traceback__)  # they hold what was loaded, and the new error holds them
        raise OutOfMemory(_told(error, stage)) from None


def page_locked(size: int) -> Tensor:
    """So many bytes of the host's memory that a GPU reads by itself. Raises HostShortage."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        if not _is_shortage(error):
            raise
        raise HostShortage(f"tried to allocate {size} bytes") from error


class HostShortage(MemoryError):
    """No page-locked memory is left on the host: CUDA calls that "out of memory", too."""


def _is_shortage(error: Exception) -> bool:
    """Whether memory was lacking; PyTorch has a class for this error on NVIDIA GPUs only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or SHORTAGE.search(str(error)) is not None


def _told(error: Exception, stage: str) -> str:
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)|Invalid buffer size: ([\d.]+ \w+)", str(error))
    size = f", allocating {_readable(asked[1] or asked[2])}" if asked else ""
    if isinstance(error, HostShortage):
        advice = "set a larger memory (--memory GB), so that more blocks stay on the GPU"
        return f"out of page-locked memory on the host in the {stage} stage{size}; {advice}"
    status = re.search(r"CU(BLAS|DNN)_STATUS_\w+", str(error))
    said = f" ({status[0]})" if status else ""
    advice = "set memory (--memory GB) below what is free, or choose a smaller size"
    return f"out of memory in the {stage} stage{said}{size}; {advice}"


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
        # What was page-locked for it, too; the function became public in PyTorch 2.13.
        (getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache)()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif sys.platform == "linux" and hasattr(libc(), "malloc_trim"):
        libc().malloc_trim(0)
