"""The architecture of a loose file, inferred from its shapes, as the config that a published folder would have.

What shapes cannot show is assumed to be as published; `ASSUMED` tells the user so.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from zimage.errors import CheckpointError
from zimage.formats.stored import Stored
from zimage.loading.registry import DIT, TEXT_ENCODER, VAE

HEAD_DIM = 128  # of the published DiT: the only one whose split over the axes is known
ASSUMED = {
    DIT: "DiT from a loose file: RoPE θ 256 over axes of 32, 48 and 48, ε 1e-5, time scale 1000 are assumed",
    TEXT_ENCODER: "text encoder from a loose file: RoPE θ 1,000,000 and ε 1e-6 are assumed",
    VAE: "VAE from a loose file: 32 groups, scaling 0.3611 and shift 0.1159 are assumed",
}

Shape = Callable[[str], tuple[int, ...]]


def architecture(component: str, file: Path, entries: Mapping[str, Stored]) -> dict[str, object]:
    """The config of "dit", "text_encoder" or "vae" with these canonical keys. Raises CheckpointError."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in entries or len(entries[key].shape) not in (1, 2, 4):
            raise CheckpointError(f"{file}: {key}, which shows the architecture, is missing or has the wrong shape")
        return entries[key].shape

    try:
        return {DIT: _dit, TEXT_ENCODER: _text_encoder, VAE: _vae}[component](file, shape, entries)
    except (IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file}: the shapes of its tensors fit no known architecture ({error})") from error


def _dit(file: Path, shape: Shape, keys: Mapping[str, Stored]) -> dict[str, object]:
    dim, head_dim = shape("x_pad_token")[1], shape("layers.0.attention.norm_q.weight")[0]
    if head_dim != HEAD_DIM:
        raise CheckpointError(
            f"{file}: heads of size {head_dim}; a loose file does not say how such a head is split over "
            f"rows and columns ({HEAD_DIM} is known): use a folder with its config.json"
        )
    return {
        "_class_name": "ZImageTransformer2DModel",
        "dim": dim,
        "n_layers": _count(keys, r"layers\.(\d+)\."),
        "n_refiner_layers": _count(keys, r"noise_refiner\.(\d+)\."),
        "n_heads": dim // head_dim,
        "n_kv_heads": dim // head_dim,
        "in_channels": shape("all_x_embedder.2-1.weight")[1] // 4,
        "cap_feat_dim": shape("cap_embedder.0.weight")[0],
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "norm_eps": 1e-5,
        "t_scale": 1000.0,
    }


def _text_encoder(file: Path, shape: Shape, keys: Mapping[str, Stored]) -> dict[str, object]:
    vocab, hidden = shape("model.embed_tokens.weight")
    head_dim = shape("model.layers.0.self_attn.q_norm.weight")[0]
    return {
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": shape("model.layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": _count(keys, r"model\.layers\.(\d+)\."),
        "num_attention_heads": shape("model.layers.0.self_attn.q_proj.weight")[0] // head_dim,
        "num_key_value_heads": shape("model.layers.0.self_attn.k_proj.weight")[0] // head_dim,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
    }


def _vae(file: Path, shape: Shape, keys: Mapping[str, Stored]) -> dict[str, object]:
    if "decoder.mid_block.resnets.0.norm1.gamma" in keys:
        raise CheckpointError(f"{file}: a Wan VAE without its latents' mean and deviation; use a folder")
    levels = _count(keys, r"decoder\.up_blocks\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)],
        "layers_per_block": _count(keys, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "norm_num_groups": 32,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }


def _count(keys: Mapping[str, Stored], pattern: str) -> int:
    """Blocks of a kind: one more than the highest index, which a damaged key must not make enormous."""
    found = {int(match[1]) for match in (re.match(pattern, key) for key in keys) if match and len(match[1]) < 4}
    return max(found, default=-1) + 1
