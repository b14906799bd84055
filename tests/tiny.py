"""Tiny models for tests: published configs in small, random weights that hide nothing, and a whole model folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from zimage.text.tokenizer_file import QWEN_SPLIT

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
VOCAB = 256 + len(SPECIAL_TOKENS)

QWEN = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,  # not hidden / heads, as in the published encoder
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}

DIT = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": QWEN["hidden_size"],
    "siglip_feat_dim": None,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [8, 12, 12],
    "axes_lens": [256, 64, 64],
}

KL = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,
    "sample_size": 64,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

WAN = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 8,
    "dim_mult": [1, 2, 2, 2],
    "dropout": 0.0,
    "latents_mean": [round(0.3 * (-1) ** i + 0.05 * i, 4) for i in range(16)],
    "latents_std": [round(1.1 + 0.1 * i, 4) for i in range(16)],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}

VISION = {
    "model_type": "qwen3_vl",
    "image_token_id": VOCAB - 1,
    "tie_word_embeddings": True,
    "text_config": {
        **QWEN,
        "model_type": "qwen3_vl_text",
        "num_hidden_layers": 5,  # more than those that get features, and their last one
        "rope_theta": 5_000_000.0,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 3, 3]},
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 5,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 3,
        "out_hidden_size": QWEN["hidden_size"],
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1, 3],
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}

SEEING_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SEEING_QWEN = {**QWEN, "vocab_size": VOCAB + len(SEEING_TOKENS)}  # an encoder that can read what a tower sees
SEEING = {  # and a vision model beside it
    **VISION,
    "image_token_id": VOCAB + 2,
    "text_config": {**VISION["text_config"], "vocab_size": SEEING_QWEN["vocab_size"]},
    "vision_config": {**VISION["vision_config"], "patch_size": 8},
}
PIXELS = {"size": {"shortest_edge": 1024, "longest_edge": 1 << 22}, "patch_size": 8, "merge_size": 2}

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a reference class takes as keywords."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter so that each one matters: kernels keep the scale of their input, norms differ from one,
    pad tokens and adaLN from zero. All values are exact in bfloat16, so that both precisions hold the same model.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(module.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("gamma") or (weight.ndim == 1 and name.endswith("weight")):
            noise = 1 + 0.3 * noise  # a norm
        elif weight.ndim == 1:
            noise = 0.1 * noise  # a bias
        elif not name.endswith(("pad_token", "embed_tokens.weight")):
            noise = noise / weight[0].numel() ** 0.5  # a kernel: one over the root of its fan-in
        weight.data = noise.bfloat16().to(weight.dtype)
    return module


def talkative(encoder: nn.Module) -> nn.Module:
    """A random encoder whose text is varied: with embeddings that outweigh its layers it repeats the last token."""
    encoder.model.embed_tokens.weight.data.mul_(1 / 8)  # exact, and the tied head's as well
    return encoder


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the reference's largest value."""
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} is not {tuple(reference.shape)}"
    return float((ours.double() - reference.double()).abs().max() / reference.double().abs().max())


def tokenizer(more: Sequence[str] = ()) -> Tokenizer:
    """Bytes and special tokens only, and `more` of these: cuts text as Qwen does, and merges nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([*SPECIAL_TOKENS, *more])
    return fast


def write_model(
    folder: Path,
    text_encoder: Mapping,
    transformer: Mapping,
    vae: Mapping,
    vae_config: Mapping,
    dit_config: Mapping = DIT,
    text_config: Mapping = QWEN,
) -> Path:
    """A model folder in the published layout with these state dicts (the VAE's as published); returns `folder`."""
    parts = {
        "text_encoder": (text_config, text_encoder, "model"),
        "transformer": (dit_config, transformer, "diffusion_pytorch_model"),
        "vae": (vae_config, vae, "diffusion_pytorch_model"),
    }
    for name, (config, weights, stem) in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / name / f"{stem}.safetensors")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "tokenizer").mkdir()
    more = SEEING_TOKENS if text_config["vocab_size"] > VOCAB else ()
    tokenizer(more).save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def write_vision(
    folder: Path, weights: Mapping[str, Tensor], config: Mapping = SEEING, pixels: Mapping = PIXELS
) -> Path:
    """The folder of a vision model, as published; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    return folder
