"""Streams that run nothing until they are waited for, so that whatever nobody waits for shows as old values.

`LateCuda` stands where `torch.cuda` does. Copies inside `cuda.stream(…)` are queued there, on CPU tensors; kernels are
queued by a test on `cuda.main`.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LateCuda(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.main, self.active = self.Stream(), None

    class Event:
        def __init__(self):
            self.stream, self.position = None, 0

        def record(self, stream):
            self.stream, self.position = stream, len(stream.work)

        def synchronize(self):
            if self.stream:
                self.stream.run(self.position)

    class Stream:
        def __init__(self, device=None):
            self.work, self.done, self.waits = [], 0, 0

        def wait_event(self, event):
            self.work.append(("wait", event.stream, event.position))

        def wait_stream(self, stream):
            self.work.append(("wait", stream, len(stream.work)))

        def run(self, until=None):
            """Do the work up to `until`; a wait first runs the other stream as far as it says."""
            until = len(self.work) if until is None else until
            while self.done < until:
                kind, *item = self.work[self.done]
                self.done += 1
                if kind != "wait":
                    item[0]()
                elif item[0] is not None and item[0] is not self:
                    item[0].run(item[1])

        def synchronize(self):
            self.waits += 1
            self.run()

    def current_stream(self, device):
        return self.active or self.main

    @contextmanager
    def stream(self, stream):
        before, self.active = self.active, stream
        yield
        self.active = before

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self.active is None or op is not torch.ops.aten.copy_.default:
            return op(*args, **(kwargs or {}))
        self.active.work.append(("copy", lambda: op(*args, **(kwargs or {}))))
        return args[0]
