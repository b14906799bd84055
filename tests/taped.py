"""Graphs without a GPU: what a capture did is kept as a tape of PyTorch's ops, and replayed op by op.

As a CUDA graph does, a replay repeats the recorded ops on the recorded memory with the recorded numbers; no line of
Python runs again. What a capture could not hold (a wait for the device, a result whose size depends on data, a copy
between devices) is a RuntimeError as there, and what a graph reads must not have changed elsewhere: weights that were
exchanged or written would not be noticed by a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
UNSAFE = {
    aten._local_scalar_dense.default: "waits for the device",
    aten.nonzero.default: "depends on data",
    aten.equal.default: "depends on data",
    aten.masked_select.default: "depends on data",
    aten._unique2.default: "depends on data",
}
RANDOM = ("bernoulli", "normal_", "uniform_", "exponential_", "multinomial", "randn")


class StaleMemory(AssertionError):
    """A graph reads what has changed since it was captured."""


class Tapes:
    """Stands in for `CudaGraphs`."""

    def __init__(self, device: object = None):
        self.tapes: list[Tape] = []

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        run()
        tape = Tape(run)
        with tape:
            output = run()
        output.fill_(float("nan"))  # a capture computes nothing
        self.tapes.append(tape)
        return tape.replay, output


class Tape(TorchDispatchMode):
    """The ops of one capture of `run`, whose arguments are what may change between replays."""

    def __init__(self, run: Callable[[], Tensor]):
        super().__init__()
        self.ops: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.inputs = {storage(x) for x in getattr(run, "args", ()) if isinstance(x, Tensor)}
        self.made: set[int] = set()  # storages that the capture allocated
        self.read: dict[int, Tensor] = {}  # what was there before, but the inputs
        self.states: dict[int, tuple[int, int]] = {}
        self.replays = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        self._check(op, given, kwargs)
        for x in given:
            if storage(x) not in self.made | self.inputs:
                self.read[id(x)] = x
        out = op(*args, **kwargs)
        results = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        self.made |= {storage(x) for x in results} - {storage(x) for x in given}
        self.ops.append((op, args, kwargs, results))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        self.states = self._states()

    def replay(self) -> None:
        stale = [tuple(self.read[key].shape) for key, state in self._states().items() if state != self.states[key]]
        if stale:
            raise StaleMemory(f"tensors of shapes {stale} changed since the capture")
        for op, args, kwargs, results in self.ops:
            again = [x for x in tree_iter(op(*args, **kwargs)) if isinstance(x, Tensor)]
            for ours, new in zip(results, again, strict=True):
                if storage(ours) != storage(new):
                    ours.copy_(new)
        self.replays += 1
        self.states = self._states()  # what the graph itself has written may differ

    def _check(self, op, given: list[Tensor], kwargs: dict) -> None:
        masked = op._schema.name.startswith("aten::index") and any(x.dtype == torch.bool for x in given[1:])
        if op in UNSAFE or masked:
            why = UNSAFE.get(op, "depends on data")
            raise RuntimeError(f"operation not permitted when stream is capturing: {op} {why}")
        if any(name in str(op) for name in RANDOM):
            raise RuntimeError(f"{op} in a graph draws the same numbers at every replay")
        devices = {x.device for x in given if x.ndim} | {torch.device(kwargs.get("device") or "cpu")}
        if len(devices) > 1:
            raise RuntimeError(f"operation not permitted when stream is capturing: {op} copies between {devices}")

    def _states(self) -> dict[int, tuple[int, int]]:
        return {key: (x._version, x.data_ptr()) for key, x in self.read.items()}


def storage(x: Tensor) -> int:
    """Tells memory apart."""
    return x.untyped_storage()._cdata
