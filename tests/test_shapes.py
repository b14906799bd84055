"""Loose files whose shapes contradict themselves: the line names the tensor, never a Python exception."""

import re

import loose
import pytest
import torch

import zimage
from zimage.errors import CheckpointError


@pytest.fixture(scope="module")
def states():
    return loose.states()


def sized(*shape):
    return lambda value: torch.ones(shape, dtype=value.dtype)


@pytest.mark.parametrize(
    ("part", "key", "change", "says"),
    [
        ("dit", "x_pad_token", sized(768), "x_pad_token has the shape [768]; it should have 2 sides, none 0"),
        ("dit", "x_pad_token", sized(1, 0), "x_pad_token has the shape [1, 0]; it should have 2 sides, none 0"),
        ("dit", "x_pad_token", sized(1, 700), "700 should be a multiple of 128"),
        ("dit", "all_x_embedder.2-1.weight", sized(768, 63), "63 should be a multiple of 4"),
        ("dit", "cap_embedder.0.weight", sized(0), "cap_embedder.0.weight has the shape [0]"),
        ("dit", "layers.0.attention.norm_q.weight", sized(1, 128), "norm_q.weight has the shape [1, 128]"),
        ("dit", "x_pad_token", None, "x_pad_token, which shows the architecture, is missing"),
        ("text_encoder", "model.embed_tokens.weight", sized(5), "embed_tokens.weight has the shape [5]"),
        ("text_encoder", "model.layers.0.self_attn.q_norm.weight", sized(0), "q_norm.weight has the shape [0]"),
        ("text_encoder", "model.layers.0.self_attn.q_norm.weight", sized(63), "63 should be a multiple of 2"),
        ("text_encoder", "model.layers.0.self_attn.k_proj.weight", sized(100, 256), "100 should be a multiple of 64"),
        ("text_encoder", "model.layers.0.self_attn.q_proj.weight", sized(192, 256), "should be a multiple of 128"),
        ("vae", "encoder.down_blocks.0.resnets.0.conv1.weight", sized(33, 32, 3, 3), "33 should be a multiple of 32"),
        ("vae", "encoder.down_blocks.0.resnets.0.conv1.weight", sized(32, 32), "it should have 4 sides, none 0"),
        ("vae", "decoder.conv_in.weight", sized(64, 0, 3, 3), "conv_in.weight has the shape [64, 0, 3, 3]"),
    ],
)
def test_the_tensor_at_fault_is_named(states, tmp_path, part, key, change, says):
    state = dict(states[part])
    value = state.pop(key)
    file = loose.save(state if change is None else {**state, key: change(value)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(says)) as error:
        zimage.load_component(file, part)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("key", ["layers.998.w", "layers.x.w", "layers..w", "layers.٣.w", "layers.-1.w"])
def test_a_block_that_does_not_follow_is_not_built(states, tmp_path, key):
    file = loose.save({**states["dit"], key: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"the tensors of layers\.\d+ are missing"):
        zimage.load_component(file, "dit")
