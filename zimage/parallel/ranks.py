"""A group of processes that compute one picture together, and how tensors and plain values travel between them.

Everything here moves bits and never adds two of them, so what a rank receives depends neither on timing nor on the
order of arrival. A call that moves something is made by all ranks of the group, in the same order.

Tensors travel as bytes: every dtype does, also those that a backend has no word for. Those on a GPU go through NCCL,
those in a CPU's memory through gloo, as `joined` sets it up.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from zimage.errors import RanksParted, one_line

TIMEOUT = 600.0  # seconds that a rank waits for the others before it fails


class Ranks:
    """This process among the `size` of its group, and what it has sent.

    `sent` counts the bytes that this rank gave to others, by kind of traffic; what stays on the rank is not counted.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        """Of a group of torch.distributed; of all processes, if none is passed."""
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent: Counter[str] = Counter()

    def exchange(self, kind: str, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Give each rank its part, and get one of each: parts[r] goes to rank r, which sends one of shapes[r].

        There may be as many for every rank, one after the other: those of rank 0 first. All have one dtype and lie on
        one device; shapes may be uneven, and empty where there is nothing to send.
        """
        sizes, wanted = [part.numel() for part in parts], [torch.Size(shape).numel() for shape in shapes]
        outgoing = parts[0].new_empty(sum(sizes))
        for place, part in zip(outgoing.split(sizes), parts, strict=True):
            place.view(part.shape).copy_(part)
        incoming = outgoing.new_empty(sum(wanted))
        given, got = (self._by_rank(counts, outgoing.element_size()) for counts in (sizes, wanted))
        with _talking():
            dist.all_to_all_single(incoming.view(torch.uint8), outgoing.view(torch.uint8), got, given, group=self.group)
        self.sent[kind] += sum(given) - given[self.rank]
        return [place.view(tuple(shape)) for place, shape in zip(incoming.split(wanted), shapes, strict=True)]

    def _by_rank(self, counts: Sequence[int], width: int) -> list[int]:
        """The bytes of each rank's parts, of so many elements each."""
        each = len(counts) // self.size
        return [width * sum(counts[rank * each : (rank + 1) * each]) for rank in range(self.size)]

    def all_gather(self, kind: str, part: Tensor, lengths: Sequence[int], dim: int = 1) -> Tensor:
        """The parts of all ranks in their order, joined along `dim`, where that of rank r is lengths[r] long."""
        shape = list(part.shape)
        shapes = [[*shape[:dim], length, *shape[dim + 1 :]] for length in lengths]
        return torch.cat(self.exchange(kind, [part] * self.size, shapes), dim=dim)

    def broadcast(self, kind: str, tensor: Tensor, source: int = 0) -> Tensor:
        """Rank `source`'s tensor, written into that of every other rank, which is contiguous and as large."""
        with _talking():
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=self.group, group_src=source)
        if self.rank == source:
            self.sent[kind] += tensor.numel() * tensor.element_size() * (self.size - 1)
        return tensor

    def share(
        self, kind: str, values: Any = None, tensors: Mapping[str, Tensor] | None = None, source: int = 0
    ) -> tuple[Any, dict[str, Tensor]]:
        """Rank `source`'s plain values and tensors, on every rank; tensors arrive in a CPU's memory.

        Values are what JSON can say. What the other ranks pass is not read.
        """
        message = torch.empty(0, dtype=torch.uint8)
        if self.rank == source:
            message = _packed(values, tensors or {})
        length = self.broadcast(kind, torch.tensor([len(message)]), source)
        if self.rank != source:
            message = torch.empty(int(length), dtype=torch.uint8)
        return _unpacked(self.broadcast(kind, message, source))

    def halves(self) -> tuple["Ranks", int]:
        """The half of the ranks that this one belongs to, and which it is: the first (0) or the second (1).

        Every process must call it, since torch.distributed has all of them know of each group.
        """
        members = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        middle = self.size // 2
        groups = [dist.new_group(half) for half in (members[:middle], members[middle:])]
        which = int(self.rank >= middle)
        return Ranks(groups[which]), which


def _packed(values: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """Plain values and tensors as bytes, in the format of safetensors files, which holds no code."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    whole[_VALUES] = _bytes(json.dumps(values).encode())
    return _bytes(safetensors.torch.save(whole))


def _unpacked(message: Tensor) -> tuple[Any, dict[str, Tensor]]:
    tensors = safetensors.torch.load(message.numpy().tobytes())
    return json.loads(tensors.pop(_VALUES).numpy().tobytes()), tensors


_VALUES = " values"  # a name that no tensor of ours has


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@contextmanager
def _talking() -> Iterator[None]:
    """Raises RanksParted where a rank that should have a part in a call has gone."""
    try:
        yield
    except RuntimeError as error:
        raise RanksParted(f"another rank has ended, and with it all of them ({one_line(str(error), 200)})") from error


@contextmanager
def joined(
    device: torch.device, timeout: float = TIMEOUT, init_method: str = "env://", rank: int = -1, size: int = -1
) -> Iterator[Ranks]:
    """The ranks that torchrun started, or those that meet at `init_method`, for as long as the block runs.

    On a GPU there are two backends, NCCL for its tensors and gloo for those in a CPU's memory; otherwise gloo alone.
    """
    if init_method == "env://":
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with _talking():
        dist.init_process_group(backend, init_method, timedelta(seconds=timeout), rank=rank, world_size=size)
    yield Ranks()
    dist.destroy_process_group()  # not after an error, when it might wait for ranks that wait for this one
