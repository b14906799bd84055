"""What a pretended card did: launches, bytes, copies, waits, storage, and the least time by the makers' figures."""

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.peaks import RTX4090, Peaks

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OURS = {HERE / name for name in ("counted.py", "mac.py", "pretended.py", "pretended_ops.py")}


class Launch(NamedTuple):
    """One kernel on the card."""

    name: str
    device: torch.device
    bytes: int = 0  # read and written at least
    flops: int = 0
    dtype: torch.dtype | None = None  # of a product's factors


class Copy(NamedTuple):
    """Bytes between two devices, the line of the project that copies them, and whether the host waits for it."""

    source: torch.device
    target: torch.device
    bytes: int
    line: str
    waits: bool


@dataclass
class Count:
    """What happened on the card between two points."""

    launches: list[Launch] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    syncs: list[str] = field(default_factory=list)  # lines of the project
    start: int = 0  # bytes alive at the beginning
    peak: int = 0  # most bytes alive beyond that

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    def by_name(self) -> Counter[str]:
        return Counter(launch.name for launch in self.launches)

    def seconds(self, peaks: Peaks = RTX4090, fp16_sums: bool = False) -> float:
        """The least time by the makers' figures: each launch is bound by its arithmetic or by its bytes."""
        return sum(
            peaks.seconds(x.flops, x.bytes, peaks.rate(x.dtype, x.name == "attention", fp16_sums))
            for x in self.launches
        )


class Card:
    """`devices` cards of one kind: what is alive on them, and what they did. `free` bytes on each."""

    def __init__(self, devices: int, capability: tuple[int, int], free: float):
        self.devices, self.capability, self.free = devices, capability, int(free)
        self.live: Counter[int] = Counter()  # bytes by device index
        self.most: Counter[int] = Counter()
        self.pinned: list[int] = []  # bytes of every page-locked allocation
        self.returned: list[int] = []  # how many of these there were whenever unused ones were given back
        self.counts: list[Count] = [Count()]
        self.captures: list[Count] = []  # what each CUDA graph holds
        self.known: set[int] = set()  # storages

    @property
    def total(self) -> Count:
        """Everything since the beginning."""
        return self.counts[0]

    @contextlib.contextmanager
    def count(self) -> Iterator[Count]:
        count = Count(start=sum(self.live.values()))
        self.counts.append(count)
        try:
            yield count
        finally:
            self.counts.remove(count)

    def gave_back(self) -> None:
        """Page-locked memory that nothing uses went back to the system."""
        self.returned.append(len(self.pinned))

    def launched(self, launch: Launch) -> None:
        for count in self.counts:
            count.launches.append(launch)

    def copied(self, copy: Copy) -> None:
        for count in self.counts:
            count.copies.append(copy)
        if copy.waits:
            self.waited(copy.line)

    def waited(self, line: str) -> None:
        for count in self.counts:
            count.syncs.append(line)

    def holds(self, tensor: Tensor) -> None:
        """Follow the storage of a tensor on the card until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.device.type != "cuda" or key in self.known:
            return
        index = tensor.device.index
        self.known.add(key)
        self.live[index] += size
        self.most[index] = max(self.most[index], self.live[index])
        for count in self.counts:
            count.peak = max(count.peak, sum(self.live.values()) - count.start)
        weakref.finalize(storage, self._freed, key, index, size)

    def _freed(self, key: int, index: int, size: int) -> None:
        self.known.discard(key)
        self.live[index] -= size


def project_line() -> str:
    """The innermost line of the project (or of a test) that is running, as "zimage/flow/steps.py:30"."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and file not in OURS and "site-packages" not in frame.filename:
            return f"{file.relative_to(ROOT)}:{frame.lineno}"
    return "?"


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
