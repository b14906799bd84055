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

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OURS = {HERE / name for name in ("counted.py", "mac.py", "pretended.py", "pretended_ops.py")}


class Peaks(NamedTuple):
    """FLOP/s (or OP/s) of products by their factors, and bytes/s, as the makers state them."""

    bf16: float
    int8: float
    fp8: float
    fp16_sums: float  # of fp16 products that add up in fp16
    fp32: float  # outside the tensor cores
    bandwidth: float

    def rate(self, launch: "Launch", fp16_sums: bool) -> float:
        if launch.dtype is torch.int8:
            return self.int8
        if launch.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            return self.fp8
        if launch.dtype is torch.float32:
            return self.fp32
        halves = fp16_sums and launch.dtype is torch.float16 and launch.name != "attention"
        return self.fp16_sums if halves else self.bf16


RTX4090 = Peaks(bf16=165e12, int8=660e12, fp8=330e12, fp16_sums=330e12, fp32=82.6e12, bandwidth=1008e9)


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
            max(launch.flops / peaks.rate(launch, fp16_sums), launch.bytes / peaks.bandwidth)
            for launch in self.launches
        )


class Card:
    """`devices` cards of one kind: what is alive on them, and what they did. `free` bytes on each."""

    def __init__(self, devices: int, capability: tuple[int, int], free: float):
        self.devices, self.capability, self.free = devices, capability, int(free)
        self.live: Counter[int] = Counter()  # bytes by device index
        self.most: Counter[int] = Counter()
        self.pinned: list[int] = []  # bytes of every page-locked allocation
        self.counts: list[Count] = [Count()]
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
    """The innermost line of the project (or of a test) that is running, as "zimage/flow.py:30"."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and file not in OURS and "site-packages" not in frame.filename:
            return f"{file.relative_to(ROOT)}:{frame.lineno}"
    return "?"


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
