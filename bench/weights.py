"""Full-size model folders of random weights: the published configs with random values.

`python -m bench.weights FOLDER` writes 20.5 GB in bf16, block by block, in the published layout.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from zimage.dit import ControlNet, ZImageDiT
from zimage.loading.weights import on_meta
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL
from zimage.weights import DEMO
from zimage.weights.convert import convert

TEXT_ENCODER = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}
TRANSFORMER = {
    "_class_name": "ZImageTransformer2DModel",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
SMALL_TRANSFORMER = {**TRANSFORMER, "dim": 512, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [16, 24, 24], "n_layers": 8}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# Everything in small, in sizes that int8, fp8 and every format of files divide: to see that things run.
SMALL: dict[str, dict[str, Any]] = {
    "text_encoder": {
        **TEXT_ENCODER,
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "transformer": {
        **TRANSFORMER,
        "dim": 384,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 256,
        "n_layers": 5,
        "n_refiner_layers": 1,
    },
    "vae": {**VAE, "block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "sample_size": 256},
}
COMPONENTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "text_encoder": (Qwen3, TEXT_ENCODER, "model"),
    "transformer": (ZImageDiT, TRANSFORMER, "diffusion_pytorch_model"),
    "vae": (AutoencoderKL, VAE, "diffusion_pytorch_model"),
}
BESIDE: tuple[Any, dict[str, Any], str] = (ControlNet, {}, "diffusion_pytorch_model")  # a ControlNet; no model has one
# Forms of ControlNets: layers from one place to the next, channels, and what adds along the noise refiner.
CONTROLS: dict[str, tuple[int, int, str | None]] = {
    "1.0": (5, 16, None),
    "2.0": (2, 33, "control_layers"),
    "2.1": (2, 33, "control_noise_refiner"),
    "lite": (10, 33, "control_noise_refiner"),
}
SINGLES = {"dit": "native", "text_encoder": "transformers", "vae": "ldm"}  # component → layout
SHARD_BYTES = 4_000_000_000
INDEX = {
    "_class_name": "ZImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_model(
    folder: Path, layers: int | None = None, configs: Mapping[str, dict] | None = None, device: str = "cpu"
) -> Path:
    """Write a model folder, unless it exists; `layers` makes both transformers shallower at full width.

    `configs` are of other components than the published ones; the weights are drawn on `device`.
    """
    if (folder / "model_index.json").is_file():
        return folder
    for name, (_, published, _) in COMPONENTS.items():
        config = (configs or {}).get(name, published)
        key = {"text_encoder": "num_hidden_layers", "transformer": "n_layers"}.get(name)
        write_component(folder, name, {**config, key: layers} if layers and key else config, device)
    for name in ("scheduler", "tokenizer"):  # ids of the small vocabulary are valid in the large one
        (folder / name).mkdir(exist_ok=True)
        for file in (DEMO / name).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2))
    return folder


def control_config(form: str, transformer: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a ControlNet of this form for a DiT."""
    every, channels, refiner = CONTROLS[form]
    shared = ("dim", "n_heads", "n_kv_heads", "n_refiner_layers", "norm_eps", "qk_norm")
    return {
        "_class_name": "ZImageControlNetModel",
        **{key: transformer[key] for key in shared},
        "control_in_dim": channels,
        "control_layers_places": list(range(0, transformer["n_layers"], every)),
        "control_refiner_layers_places": list(range(transformer["n_refiner_layers"])) if refiner else [],
        "add_control_noise_refiner": refiner,
    }


def write_component(folder: Path, name: str, config: dict | None = None, device: str = "cpu") -> None:
    """Write one component of a model folder, unless one with this config exists."""
    cls, published, stem = COMPONENTS.get(name, BESIDE)
    config, file = config or published, folder / name / "config.json"
    if file.is_file() and json.loads(file.read_text()) == config:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with on_meta():
        model = cls.from_config(config)
    _write_shards(model, folder / name, stem, device)
    file.write_text(json.dumps(config, indent=2))  # last: an interrupted component is written again


def write_singles(folder: Path) -> dict[str, str]:
    """Write a model folder's components as single files beside it, under the names of other tools; component → path."""
    beside = folder.absolute().with_name(f"{folder.absolute().name}-single")
    beside.mkdir(exist_ok=True)
    files = {name: beside / f"{name}.safetensors" for name in SINGLES}
    for name, file in files.items():
        if not file.is_file():
            convert(folder, file, SINGLES[name], component=name)
    return {name: str(file) for name, file in files.items()}


def _write_shards(model: nn.Module, folder: Path, stem: str, device: str = "cpu") -> None:
    """Write random weights in shards of at most 4 GB with an index, one shard in memory at a time."""
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for key, weight in model.state_dict().items():
        if size + 2 * weight.numel() > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = weight.shape
        size += 2 * weight.numel()
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        save_file({key: random_weight(key, shape, device).cpu() for key, shape in shard.items()}, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        size = sum(2 * shape.numel() for shard in shards for shape in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}  # diffusers requires the metadata
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def random_weight(key: str, shape: torch.Size, device: torch.device | str = "cpu") -> torch.Tensor:
    """Ones for norms, values of scale 1/√fan-in for matrices, so that activations stay in range through all layers."""
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if len(shape) == 1:
        return weight.fill_(key.endswith("weight"))
    return weight.normal_(std=0.5 * (1 if "embed_tokens" in key else shape[1:].numel()) ** -0.5)


if __name__ == "__main__":
    print(write_model(Path(sys.argv[1])))
