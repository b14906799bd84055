"""CUDA graphs: what a function launches on a GPU is recorded once and replayed in one call.

That pays where launching takes longer than computing: some 500 launches of a small picture or of one written token cost
6 ms of Python, however fast the GPU is. A graph repeats the launches with the addresses and numbers of its capture, so
what changes between replays must be a tensor among its inputs, and everything else that it reads (weights, a cache)
must stay where it was. Nothing inside may wait for the GPU or depend on the data.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from zimage.errors import one_line

log = logging.getLogger("zimage")


class Graphs(Protocol):
    """What captures graphs on one device."""

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What replays `run`, and the tensor that holds its result after each replay. Raises RuntimeError."""
        ...


class CudaGraphs:
    """CUDA's own, whose intermediate results share one pool of memory: only one of them may run at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._aside = torch.cuda.Stream(device)  # one for all, since cuBLAS keeps a workspace for each stream
        self._living: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with torch.cuda.device(self.device):
            self._warm_up(run)
            return self._record(run)

    def _warm_up(self, run: Callable[[], Tensor]) -> None:
        """Kernels are compiled and tuned, libraries loaded, and cuBLAS's workspaces allocated, when they first run.

        None of it may be captured.
        """
        here = torch.cuda.current_stream()
        self._aside.wait_stream(here)
        with torch.cuda.stream(self._aside):
            run()
        here.wait_stream(self._aside)

    def _pool(self) -> "torch.cuda.graphs._POOL_HANDLE":
        """That of the graphs that live, or a new one.

        PyTorch refuses a pool without graphs in which memory is still in use, as what a library allocated in a
        capture and keeps.
        """
        return next((graph.pool() for graph in self._living), None) or torch.cuda.graph_pool_handle()

    def _record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        here, graph, pool = torch.cuda.current_stream(), torch.cuda.CUDAGraph(), self._pool()
        try:
            # Other threads may allocate meanwhile: only this one's calls are watched.
            with torch.cuda.graph(graph, pool, self._aside, capture_error_mode="thread_local"):
                output = run()
        except RuntimeError:  # torch.cuda.graph may then leave its stream in place and the allocator at its pool
            torch.cuda.set_stream(here)
            with contextlib.suppress(RuntimeError):  # it has left the pool, if all but `run` was in order
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        self._living.add(graph)
        return graph.replay, output


class Captured:
    """A function of tensors as one graph; `inputs` are those of the first call. Raises RuntimeError."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], graphs: Graphs):
        self.inputs = [x.clone() for x in inputs]
        self._replay, self._output = graphs.capture(partial(function, *self.inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result, as a tensor of its own."""
        for dtype in {x.dtype for x in self.inputs}:  # one launch copies many tensors of one dtype
            pairs = [(ours, x) for ours, x in zip(self.inputs, inputs, strict=True) if ours.dtype == dtype]
            torch._foreach_copy_([ours for ours, _ in pairs], [x for _, x in pairs])
        self._replay()
        return self._output.clone()


def captured(function: Callable[..., Tensor], inputs: Sequence[Tensor], graphs: Graphs) -> Callable[..., Tensor]:
    """The function as a graph; the function itself where it cannot be captured, and one line says why."""
    try:
        return Captured(function, inputs, graphs)
    except RuntimeError as error:  # what waits for the GPU in a capture, say; an error of the GPU comes again
        if "out of memory" in str(error):
            raise
        log.warning("work that a CUDA graph cannot hold is launched as ever (%s)", one_line(str(error), 200))
        return function


def use_graphs(model: nn.Module, graphs: Graphs) -> None:
    """Let a text encoder write with graphs."""
    vars(model)["graphs"] = graphs


def graphs_of(model: nn.Module) -> Graphs | None:
    """What `use_graphs` gave a model."""
    return vars(model).get("graphs")
