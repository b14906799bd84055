"""A small model whose shapes a loose file can tell, and its files as other tools write them."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from bench.writers import *  # noqa: F403 - the writers are used as loose.NAME
from bench.writers import State
from zimage.dit import ZImageDiT
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL

# Heads of 128, 32 groups and widths that blocks of 256 divide, as published; two heads and few layers.
DIT = {**tiny.DIT, "dim": 768, "n_heads": 6, "n_kv_heads": 6, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512]}
QWEN = {**tiny.QWEN, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64}
KL = {**tiny.KL, "block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32}
DIT["cap_feat_dim"] = QWEN["hidden_size"]
needs_comfy = pytest.mark.skipif(
    importlib.util.find_spec("comfy_kitchen") is None, reason="comfy-kitchen is not installed"
)
COMFY = (pytest.mark.parity, needs_comfy)  # the tool that users' files come from


def states() -> dict[str, dict[str, Tensor]]:
    """Random weights of every part under canonical keys, exact in bf16."""
    parts = {"text_encoder": Qwen3.from_config(QWEN), "dit": ZImageDiT.from_config(DIT)}
    parts["vae"] = AutoencoderKL.from_config(KL)
    return {
        name: {key: value.clone().bfloat16() for key, value in tiny.randomised(part, seed).state_dict().items()}
        for seed, (name, part) in enumerate(parts.items())
    }


def write_folder(folder: Path, parts: Mapping[str, State]) -> Path:
    """The published layout."""
    tiny.write_model(folder, parts["text_encoder"], parts["dit"], parts["vae"], KL)
    for name, config in (("text_encoder", QWEN), ("transformer", DIT)):
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def rotated_naively(x: Tensor, group: int) -> Tensor:
    """x · H with the whole matrix, as formats describe it."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double()
    whole = torch.ones(1, 1).double()
    while len(whole) < group:
        whole = torch.kron(whole, four)
    return (x.double().unflatten(-1, (-1, group)) @ (whole / group**0.5)).flatten(-2)
