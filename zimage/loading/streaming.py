"""Streaming: blocks whose weights are in memory only while they run, while those of the next one are on their way.

    block      0         1         2         0      (of a model whose every block is streamed)
    weights    bring ──→ bring ──→ bring ──→ bring
    next one   announce 1   2         0         1
    after it   let go 0     1         2         0

At most two blocks' weights are in memory at a time. On a CPU they are pages of the mapped file, read ahead by another
thread and unmapped afterwards (the page cache keeps them if there is room); weights of another dtype are cast when
their block runs. On a GPU they are copied from page-locked memory into two buffers in turn, by a stream of their own,
while the other buffer's block computes; quantised and packed matrices come as codes and scales. Values and kernels are
those of resident weights, so results have equal bits.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zimage.formats.pages import Prefetch, forget_pages
from zimage.loading.allocator import together
from zimage.loading.memory import page_locked
from zimage.nn.packed import PackedEmbedding, PackedLinear, packed_codes

ALIGNMENT = 256  # bytes, of a weight within a buffer, as in a GPU's allocator


@runtime_checkable
class Blocks(Protocol):
    """A model of blocks that run one after another."""

    def blocks(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]: ...


class Runtime(Protocol):
    """What CUDA has for copies beside the computation."""

    def Stream(self, device: torch.device, /) -> torch.cuda.Stream: ...
    def Event(self) -> torch.cuda.Event: ...
    def stream(self, stream: torch.cuda.Stream, /) -> AbstractContextManager[object]: ...
    def current_stream(self, device: torch.device, /) -> torch.cuda.Stream: ...


def stream(model: nn.Module, indices: Sequence[int], device: torch.device) -> None:
    """Stream the blocks `indices` of `model.blocks()`, whose weights were left as they are stored, in place."""
    assert isinstance(model, Blocks)
    blocks = list(model.blocks())
    carrier: MappedBlocks | CopiedBlocks
    if device.type == "cpu":
        weights = [[w for w in blocks[i][1] if hasattr(w, "wanted")] for i in indices]
        codes = [[code for m in blocks[i][0].modules() for code in packed_codes(m)] for i in indices]
        carrier = MappedBlocks(weights, codes)
    else:
        carrier = CopiedBlocks([on_the_host(blocks[i][0]) for i in indices], device)
    vars(model)["streaming"] = streaming = Streaming(carrier, len(indices))
    for turn, i in enumerate(indices):
        block = blocks[i][0]
        inner = vars(block).get("forward") or partial(_forward, weakref.ref(block))
        block.forward = partial(_run, streaming, turn, inner)


def stop_streaming(model: nn.Module) -> None:
    """Release what was read ahead; the model may run again."""
    if streaming := vars(model).get("streaming"):
        streaming.stop()


def streamed_blocks(model: nn.Module) -> int:
    """How many blocks of a loaded model are streamed."""
    streaming = vars(model).get("streaming")
    return streaming.count if streaming else 0


def on_the_host(block: nn.Module) -> list[Tensor]:
    """The tensors of a block that were left on the host when it was loaded: weights, codes and scales."""
    return [tensor for tensor in _tensors(block) if "wanted" in vars(tensor)]


def bytes_on(model: nn.Module, device: torch.device) -> int:
    """Bytes of a model on a device, those of the buffers for its streamed blocks among them."""
    streaming = vars(model).get("streaming")
    buffers = [buffer.values for buffer in streaming.carrier.buffers] if streaming else []
    return sum(tensor.nbytes for tensor in (*_tensors(model), *buffers) if tensor.device == device)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            yield from module.packed.tensors()


def resident_weights(model: nn.Module, reads: Callable[[nn.Module], Iterator[nn.Parameter]]) -> Iterator[nn.Parameter]:
    """The weights that stay in memory, in the order in which a run `reads` them."""
    return (weight for weight in reads(model) if not hasattr(weight, "wanted"))


def _forward(block: "weakref.ref[nn.Module]", *args: object, **kwargs: object) -> Tensor:
    """Run a block through a weak reference: a cycle would keep its pages mapped until Python collects it."""
    module = block()
    assert module is not None  # its caller holds it
    return type(module).forward(module, *args, **kwargs)


def _run(streaming: "Streaming", turn: int, forward: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
    with streaming.turn(turn):
        return forward(*args, **kwargs)


class Streaming:
    """Whose turn it is. One block runs at a time: threads that share a model alternate, and memory stays bounded."""

    def __init__(self, carrier: "MappedBlocks | CopiedBlocks", count: int):
        self.carrier, self.count = carrier, count
        self._lock = threading.Lock()
        # Which block follows which: at first the file's order, then the observed one.
        self._after: dict[int, int] = {i: i + 1 for i in range(count - 1)}
        self._last: int | None = None

    @contextmanager
    def turn(self, i: int) -> Iterator[None]:
        """Inside, the weights of streamed block `i` are in memory."""
        with self._lock:
            if self._last is not None:
                self._after[self._last] = i
            self._last = i
            try:
                self.carrier.bring(i)
                following = self._after.get(i, i)
                if following != i:
                    self.carrier.announce(following)
                yield
            finally:
                self.carrier.let_go(i)

    def stop(self) -> None:
        with self._lock:
            self._last = None  # the next run begins elsewhere
            self.carrier.stop()


class MappedBlocks:
    """Weights of blocks on a CPU: views of mapped files, or cast from them when the block runs.

    `codes` are tensors of packed matrices, which are not replaced: only their pages come and go.
    """

    def __init__(self, weights: list[list[nn.Parameter]], codes: list[list[Tensor]]):
        self.weights, self.codes = weights, codes
        self.stored = [[weight.data for weight in block] for block in weights]
        self._ahead: tuple[int, Prefetch] | None = None  # the announced block
        self._reading: Prefetch | None = None  # that of the running block

    def bring(self, i: int) -> None:
        if self._ahead is not None and self._ahead[0] == i:
            self._reading, self._ahead = self._ahead[1], None
        if self._reading is not None and any(_wanted(w) != s.dtype for w, s in self._pairs(i)):
            self._reading.finish()  # or it would bring back what is dropped here
        for weight, stored in self._pairs(i):
            if _wanted(weight) != stored.dtype:
                weight.data = stored.to(_wanted(weight))
                forget_pages(stored)

    def announce(self, i: int) -> None:
        """Read block `i` after the running block has been read; an announced block that did not run is dropped."""
        if self._ahead is None or self._ahead[0] != i:
            self.stop()
            self._ahead = (i, Prefetch(self.stored[i] + self.codes[i], after=self._reading))

    def let_go(self, i: int) -> None:
        if self._reading is not None:
            self._reading.stop()
            self._reading = None
        for weight, stored in self._pairs(i):
            weight.data = stored
            forget_pages(stored)
        for code in self.codes[i]:
            forget_pages(code)

    def stop(self) -> None:
        if self._ahead is not None:
            i, prefetch = self._ahead
            prefetch.stop()
            self._ahead = None
            for stored in self.stored[i] + self.codes[i]:
                forget_pages(stored)

    def _pairs(self, i: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return zip(self.weights[i], self.stored[i], strict=True)


class CopiedBlocks:
    """Weights of blocks on a GPU: page-locked copies on the host, two buffers on the device, a stream that copies.

    A copy into a buffer waits for the event `free`, recorded when the buffer's last block had been launched; a block
    waits for `ready`, recorded after the copy.
    """

    def __init__(self, weights: list[list[Tensor]], device: torch.device, runtime: Runtime = torch.cuda):
        self.weights, self.device, self.runtime = weights, device, runtime
        self.hosts = _copies(weights, page_locked if device.type == "cuda" else _pageable)
        self.copies = runtime.Stream(device)
        largest = max(host.numel() for host in self.hosts)
        self.buffers = [_Buffer(largest, device, runtime, self.copies) for _ in range(2)]
        for buffer in self.buffers:  # kernels launched before may still use its memory
            buffer.free.record(runtime.current_stream(device))

    def bring(self, i: int) -> None:
        buffer = self._holding(i) or self._fetch(i, self.buffers[0] if self.buffers[1].latest else self.buffers[1])
        self._mark(buffer)
        self.runtime.current_stream(self.device).wait_event(buffer.ready)
        self._use(i, buffer.values)

    def announce(self, i: int) -> None:
        if self._holding(i) is None:
            self._fetch(i, next(buffer for buffer in self.buffers if not buffer.latest))

    def let_go(self, i: int) -> None:
        self._use(i, self.hosts[i])
        buffer = self._holding(i)
        if buffer is not None:  # None: bringing it failed
            buffer.free.record(self.runtime.current_stream(self.device))

    def stop(self) -> None:
        self.copies.synchronize()

    def _use(self, i: int, packed: Tensor) -> None:
        for weight, view in zip(self.weights[i], _views(packed, self.weights[i]), strict=True):
            weight.data = view

    def _holding(self, i: int) -> "_Buffer | None":
        return next((buffer for buffer in self.buffers if buffer.block == i), None)

    def _mark(self, latest: "_Buffer") -> None:
        for buffer in self.buffers:
            buffer.latest = buffer is latest

    def _fetch(self, i: int, buffer: "_Buffer") -> "_Buffer":
        host = self.hosts[i]
        buffer.block = None  # half copied, should this fail
        with self.runtime.stream(self.copies):
            self.copies.wait_event(buffer.free)
            buffer.values[: host.numel()].copy_(host, non_blocking=True)
            buffer.ready.record(self.copies)
        buffer.block = i
        return buffer


class _Buffer:
    def __init__(self, size: int, device: torch.device, runtime: Runtime, copies: torch.cuda.Stream):
        self.values = torch.empty(size, dtype=torch.uint8, device=device)
        if device.type == "cuda":  # a model may be dropped while a copy is under way: its memory then waits for that
            self.values.record_stream(copies)
        self.ready, self.free = runtime.Event(), runtime.Event()
        self.block: int | None = None  # the one whose weights it holds
        self.latest = False  # its block runs or was the last to run


def buffer_bytes(sizes: Iterable[int]) -> int:
    """Bytes of a streamed block whose tensors have these sizes, so that one copy brings all of them."""
    return sum(_aligned(size) for size in sizes)


def _copies(blocks: list[list[Tensor]], allocate: Callable[[int], Tensor]) -> list[Tensor]:
    """Each block's tensors, as they are used, side by side on the host; several blocks share an allocation."""
    sizes = [buffer_bytes(weight.numel() * _wanted(weight).itemsize for weight in block) for block in blocks]
    hosts = [host for run in together(sizes) for host in allocate(sum(run)).split(run)]
    for block, host in zip(blocks, hosts, strict=True):
        for weight, view in zip(block, _views(host, block), strict=True):
            stored = weight.data
            view.copy_(stored)
            weight.data = view
            forget_pages(stored)
    return hosts


def _pageable(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _views(packed: Tensor, weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each weight's place in a packed block."""
    begin = 0
    for weight in weights:
        size = weight.numel() * _wanted(weight).itemsize
        yield packed[begin : begin + size].view(_wanted(weight)).view(weight.shape)
        begin += _aligned(size)


def _wanted(weight: Tensor) -> torch.dtype:
    """The dtype in which a tensor that was left on the host is used."""
    return vars(weight)["wanted"]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
