"""What PyTorch's allocators take for what is asked of them: both round up, and both keep what was freed.

On a GPU (torch/include/c10/core/AllocatorConfig.h, c10/cuda/CUDACachingAllocator.cpp) requests of up to 1 MiB are cut
out of segments of 2 MiB, those below 10 MiB out of segments of 20 MiB, and each larger one gets a segment of its own
in units of 2 MiB. Page-locked memory of the host (torch/include/ATen/core/CachingHostAllocator.h) is rounded up to a
power of two.
"""

from collections.abc import Iterable, Sequence

MIB = 1 << 20
LEAST, SMALL, LARGE, UNIT = 512, MIB, 10 * MIB, 2 * MIB
SHARED = {True: 2 * MIB, False: 20 * MIB}  # bytes of a segment, for requests that are small or not


def reserved_bytes(sizes: Iterable[int]) -> int:
    """Bytes of a GPU that tensors of these sizes take, allocated one after another and kept."""
    rounded = [_up(size, LEAST) for size in sizes if size]
    own = sum(_up(size, UNIT) for size in rounded if size >= LARGE)
    return own + sum(_shared([s for s in rounded if s < LARGE and (s <= SMALL) is small], small) for small in SHARED)


def _shared(sizes: Sequence[int], small: bool) -> int:
    """Bytes of the segments that these are cut out of; each goes where the least is left."""
    left: list[int] = []
    for size in sizes:
        fitting = [i for i, rest in enumerate(left) if rest >= size]
        if not fitting:
            fitting = [len(left)]
            left.append(SHARED[small])
        left[min(fitting, key=left.__getitem__)] -= size
    return len(left) * SHARED[small]


def together(sizes: Sequence[int]) -> list[list[int]]:
    """The sizes in runs that share a page-locked allocation, so that rounding these up to powers of two adds least."""
    best: list[tuple[int, list[list[int]]]] = [(0, [])]
    for end in range(1, len(sizes) + 1):
        ways = ((best[i][0] + _locked(sizes[i:end]), i) for i in range(end))
        least, begin = min(ways)
        best.append((least, [*best[begin][1], list(sizes[begin:end])]))
    return best[-1][1]


def page_locked_bytes(sizes: Sequence[int]) -> int:
    """Bytes of the host that blocks of these sizes take, page-locked."""
    return sum(map(_locked, together(sizes)))


def _locked(run: Sequence[int]) -> int:
    return 1 << (sum(run) - 1).bit_length() if any(run) else 0


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
