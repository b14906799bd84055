"""Bytes of the work of each stage besides weights, and the order in which a stage reads these.

The models know nothing of bytes. What a stage needs follows from a config and a workload; the factors were measured on
the models themselves, and tests compare them with the peaks of real runs.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from zimage.dit.control import ControlNetConfig
from zimage.dit.model import ZImageDiTConfig
from zimage.dit.patch import padded_length
from zimage.dit.replay import most_tokens
from zimage.kernels import backend
from zimage.kernels.scaled_product import LEAST_CAPABILITY
from zimage.loading.plan import Workload
from zimage.settings.declared import BLEND_TILE, SIZE_MULTIPLE
from zimage.text.qwen3 import Qwen3, Qwen3Config
from zimage.text.qwen3_vl import Qwen3VL, Qwen3VLConfig
from zimage.text.replay import window_of
from zimage.vae.kl import AutoencoderKLConfig
from zimage.vae.walk import runs_kernels, strip_values
from zimage.vae.wan import AutoencoderKLWanConfig

CPU = torch.device("cpu")
# Bytes of an int8 product's sums for each value of the widest map, where no kernel scales them at the product's end:
# 598 MB were measured where 412 were counted. With the kernel, and in fp8, quantised inputs take less than plain ones.
INT8_SUMS = 4.5
# What the vision tower's maps take on a CPU over their bytes: they are of six sizes, and freed ones fit few others. Of
# towers of 256 to 1024 channels and 2116 to 8464 patches, in fp32 and bf16, 1.9 to 2.1 were measured.
VISION_SPREAD = 2
# Values per pixel of the picture that all ranks have in the end: its parts as they arrive, and the whole of them.
PICTURES = 2 * 3


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
    table = tower.num_position_embeddings * tower.hidden_size * (4 + dtype.itemsize)
    token, features = tower.out_hidden_size * dtype.itemsize, len(tower.deepstack_visual_indexes)
    kept = work.vision_patches * features * token // tower.spatial_merge_size**2
    spread = VISION_SPREAD if device.type == "cpu" else 1
    seen = work.vision_patches and work.vision_patches * max(hidden, turned) * spread + kept + table
    read = work.vision_tokens * (_text_maps(config.text, dtype) + (1 + features) * token) if config.text else 0
    return max(seen, read)


def writing_bytes(config: Qwen3Config, tokens: int, dtype: torch.dtype) -> int:
    """What writing needs besides: keys and values of `tokens`, and logits with the filters' copies in fp32."""
    return tokens * _stored_bytes(config, dtype) + 24 * config.vocab_size


def _stored_bytes(config: Qwen3Config, dtype: torch.dtype) -> int:
    """One token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def dit_bytes(config: ZImageDiTConfig, work: Workload, dtype: torch.dtype, device: torch.device = CPU) -> int:
    """About the peak of one evaluation: the feed-forward's hidden maps and a few of width dim, for every token.

    With NAG one map more, where both attentions are in fp32 together. Of each ControlNet beside it, as `control_bytes`
    says.
    """
    maps = 8 + bool(work.nag_tokens)
    own = _dit_tokens(work) * (2 * _hidden(config) + maps * config.dim) * dtype.itemsize
    return own + work.control_streams * control_bytes(config, work, dtype)


def control_bytes(
    config: ControlNetConfig | ZImageDiTConfig, work: Workload, dtype: torch.dtype, device: torch.device = CPU
) -> int:
    """What a control adds to the peak of an evaluation: its tokens, all of them on every rank, and its stream.

    A hint comes and goes where less is held than within a block.
    """
    return (_dit_tokens(replace(work, ranks=1)) + _dit_tokens(work)) * config.dim * dtype.itemsize


def _dit_tokens(work: Workload) -> int:
    """Tokens of images and captions in one evaluation, as many as one of the ranks has."""
    captions = padded_length(work.tokens) + padded_length(work.nag_tokens)
    tokens = work.batch * (work.pixels // SIZE_MULTIPLE**2 + captions)
    return -(-tokens // work.ranks)


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
        rows = whole * work.width * work.tile_size + strips * work.pixels // work.ranks
        rows += PICTURES * work.pixels if work.ranks > 1 else 0
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
