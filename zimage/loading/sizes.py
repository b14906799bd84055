"""Bytes of a component's weights in the form in which they are loaded, as the planner needs them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import nn

from zimage.dit.control import ControlNet
from zimage.dit.model import ZImageDiT, ZImageDiTConfig
from zimage.loading.allocator import LARGE, reserved_bytes
from zimage.loading.plan import Workload
from zimage.loading.streaming import buffer_bytes
from zimage.loading.work import CPU, graph_bytes, int8_bytes
from zimage.nn.quant import quantisable
from zimage.text.qwen3 import Qwen3, Qwen3Config
from zimage.text.qwen3_vl import Qwen3VL

# ------------------------------------------------------------------ weights


class BlockBytes(NamedTuple):
    """The bytes of a block that is streamed instead of loaded."""

    loaded: int  # its weights as they are used
    stored: int  # those that are cast, as they lie in the file
    resident: int  # what they take where they stay


class Sized(Protocol):
    """A component of a model, opened but not loaded."""

    @property
    def skeleton(self) -> nn.Module: ...
    @property
    def is_packed(self) -> bool: ...
    def weight_sizes(
        self, dtype: torch.dtype, widen_late: bool = False, device: torch.device = CPU
    ) -> Mapping[str, int]: ...
    def stored_bytes(self) -> int: ...
    def reads(self) -> Iterator[nn.Parameter]: ...
    def late_weights(self, model: nn.Module) -> set[str]: ...
    def work_bytes(self, work: Workload, dtype: torch.dtype, device: torch.device = CPU) -> int: ...
    def can_be_view(self, name: str) -> bool: ...
    def view_bytes(self, name: str, dtype: torch.dtype, widen_late: bool) -> int: ...
    def block_bytes(self, names: list[str], dtype: torch.dtype, widen_late: bool) -> BlockBytes: ...


@dataclass(frozen=True)
class ComponentSizes:
    """One component's bytes in the form in which it is loaded, as the planner needs them.

    `resident`: the weights that a render brings into memory. `copied`: those that are not views of a file, whose pages
    count as free. `unread`: those that stay on disk while it encodes and are read when it writes. `scratch`: what
    products widen, repack or decode at a time. `merging`: what a LoRA's matrices need while they are merged.
    """

    component: Sized
    device: torch.device
    dtype: torch.dtype
    precision: str
    widen_late: bool
    weights: int
    resident: int
    copied: int
    unread: int
    blocks: tuple[BlockBytes, ...]
    scratch: int
    merging: int
    captured: bool = False  # as CUDA graphs

    def work(self, work: Workload) -> int:
        """What a stage needs besides weights."""
        needed = self.component.work_bytes(work, self.dtype, self.device) + self.scratch
        model = self.component.skeleton
        if self.device.type == "cuda" and self.precision == "int8" and isinstance(model, ZImageDiT):
            needed += int8_bytes(model.config, work, self.device)
        return needed

    def graphs(self, work: Workload) -> int:
        """What the CUDA graphs of a loaded component keep."""
        config = getattr(self.component.skeleton, "config", None)
        if not self.captured or not isinstance(config, Qwen3Config | ZImageDiTConfig):
            return 0
        return graph_bytes(config, work, self.dtype)

    @property
    def merges(self) -> bool:
        """Whether LoRAs are merged into the weights that stay in memory."""
        return self.precision == "bf16" and not self.component.is_packed and not self.widen_late


def measure(
    component: Sized,
    device: torch.device,
    dtype: torch.dtype,
    late: bool = False,
    precision: str = "bf16",
    graphs: bool = False,
) -> ComponentSizes:
    """The sizes of a component on `device`; `precision` "bf16" leaves its products as they are.

    `late`: its matrices stay as stored, and are widened when used. `graphs`: whether CUDA graphs are captured.
    """
    sizes = _tensor_sizes(component, dtype, late, precision, device)
    if device.type == "cuda":
        found = _on_gpu(component, sizes, dtype, late)
    elif device.type == "cpu":
        found = _on_cpu(component, sizes, dtype, late, precision)
    else:
        weights = sum(map(sum, sizes.values()))
        found = Bytes(weights, weights, copied=weights)
    captured = graphs and device.type == "cuda"
    return ComponentSizes(component, device, dtype, precision, late, **found._asdict(), captured=captured)


class Bytes(NamedTuple):
    """The fields of ComponentSizes that depend on the device."""

    weights: int
    resident: int
    copied: int
    unread: int = 0
    blocks: tuple[BlockBytes, ...] = ()
    scratch: int = 0
    merging: int = 0


def _tensor_sizes(
    component: Sized, dtype: torch.dtype, late: bool, precision: str, device: torch.device = CPU
) -> dict[str, tuple[int, ...]]:
    """Name → bytes of the tensors that a weight consists of once loaded: codes and scales of quantised ones."""
    sizes: dict[str, tuple[int, ...]] = {n: (size,) for n, size in component.weight_sizes(dtype, late, device).items()}
    if precision != "bf16":
        names = {id(weight): name for name, weight in component.skeleton.named_parameters()}
        for _, _, linear in quantisable(component.skeleton, precision):
            assert isinstance(linear, nn.Linear)  # nothing is packed on meta
            sizes[names[id(linear.weight)]] = (linear.weight.numel(), 4 * linear.out_features)
    return sizes


# ------------------------------------------------------------------ on a GPU


def _on_gpu(component: Sized, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, late: bool) -> Bytes:
    """In the allocator's units, without the weights that are left on the host until something reads them."""
    left = set[str]() if late else component.late_weights(component.skeleton)
    everything, loaded = sizes.values(), [parts for name, parts in sizes.items() if name not in left]
    resident, largest = reserved_bytes(chain.from_iterable(loaded)), _largest_matrix(component.skeleton)
    return Bytes(
        weights=sum(map(sum, everything)),
        resident=resident,
        copied=sum(map(sum, loaded)),
        unread=reserved_bytes(chain.from_iterable(everything)) - resident,
        blocks=tuple(_gpu_blocks(component, sizes)),
        scratch=largest * dtype.itemsize if component.is_packed or late else 0,  # a matrix, widened
        merging=largest * (3 * 4 + 2 * dtype.itemsize),  # in fp32 the weight, its sum and its change; old and new
    )


