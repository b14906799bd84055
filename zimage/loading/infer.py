"""The architecture of a loose file, inferred from its shapes, as the config that a published folder would have.

What shapes cannot show is assumed to be as published; `ASSUMED` tells the user so.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from zimage.errors import CheckpointError
from zimage.formats.stored import Maps, Stored
from zimage.loading.registry import CONTROL, DIT, TEXT_ENCODER, VAE, VISION
from zimage.nn.packed import is_packed
from zimage.text.qwen3_vl import TEXT

NORM_GROUPS = 32
CONTROLLED = 30  # layers of the published DiT, over which the published ControlNets are spread evenly
CONTROL_COUNTS = (3, 6, 15)  # lite, 1.0, 2.0 and 2.1
ROWS = 64  # of a matrix, read at a time
HEAD_DIM = 128  # of the published DiT: the only one whose split over the axes is known
ASSUMED = {
    DIT: "DiT from a loose file: RoPE θ 256 over axes of 32, 48 and 48, ε 1e-5, time scale 1000 are assumed",
    TEXT_ENCODER: "text encoder from a loose file: RoPE θ 1,000,000 and ε 1e-6 are assumed",
    VISION: "vision model from a loose file: heads, the layers of deepstack, RoPE θ 10,000 and 5,000,000 and ε 1e-6 as "
    "published are assumed",
    CONTROL: "ControlNet from a loose file: places spread evenly over 30 layers and ε 1e-5 are assumed",
    VAE: "VAE from a loose file: 32 groups, scaling 0.3611 and shift 0.1159 are assumed",
}

VISION_HEADS = 16  # of every published tower
DEEPSTACK = {24: [5, 11, 17], 27: [8, 16, 24]}  # depth of a published tower → the layers of its features
LATENT_PATCH = 4  # values of a latent channel in a patch


class Shapes:
    """The shapes of a file's tensors, each checked before a number is taken from it. Raises CheckpointError."""

    def __init__(self, file: Path, entries: Mapping[str, Stored]):
        self.file, self.entries = file, entries

    def side(self, key: str, axis: int, axes: int, multiple: int = 1) -> int:
        """A side of the tensor `key`, which has this many axes, none of them 0: a multiple of some number."""
        if key not in self.entries:
            raise CheckpointError(f"{self.file}: {key}, which shows the architecture, is missing")
        shape = self.entries[key].shape
        if len(shape) != axes or 0 in shape:
            raise CheckpointError(
                f"{self.file}: {key} has the shape {list(shape)}; it should have {axes} sides, none 0"
            )
        if shape[axis] % multiple:
            told = f"{key} has the shape {list(shape)}; {shape[axis]} should be a multiple of {multiple}"
            raise CheckpointError(f"{self.file}: {told}")
        return shape[axis]


def architecture(component: str, file: Path, entries: Mapping[str, Stored]) -> dict[str, object]:
    """The config of a component with these canonical keys. Raises CheckpointError."""
    known = {DIT: _dit, TEXT_ENCODER: _text_encoder, VAE: _vae, VISION: _vision, CONTROL: _control}
    return known[component](Shapes(file, entries))


def _dit(shapes: Shapes) -> dict[str, object]:
    head_dim = shapes.side("layers.0.attention.norm_q.weight", 0, axes=1)
    if head_dim != HEAD_DIM:
        raise CheckpointError(
            f"{shapes.file}: heads of size {head_dim}; a loose file does not say how such a head is split over "
            f"rows and columns ({HEAD_DIM} is known): use a folder with its config.json"
        )
    dim = shapes.side("x_pad_token", 1, axes=2, multiple=head_dim)
    return {
        "_class_name": "ZImageTransformer2DModel",
        "dim": dim,
        "n_layers": _count(shapes, "layers."),
        "n_refiner_layers": _count(shapes, "noise_refiner."),
        "n_heads": dim // head_dim,
        "n_kv_heads": dim // head_dim,
        "in_channels": shapes.side("all_x_embedder.2-1.weight", 1, axes=2, multiple=LATENT_PATCH) // LATENT_PATCH,
        "cap_feat_dim": shapes.side("cap_embedder.0.weight", 0, axes=1),
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "norm_eps": 1e-5,
        "t_scale": 1000.0,
    }


def _text_encoder(shapes: Shapes, stack: str = "model.") -> dict[str, object]:
    """Qwen3, whose layers and embeddings have names that begin with `stack`."""
    layer = f"{stack}layers.0"
    head_dim = shapes.side(f"{layer}.self_attn.q_norm.weight", 0, axes=1, multiple=2)
    key_heads = shapes.side(f"{layer}.self_attn.k_proj.weight", 0, axes=2, multiple=head_dim) // head_dim
    heads = shapes.side(f"{layer}.self_attn.q_proj.weight", 0, axes=2, multiple=key_heads * head_dim) // head_dim
    return {
        "model_type": "qwen3",
        "vocab_size": shapes.side(f"{stack}embed_tokens.weight", 0, axes=2),
        "hidden_size": shapes.side(f"{stack}embed_tokens.weight", 1, axes=2),
        "intermediate_size": shapes.side(f"{layer}.mlp.gate_proj.weight", 0, axes=2),
        "num_hidden_layers": _count(shapes, f"{stack}layers."),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
    }


