"""Bytes of a component's weights in the form in which they are loaded, and of the work of each stage.

The models know nothing of bytes. What a stage needs besides weights follows from a config and a workload; the factors
were measured on the models themselves, and tests compare them with the peaks of real runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import nn

from zimage.dit.model import ZImageDiT, ZImageDiTConfig, padded_length
from zimage.dit.replay import most_tokens
from zimage.loading.plan import Workload
from zimage.nn.quant import quantised_bytes
from zimage.settings.declared import BLEND_TILE, SIZE_MULTIPLE
from zimage.text.qwen3 import Qwen3, Qwen3Config
from zimage.text.replay import window_of
from zimage.vae.kl import AutoencoderKLConfig
from zimage.vae.tiling import runs_kernels, strip_values
from zimage.vae.wan import AutoencoderKLWanConfig

CPU = torch.device("cpu")


# ------------------------------------------------------------------ the work of a stage


def text_encoder_bytes(config: Qwen3Config, work: Workload, dtype: torch.dtype) -> int:
    """About the peak of one layer: the feed-forward's hidden maps, q, k and v in fp32 and a few of its width."""
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    maps = (2 * config.intermediate_size + 6 * config.hidden_size) * dtype.itemsize + 4 * heads
    return work.tokens * maps + (writing_bytes(config, work.stored_tokens, dtype) if work.stored_tokens else 0)


def writing_bytes(config: Qwen3Config, tokens: int, dtype: torch.dtype) -> int:
    """What writing needs besides: keys and values of `tokens`, and logits with the filters' copies in fp32."""
    return tokens * _stored_bytes(config, dtype) + 24 * config.vocab_size


def _stored_bytes(config: Qwen3Config, dtype: torch.dtype) -> int:
    """One token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def dit_bytes(config: ZImageDiTConfig, work: Workload, dtype: torch.dtype) -> int:
    """About the peak of one evaluation: the feed-forward's hidden maps and a few of width dim, for every image."""
    return _dit_tokens(work) * (2 * int(config.dim / 3 * 8) + 8 * config.dim) * dtype.itemsize