def _gpu_blocks(component: Sized, sizes: Mapping[str, tuple[int, ...]]) -> Iterator[BlockBytes]:
    for names in _block_names(component):
        parts = [part for name in names if component.can_be_view(name) for part in sizes[name]]
        own = sum(reserved_bytes([part]) if part >= LARGE else part for part in parts)
        yield BlockBytes(buffer_bytes(parts), 0, own)


# ------------------------------------------------------------------ on a CPU


def _on_cpu(
    component: Sized, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, late: bool, precision: str
) -> Bytes:
    """Views of the file wherever the dtype agrees; matrices are quantised one by one, from pages or a cast copy."""
    weights, unread = sum(map(sum, sizes.values())), _unread_bytes(component, dtype, late)
    return Bytes(
        weights,
        resident=weights - unread,
        copied=0 if _is_viewed(component, dtype, late) else weights,
        unread=unread,
        blocks=tuple(_block_sizes(component, dtype, late)) if precision == "bf16" else (),
        scratch=_repacked_bytes(component.skeleton, dtype),
    )


def _unread_bytes(component: Sized, dtype: torch.dtype, late: bool) -> int:
    """Bytes of the weights that stay on disk on a CPU: views of the file that no render reads."""
    read = {id(weight) for weight in component.reads()}
    names = [name for name, weight in component.skeleton.named_parameters() if id(weight) not in read]
    return sum(component.view_bytes(name, dtype, late) for name in names)


def _is_viewed(component: Sized, dtype: torch.dtype, late: bool) -> bool:
    """Whether most of the weights, once loaded on a CPU, are views of the file."""
    names = [name for name, _ in component.skeleton.named_parameters()]
    return 2 * sum(component.view_bytes(name, dtype, late) > 0 for name in names) > len(names)


def _block_sizes(component: Sized, dtype: torch.dtype, late: bool) -> Iterator[BlockBytes]:
    for names in _block_names(component):
        yield component.block_bytes(names, dtype, late)


def _block_names(component: Sized) -> Iterator[list[str]]:
    """The weights of each block that can be streamed, in the order of `blocks()`; none of one that no render runs."""
    blocks = getattr(component.skeleton, "blocks", None)
    read = {id(weight) for weight in component.reads()}
    names = {id(w): name for name, w in component.skeleton.named_parameters() if id(w) in read}
    for _, weights in blocks() if blocks else ():
        yield [names[id(w)] for w in weights if id(w) in names]


def _repacked_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Half-precision products on a CPU repack a matrix each time; convolutions do not."""
    half = dtype == torch.bfloat16 and isinstance(model, Qwen3 | Qwen3VL | ZImageDiT | ControlNet)
    return _largest_matrix(model) * 2 if half else 0


@cache
def _largest_matrix(model: nn.Module) -> int:
    return max((m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)), default=0)


def window_bytes(on_cpu: bool, blocks: list[BlockBytes]) -> int:
    """Bytes of the running block and the next one; a block that is cast is read ahead as it is stored."""
    loaded = max(block.loaded for block in blocks)
    if not on_cpu:
        return reserved_bytes([loaded, loaded])
    if len(blocks) == 1:
        return loaded + blocks[0].stored
    return loaded + max(block.stored or block.loaded for block in blocks)
