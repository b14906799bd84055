"""Bytes of a component's weights in the form in which they are loaded, and of the work of each stage.

The models know nothing of bytes. What a stage needs besides weights follows from a config and a workload; the factors
were measured on the models themselves, and tests compare them with the peaks of real runs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import nn

from zimage.dit.control import ControlNet, ControlNetConfig
from zimage.dit.model import ZImageDiT, ZImageDiTConfig
from zimage.dit.patch import padded_length
from zimage.dit.replay import most_tokens
from zimage.kernels import backend
from zimage.kernels.scaled_product import LEAST_CAPABILITY
from zimage.loading.allocator import LARGE, reserved_bytes
from zimage.loading.plan import Workload
from zimage.loading.streaming import buffer_bytes
from zimage.nn.quant import quantisable
from zimage.settings.declared import BLEND_TILE, SIZE_MULTIPLE
from zimage.text.qwen3 import Qwen3, Qwen3Config
from zimage.text.qwen3_vl import Qwen3VL, Qwen3VLConfig
from zimage.text.replay import window_of
from zimage.vae.kl import AutoencoderKLConfig
from zimage.vae.tiling import runs_kernels, strip_values
from zimage.vae.wan import AutoencoderKLWanConfig

CPU = torch.device("cpu")
# Bytes of an int8 product's sums for each value of the widest map, where no kernel scales them at the product's end:
# 598 MB were measured where 412 were counted. With the kernel, and in fp8, quantised inputs take less than plain ones.
INT8_SUMS = 4.5

# What the tower takes on a CPU over what lives at its peak: its features lie between maps of other sizes, so that freed
# memory is in pieces too small for the next map. 1.5 to 2.2 were measured, from 2,500 to 8,500 patches.
KEPT_IN_PIECES = 1.9


# ------------------------------------------------------------------ the work of a stage


def text_encoder_bytes(config: Qwen3Config, work: Workload, dtype: torch.dtype, device: torch.device = CPU) -> int:
    """About the peak of one layer on the longest text, with pictures or without, and what writing needs."""
    read = max(work.tokens, work.vision_tokens) * _text_maps(config, dtype)
    return read + (writing_bytes(config, work.stored_tokens, dtype) if work.stored_tokens else 0)


def _text_maps(config: Qwen3Config, dtype: torch.dtype) -> int:
    """For each token: the feed-forward's hidden maps, q, k and v in fp32 and a few of the stack's width."""
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return (2 * config.intermediate_size + 6 * config.hidden_size) * dtype.itemsize + 4 * heads


def vision_bytes(config: Qwen3VLConfig, work: Workload, dtype: torch.dtype, device: torch.device = CPU) -> int:
    """About the peak of one layer of the tower, or of the text stack if it has one, with what was seen so far."""
    tower = config.vision
    hidden = (2 * tower.intermediate_size + 3 * tower.hidden_size) * dtype.itemsize
    turned = (6 * dtype.itemsize + 11) * tower.hidden_size  # q and k are rotated in fp32
    token, features = tower.out_hidden_size * dtype.itemsize, len(tower.deepstack_visual_indexes)
    seen = work.vision_patches * (max(hidden, turned) + features * token // tower.spatial_merge_size**2)
    seen = int(seen * (KEPT_IN_PIECES if device.type == "cpu" else 1))
    read = work.vision_tokens * (_text_maps(config.text, dtype) + (1 + features) * token) if config.text else 0
    return max(seen, read)


def writing_bytes(config: Qwen3Config, tokens: int, dtype: torch.dtype) -> int:
    """What writing needs besides: keys and values of `tokens`, and logits with the filters' copies in fp32."""
    return tokens * _stored_bytes(config, dtype) + 24 * config.vocab_size


def _stored_bytes(config: Qwen3Config, dtype: torch.dtype) -> int:
    """One token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def dit_bytes(config: ZImageDiTConfig, work: Workload, dtype: torch.dtype, device: torch.device = CPU) -> int:
    """About the peak of one evaluation: the feed-forward's hidden maps and a few of width dim, for every image.

    Of each ControlNet beside it, as `control_bytes` says.
    """
    own = _dit_tokens(work) * (2 * _hidden(config) + 8 * config.dim) * dtype.itemsize
    return own + work.control_streams * control_bytes(config, work, dtype)


def control_bytes(
    config: ControlNetConfig | ZImageDiTConfig, work: Workload, dtype: torch.dtype, device: torch.device = CPU
) -> int:
    """What a control adds to the peak of an evaluation: its tokens, and the stream that they become.

    A hint comes and goes where less is held than within a block.
    """
    return _dit_tokens(work) * 2 * config.dim * dtype.itemsize


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


def int8_bytes(config: ZImageDiTConfig, work: Workload, device: torch.device) -> int:
    """What int8 products need besides on a GPU: sums in int32 that are scaled by passes of their own."""
    old = torch.cuda.is_available() and backend.capability(device) < LEAST_CAPABILITY[torch.int8]
    return int(_dit_tokens(work) * _hidden(config) * INT8_SUMS) if old or not backend.ACTIVE else 0


def _hidden(config: ZImageDiTConfig) -> int:
    return int(config.dim / 3 * 8)


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


def vision_reads(model: nn.Module) -> Iterator[nn.Parameter]:
    """What looking reads, and then encoding with the model's own text stack, as with any."""
    assert isinstance(model, Qwen3VL)
    yield from model.model.visual.parameters()
    if model.text is not None:
        yield from text_encoder_reads(model.text)


BLOCKS = ("noise_refiner.", "layers.", "control_noise_refiner.", "control_layers.")


def dit_reads(dit: nn.Module) -> Iterator[nn.Parameter]:
    """What denoising reads of a DiT or a ControlNet, in its order: `modulate` comes before the blocks."""
    blocks = []
    for name, weight in dit.named_parameters():
        if name.startswith(BLOCKS) and "adaLN" not in name:
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