def _vision(shapes: Shapes) -> dict[str, object]:
    """Qwen3-VL, or its tower alone."""
    tower = _vision_tower(shapes)
    if not any(key.startswith(TEXT) for key in shapes.entries):
        return tower
    text = {**_text_encoder(shapes, TEXT), "model_type": "qwen3_vl_text", "rope_theta": 5_000_000.0}
    return {"model_type": "qwen3_vl", "vision_config": tower, "text_config": text}


def _vision_tower(shapes: Shapes) -> dict[str, object]:
    visual = "model.visual."
    depth = _count(shapes, f"{visual}blocks.")
    if depth not in DEEPSTACK:
        raise CheckpointError(
            f"{shapes.file}: a vision tower of {depth} layers; a loose file does not say which of them give features "
            f"(of {' and '.join(map(str, DEEPSTACK))} layers it is known): use a folder with its config.json"
        )
    width = shapes.side(f"{visual}blocks.0.mlp.linear_fc1.weight", 1, axes=2, multiple=VISION_HEADS)
    merged = shapes.side(f"{visual}merger.linear_fc1.weight", 1, axes=2, multiple=width)
    return {
        "model_type": "qwen3_vl_vision",
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": shapes.side(f"{visual}blocks.0.mlp.linear_fc1.weight", 0, axes=2),
        "num_heads": VISION_HEADS,
        "out_hidden_size": shapes.side(f"{visual}merger.linear_fc2.weight", 0, axes=2),
        "num_position_embeddings": shapes.side(f"{visual}pos_embed.weight", 0, axes=2),
        "deepstack_visual_indexes": DEEPSTACK[depth],
        "patch_size": shapes.side(f"{visual}patch_embed.proj.weight", 4, axes=5),
        "spatial_merge_size": math.isqrt(merged // width),
    }


def _vae(shapes: Shapes) -> dict[str, object]:
    if "decoder.mid_block.resnets.0.norm1.gamma" in shapes.entries:
        raise CheckpointError(f"{shapes.file}: a Wan VAE without its latents' mean and deviation; use a folder")
    levels = range(_count(shapes, "decoder.up_blocks."))
    first = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in levels]
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [shapes.side(key, 0, axes=4, multiple=NORM_GROUPS) for key in first],
        "layers_per_block": _count(shapes, "encoder.down_blocks.0.resnets."),
        "latent_channels": shapes.side("decoder.conv_in.weight", 1, axes=4),
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }


def _control(shapes: Shapes) -> dict[str, object]:
    head_dim = shapes.side("control_layers.0.attention.norm_q.weight", 0, axes=1, multiple=2)
    embedder, refiner = "control_all_x_embedder.2-1.weight", _control_refiner(shapes)
    dim = shapes.side(embedder, 0, axes=2, multiple=head_dim)
    shared = refiner == "control_layers"
    return {
        "_class_name": "ZImageControlNetModel",
        "dim": dim,
        "n_heads": dim // head_dim,
        "n_kv_heads": dim // head_dim,
        "norm_eps": 1e-5,
        "n_refiner_layers": 2 if shared else _count(shapes, "control_noise_refiner."),
        "control_in_dim": shapes.side(embedder, 1, axes=2, multiple=LATENT_PATCH) // LATENT_PATCH,
        "control_layers_places": _control_places(shapes),
        "control_refiner_layers_places": [0, 1] if refiner else [],
        "add_control_noise_refiner": refiner,
    }


def _control_refiner(shapes: Shapes) -> str | None:
    """Which blocks give hints to the noise refiner.

    None of 1.0's: they have no projections. 2.0 was published with a refiner that was never trained, whose projections
    are still zeros: its joint blocks stand in for it.
    """
    if not any(key.startswith("control_noise_refiner.") for key in shapes.entries):
        return "control_layers"
    projection = shapes.entries.get("control_noise_refiner.0.before_proj.weight")
    if projection is None:
        return None
    return "control_layers" if _is_zero(projection) else "control_noise_refiner"


def _is_zero(matrix: Stored) -> bool:
    """Whether all values are zeros: a few rows at a time, so that most files are read no further than the first."""
    if not matrix.is_number or len(matrix.shape) != 2:
        return False  # which the check of its kind and shape reports
    values = matrix.read(Maps())
    for i in range(0, matrix.shape[0], ROWS):
        end = min(i + ROWS, matrix.shape[0])
        rows = values.rows(i, end).decode() if is_packed(values) else values[i:end].float()
        if rows.any():
            return False
    return True


def _control_places(shapes: Shapes) -> list[int]:
    count = _count(shapes, "control_layers.")
    if count not in CONTROL_COUNTS:
        raise CheckpointError(
            f"{shapes.file}: {count} control layers; a loose file does not say to which layers of the DiT they belong "
            f"({', '.join(map(str, CONTROL_COUNTS))} are known): use a folder with its config.json"
        )
    return list(range(0, CONTROLLED, CONTROLLED // count))


def _count(shapes: Shapes, prefix: str) -> int:
    """Blocks of a kind, whose numbers follow one another from 0: a damaged key must not make them enormously many."""
    found = {key.removeprefix(prefix).partition(".")[0] for key in shapes.entries if key.startswith(prefix)}
    numbers = [str(i) for i in range(len(found))]
    absent = next((number for number in numbers if number not in found), "0" if not found else "")
    if absent:
        raise CheckpointError(f"{shapes.file}: the tensors of {prefix}{absent} are missing")
    return len(found)
