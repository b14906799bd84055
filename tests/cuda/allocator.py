"""Models of PyTorch's two caching allocators, written from their rules, to try plans on cards that are not here.

The device's (c10/cuda/CUDACachingAllocator.cpp: round_size, get_allocation_size, get_free_block, should_split; the
constants stand in torch/include/c10/core/AllocatorConfig.h): sizes are rounded to 512 bytes; up to 1 MiB they come
from segments of 2 MiB, below 10 MiB from segments of 20 MiB, else from one of their own in units of 2 MiB. The
smallest free block that is large enough is taken and split if 512 bytes (small pool) or more than 1 MiB (large pool)
remain. The host's (torch/include/ATen/core/CachingHostAllocator.h, `allocate`): the next power of two.
"""

from bisect import bisect_left, insort

MIB = 1 << 20


class Block:
    """Bytes of a segment, between its neighbours there."""

    def __init__(self, size: int, small: bool, before: "Block | None" = None, after: "Block | None" = None):
        self.size, self.small, self.before, self.after = size, small, before, after
        self.used = False


class CachingAllocator:
    """One GPU's memory as PyTorch keeps it: `reserved` is what the process holds of the card, `peak` the most ever."""

    def __init__(self) -> None:
        self.reserved = self.peak = self.allocated = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # sorted by size

    def allocate(self, size: int) -> Block:
        size = max(512, -(-size // 512) * 512)
        small = size <= MIB
        free = self._free[small]
        i = bisect_left(free, (size, 0))
        block = free.pop(i)[2] if i < len(free) else self._segment(size, small)
        rest = block.size - size
        if rest >= 512 if small else rest > MIB:
            remainder = Block(rest, small, block, block.after)
            if block.after:
                block.after.before = remainder
            block.after, block.size = remainder, size
            self._put(remainder)
        block.used = True
        self.allocated += block.size
        return block

    def release(self, block: Block) -> None:
        block.used = False
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other and not other.used:
                self._free[block.small].remove((other.size, id(other), other))
                first, second = (other, block) if other is block.before else (block, other)
                first.size, first.after = first.size + second.size, second.after
                if second.after:
                    second.after.before = first
                block = first
        self._put(block)

    def empty_cache(self) -> None:
        """Give back the segments that are free as a whole."""
        for small, free in self._free.items():
            whole = [entry for entry in free if not entry[2].before and not entry[2].after]
            self.reserved -= sum(size for size, *_ in whole)
            self._free[small] = [entry for entry in free if entry not in whole]

    def _segment(self, size: int, small: bool) -> Block:
        size = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        self.reserved += size
        self.peak = max(self.peak, self.reserved)
        return Block(size, small)

    def _put(self, block: Block) -> None:
        insort(self._free[block.small], (block.size, id(block), block))


def pinned(sizes: list[int]) -> int:
    """Bytes of the host that page-locked allocations of these sizes take."""
    return sum(1 << (size - 1).bit_length() for size in sizes)