def _dit_tokens(work: Workload) -> int:
    """Tokens of images and captions in one evaluation."""
    return work.batch * (work.pixels // SIZE_MULTIPLE**2 + padded_length(work.tokens))


def graph_bytes(config: Qwen3Config | ZImageDiTConfig, work: Workload, dtype: torch.dtype) -> int:
    """What CUDA graphs hold besides: their pool keeps an evaluation's maps, and a text is written in whole windows."""
    if isinstance(config, ZImageDiTConfig):
        share = min(1.0, most_tokens(config) / _dit_tokens(work))
        return int(share * dit_bytes(config, work, dtype))
    if not work.stored_tokens:
        return 0
    window = replace(work, tokens=1, stored_tokens=window_of(work.stored_tokens))
    return text_encoder_bytes(config, window, dtype) - work.stored_tokens * _stored_bytes(config, dtype)


def vae_bytes(
    config: AutoencoderKLConfig | AutoencoderKLWanConfig, work: Workload, dtype: torch.dtype, device: torch.device = CPU
) -> int:
    """About the peak of decoding one image, whole, in exact strips or in blended tiles as the workload says."""
    whole, strips = _map_widths(config, device)
    if work.tile_mode == "exact":
        rows = whole * work.width * work.tile_size + strips * work.pixels
        return min(rows * dtype.itemsize + _strip_bytes(dtype, device), whole * work.pixels * dtype.itemsize)
    if work.tile_mode == "blend":
        tile = min(work.pixels, (work.tile_size or BLEND_TILE) ** 2)
        return whole * tile * dtype.itemsize + 16 * work.pixels  # and the canvas
    return whole * work.pixels * dtype.itemsize


def _strip_bytes(dtype: torch.dtype, device: torch.device) -> int:
    """A few strips live at a time, in fp32 where references run."""
    return strip_values(device) * (3 * dtype.itemsize if runs_kernels(device) else 12 * 4)


def _map_widths(config: AutoencoderKLConfig | AutoencoderKLWanConfig, device: torch.device) -> tuple[int, int]:
    """Values per pixel at the peak of a whole decode, and of one in strips, which keeps two maps of full size."""
    if runs_kernels(device):  # counted by `pytest tests/cuda/test_vae.py -k peak`: 2.53 and 1.27, 4.04 and 2.10
        if isinstance(config, AutoencoderKLWanConfig):
            return int(4.2 * config.base_dim), int(2.2 * config.base_dim)
        return int(2.6 * config.block_out_channels[1]), int(1.3 * config.block_out_channels[1])
    if isinstance(config, AutoencoderKLWanConfig):
        return 12 * config.base_dim, 2 * config.base_dim  # measured: 6.3 in fp32; 11.7 in bf16, whose norms are fp32
    first, second = config.block_out_channels[:2]
    return 5 * second, first + second


# ------------------------------------------------------------------ the order in which weights are read


def text_encoder_reads(encoder: nn.Module) -> Iterator[nn.Parameter]:
    """What encoding reads, in its order: all layers but the last, and only rows of the embeddings."""
    assert isinstance(encoder, Qwen3)
    for layer in encoder.model.layers[:-1]:
        yield from layer.parameters()


def dit_reads(dit: nn.Module) -> Iterator[nn.Parameter]:
    """What denoising reads, in its order: `modulate` comes before the blocks."""
    blocks = []
    for name, weight in dit.named_parameters():
        if name.startswith(("noise_refiner.", "layers.")) and "adaLN" not in name:
            blocks.append(weight)
        else:
            yield weight
    yield from blocks


def vae_reads(vae: nn.Module) -> Iterator[nn.Parameter]:
    """What decoding reads, in its order."""
    return vae.get_submodule("decoder").parameters()


# ------------------------------------------------------------------ weights


class BlockBytes(NamedTuple):
    """The bytes of a block that is streamed instead of loaded."""

    loaded: int  # its weights as they are used
    stored: int  # those that are cast, as they lie in the file


class Sized(Protocol):
    """A component of a model, opened but not loaded."""

    @property
    def skeleton(self) -> nn.Module: ...
    @property
    def is_packed(self) -> bool: ...
    def weight_bytes(self, dtype: torch.dtype, widen_late: bool = False) -> int: ...
    def stored_bytes(self) -> int: ...
    def reads(self) -> Iterator[nn.Parameter]: ...
    def work_bytes(self, work: Workload, dtype: torch.dtype) -> int: ...
    def view_bytes(self, name: str, dtype: torch.dtype, widen_late: bool) -> int: ...
    def block_bytes(self, names: list[str], dtype: torch.dtype, widen_late: bool) -> BlockBytes: ...


@dataclass(frozen=True)
class ComponentSizes:
    """One component's bytes in the form in which it is loaded, as the planner needs them.

    `resident`: the weights that a render brings into memory. `copied`: those that are not views of a file, whose pages
    count as free. `unread`: those that stay on disk while it encodes and are read when it writes. `packed_work`: what
    half-precision products repack on a CPU.
    """

    component: Sized
    device: torch.device
    dtype: torch.dtype
    widen_late: bool
    weights: int
    resident: int
    copied: int
    unread: int
    blocks: tuple[BlockBytes, ...]
    packed_work: int

    def work(self, work: Workload) -> int:
        return self.component.work_bytes(work, self.dtype) + self.packed_work


def measure(
    component: Sized, device: torch.device, dtype: torch.dtype, widen_late: bool, precision: str, streams: bool
) -> ComponentSizes:
    """The sizes of a component on `device`; `precision` "bf16" leaves its products as they are.

    `streams`: whether its blocks can be loaded one by one there.
    """
    late, on_cpu, quantised = widen_late, device.type == "cpu", precision != "bf16"
    loaded = component.weight_bytes(dtype, late)
    unread = _unread_bytes(component, dtype, late) if on_cpu else 0
    viewed = on_cpu and _is_viewed(component, dtype, late)
    weights, resident = loaded, loaded - unread
    if quantised:  # made of the loaded weights: pages of the file, or copies that are there first
        weights = quantised_bytes(component.skeleton, precision, dtype)
        resident = weights if viewed else loaded
    streams = streams and not quantised and (on_cpu or not component.is_packed)  # packed matrices stay where they are
    return ComponentSizes(
        component,
        device,
        dtype,
        late,
        weights,
        resident,
        copied=0 if viewed else weights,
        unread=unread,
        blocks=tuple(_block_sizes(component, dtype, late)) if streams else (),
        packed_work=_packed_bytes(component.skeleton, device, dtype),
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
    """Bytes of each block that can be streamed, in the order of `blocks()`; 0 for one that no render runs."""
    blocks = getattr(component.skeleton, "blocks", None)
    read = {id(weight) for weight in component.reads()}
    names = {id(w): name for name, w in component.skeleton.named_parameters() if id(w) in read}
    for _, weights in blocks() if blocks else ():
        yield component.block_bytes([names[id(w)] for w in weights if id(w) in names], dtype, late)


def _packed_bytes(model: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """Half-precision products on a CPU repack a matrix each time; convolutions do not."""
    half = device.type == "cpu" and dtype == torch.bfloat16 and isinstance(model, Qwen3 | ZImageDiT)
    return _largest_matrix(model) * 2 if half else 0


@cache
def _largest_matrix(model: nn.Module) -> int:
    return max((m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)), default=0)
