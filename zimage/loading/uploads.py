"""Weights on their way from a mapped file to a GPU.

    file ─ read ahead by a thread ─→ page cache ─ host ─→ page-locked ─ GPU ─→ as stored ─ GPU, cast ─→ weight

Two page-locked buffers take turns: while the GPU copies out of one, the host fills the other, and waits only if that
is not empty yet. Copies and casts are queued on a stream of their own, which waits for the current one before it
writes into memory that kernels may still be using; the current stream waits for it before the weight is used.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from zimage.formats.pages import forget_pages
from zimage.loading.allocator import MIB
from zimage.loading.memory import page_locked
from zimage.loading.streaming import Runtime
from zimage.nn.packed import Packed

STAGED = 64 * MIB  # bytes at a time: a power of two, as page-locked memory is taken


class Uploads:
    """Brings tensors of mapped files to one GPU; `lock` makes page-locked buffers."""

    def __init__(
        self, device: torch.device, runtime: Runtime = torch.cuda, lock: Callable[[int], Tensor] = page_locked
    ):
        self.device, self.runtime = device, runtime
        self.stream = runtime.Stream(device)
        self._buffers = [(lock(STAGED), runtime.Event()) for _ in range(2)]
        self._landing = torch.empty(STAGED, dtype=torch.uint8, device=device)  # of what is cast

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous copy as `dtype` on the GPU, ready for the current stream."""
        placed = torch.empty(tensor.shape, dtype=dtype, device=self.device)
        current = self.runtime.current_stream(self.device)
        self.stream.wait_stream(current)
        target, step = placed.flatten(), STAGED // tensor.dtype.itemsize
        try:
            for part, piece in zip(target.split(step), tensor.contiguous().flatten().split(step), strict=True):
                self._send(piece, part)
        finally:
            current.wait_stream(self.stream)
        return placed

    def packed(self, matrix: Packed) -> Packed:
        """The same matrix on the GPU; the file's pages are let go."""
        tensors = {name: value for name, value in vars(matrix).items() if isinstance(value, Tensor)}
        placed = {name: self(tensor, tensor.dtype) for name, tensor in tensors.items()}
        for tensor in tensors.values():
            forget_pages(tensor)
        return dataclasses.replace(matrix, **placed)

    def _send(self, piece: Tensor, part: Tensor) -> None:
        """Queue one piece, at most a buffer, for `part` of a weight."""
        buffer, empty = self._buffers[0]
        self._buffers.reverse()
        empty.synchronize()
        host = buffer[: piece.nbytes].view(piece.dtype)
        host.copy_(piece)
        with self.runtime.stream(self.stream):
            landed = part if part.dtype == piece.dtype else self._landing[: piece.nbytes].view(piece.dtype)
            landed.copy_(host, non_blocking=True)
            empty.record(self.stream)
            if landed is not part:
                part.copy_(landed)
