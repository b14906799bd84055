"""What LoRA files hold besides products: differences of weights, rotations, parts of other models, other kinds."""

import itertools
import json
import math
from pathlib import Path

import lora_files as files
import pytest
import torch
from lora_files import ONE, SHAPES, SIZES

from zimage.errors import CheckpointError
from zimage.formats.lora import LoraFile, lora_file, read_lora
from zimage.formats.lora_keys import ENDINGS, WRAPPERS, grouped, layer_names
from zimage.nn.deltas import Dense, Kronecker

WIDE = torch.zeros(0)
OUT = "layers.0.attention.to_out.0"


def read(folder: Path, tensors, config=None, skip=()) -> LoraFile:
    return read_lora(files.write(folder / "lora.safetensors", tensors, config), SHAPES, SIZES, skip)


def refused(folder: Path, tensors, config=None) -> str:
    with pytest.raises(CheckpointError) as error:
        read(folder, tensors, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def weight(path: str = ONE) -> torch.Tensor:
    return torch.randn(SHAPES[path], generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("first", WRAPPERS)
def test_wrappers_may_lie_within_one_another_in_any_order(first):
    names = layer_names([*SHAPES, *(name.rpartition(".")[0] for name in SIZES)])
    for second, third in itertools.product(("", *WRAPPERS), ("", *WRAPPERS[:4])):
        keys = [f"{third}{second}{first}{path.replace('.', '_')}.lora_A.weight" for path in SHAPES]
        assert [group.layers for group in grouped(keys, names)] == [(path,) for path in SHAPES]
        assert {group.module for group in grouped(keys, names)} == {path.replace(".", "_") for path in SHAPES}


def test_wrappers_and_layers_cannot_be_taken_for_one_another():
    """No layer's name begins with a wrapper, so that taking wrappers away can only find one."""
    names = layer_names([*SHAPES, *(name.rpartition(".")[0] for name in SIZES)])
    assert not [name for name in names if name.startswith(WRAPPERS)]


@pytest.mark.parametrize("ending", [".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight", ".lokr_w1_a"])
@pytest.mark.parametrize("adapter", ["default", "style", "my-style 2", "weight", "lora_A", "alpha"])
def test_adapters_may_have_any_name(ending, adapter):
    before, weight, _ = ending.partition(".weight")
    (group,) = grouped([f"base_model.model.{ONE}{before}.{adapter}{weight}"], layer_names(SHAPES))
    assert (group.module, group.layers, list(group.keys)) == (ONE, (ONE,), [ENDINGS[ending]])


def test_two_adapters_in_one_file_are_refused(tmp_path):
    text = refused(tmp_path, {f"{ONE}.lora_A.{name}.weight": torch.ones(4, 64) for name in ("one", "two")})
    assert "are the same tensor of the same layer" in text


def test_long_names_are_no_layers(tmp_path):
    tensors = {"model_" * 200_000 + "layers_0_attention_to_q.lora_A.weight": torch.ones(4, 64)}
    assert "none of its 1 keys names a layer" in refused(tmp_path, tensors)


# ------------------------------------------------------------------ differences


def test_differences_of_every_weight(tmp_path):
    """Matrices, norms and biases, under canonical names and under native ones; q, k and v as one."""
    given = files.vectors(files.MODEL)
    matrices = {path: torch.randn(SHAPES[path]) for path in SHAPES}
    tensors = files.differences(given | {f"{path}.weight": matrix for path, matrix in matrices.items()})
    for names in (tensors, {f"diffusion_model.{key}": value for key, value in tensors.items()}, native(tensors)):
        found = read(tmp_path, names)
        assert found.vectors.keys() == given.keys()
        assert found.deltas.keys() == matrices.keys()
        assert all(torch.equal(found.vectors[name], value) for name, value in given.items())
        assert all(torch.equal(found.deltas[path].matrix(WIDE), value) for path, value in matrices.items())
        assert all(isinstance(delta, Dense) for delta in found.deltas.values())


def native(tensors: dict) -> dict:
    """As whoever subtracts two native files gets them, with the norm that no model needs."""
    renamed = {}
    for key, value in tensors.items():
        block, attention, _ = key.partition(".attention.to_")
        if attention and not key.endswith(".to_out.0.diff"):
            parts = [tensors[f"{block}.attention.to_{part}.diff"] for part in "qkv"]
            renamed[f"diffusion_model.{block}.attention.qkv.diff"] = torch.cat(parts)
            continue
        key = files.native(key).replace("norm_q.", "q_norm.").replace("norm_k.", "k_norm.")
        renamed[f"diffusion_model.{key}"] = value
    return renamed | {"diffusion_model.norm_final.diff": torch.ones(64)}


def test_differences_of_norms_as_lycoris_names_them(tmp_path):
    found = read(tmp_path, {"lycoris_layers_0_attention_norm1.w_norm": torch.ones(64)})
    assert list(found.vectors) == ["layers.0.attention_norm1.weight"]


def test_a_product_and_the_difference_of_a_bias_go_together(tmp_path):
    path = "t_embedder.mlp.0"
    down, up = files.factors([path])[path]
    found = read(tmp_path, {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up, f"{path}.diff_b": up[:, 0]})
    assert (list(found.deltas), list(found.vectors)) == ([path], [f"{path}.bias"])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{ONE}.diff_b": (64,)}, f"{ONE} has no bias"),
        ({"layers.0.attention.qkv.diff_b": (192,)}, "layers.0.attention.qkv has no bias"),
        ({"layers.0.attention_norm1.diff_b": (64,)}, "layers.0.attention_norm1 has no bias"),
        ({f"{ONE}.diff": (64, 32)}, f"{ONE} [64, 32] should be [64, 64]"),
        ({f"{ONE}.diff": (64,)}, f"{ONE}.diff [64] should be a matrix"),
        ({"layers.0.attention_norm1.diff": (63,)}, "layers.0.attention_norm1.weight [63] should be [64]"),
        ({"layers.0.attention_norm1.diff": (64, 1)}, "layers.0.attention_norm1.weight [64, 1] should be [64]"),
        ({"layers.0.attention_norm1.lora_A.weight": (4, 64)}, "has lora_A, but it is not linear"),
        ({f"{ONE}.diff": (64, 64), f"{ONE}.lora_A.weight": (4, 64)}, "it should have lora_A and lora_B"),
        ({"norm_final.diff": (64,)}, "none of its 1 keys names a layer of this DiT"),
        ({"norm_final.lora_A.weight": (4, 64), f"{ONE}.diff": (64, 64)}, "1 of its 2 keys cannot be matched"),
    ],
)
def test_differences_that_cannot_be_are_named(tmp_path, tensors, words):
    assert words in refused(tmp_path, {key: torch.ones(shape) for key, shape in tensors.items()})


# ------------------------------------------------------------------ rotations


def block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(*blocks.double())


def skew(upper: torch.Tensor, side: int) -> torch.Tensor:
    """Written out value by value."""
    q = torch.zeros(len(upper), side, side, dtype=torch.float64)
    for block, (position, (row, column)) in itertools.product(
        range(len(upper)), enumerate(itertools.combinations(range(side), 2))
    ):
        q[block, row, column] = upper[block, position]
        q[block, column, row] = -upper[block, position]
    return q


CAYLEY = {"peft_type": "OFT", "use_cayley_neumann": False}


def moved(found: LoraFile, path: str = ONE) -> torch.Tensor:
    return weight(path) + found.deltas[path].change(weight(path))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("side", [2, 8, 16, 64])
def test_a_rotation_of_the_inputs(tmp_path, side, shared):
    """W · Rᵀ with R = (I − Q) · (I + Q)⁻¹ for each block, which keeps the lengths of rows."""
    upper = files.oft(64, side, shared=shared)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CAYLEY | {"block_share": shared}))
    found = moved(read(tmp_path, {f"transformer.{ONE}.oft_R.weight": upper}))
    q, one = skew(upper.expand(64 // side, -1), side), torch.eye(side, dtype=torch.float64)
    r = block_diagonal((one - q) @ torch.linalg.inv(one + q))
    torch.testing.assert_close(found, weight() @ r.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), weight().norm(dim=1), rtol=0, atol=1e-6)


def test_onetrainers_scaled_rotation(tmp_path):
    """The values are divided by the root of their number; without settings, PEFT's series with its defaults."""
    upper = files.oft(64, 8)
    scaled = read(tmp_path, {f"{ONE}.oft_R.weight": upper, f"{ONE}.oft_R.scaled_oft": torch.tensor(1)})
    plain = read(tmp_path, {f"{ONE}.oft_R.weight": upper / math.sqrt(28)})
    torch.testing.assert_close(moved(scaled), moved(plain))
    q = skew(upper / math.sqrt(28), 8)
    r = block_diagonal(torch.eye(8) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    torch.testing.assert_close(moved(plain), weight() @ r.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.01, 100.0])
@pytest.mark.parametrize("rescaled", [False, True])
def test_a_rotation_of_the_outputs(tmp_path, alpha, rescaled):
    """As LyCORIS has it: diag(rescale) · Rᵀ · W, the norm of all Q limited to alpha · O unless alpha is 0."""
    w1 = "layers.0.feed_forward.w1"
    out, _ = SHAPES[w1]
    blocks, rescale = files.oft_blocks(out, 10, size=0.5), torch.rand(out, 1) + 0.5
    tensors = {"oft_blocks": blocks} | ({"rescale": rescale} if rescaled else {})
    tensors |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
    found = read(tmp_path, {f"lycoris_layers_0_feed_forward_w1.{name}": value for name, value in tensors.items()})
    q = blocks.double() - blocks.double().transpose(1, 2)
    if alpha and q.norm() > alpha * out:
        q *= alpha * out / q.norm()
    one = torch.eye(10, dtype=torch.float64)
    exact = block_diagonal((one + q) @ torch.linalg.inv(one - q)).T @ weight(w1)
    exact *= rescale if rescaled else 1
    torch.testing.assert_close(moved(found, w1), exact, rtol=0, atol=1e-5)


def test_rotations_of_q_k_and_v_together(tmp_path):
    """Inputs are the same for all three; outputs only if no block belongs to two of them."""
    fused = "layers.0.attention.qkv"
    three = torch.randn(192, 64, dtype=torch.float64)
    upper, blocks = files.oft(64, 8), files.oft_blocks(192, 16)
    for tensors in ({"oft_R.weight": upper}, {"oft_blocks": blocks}):
        found = read(tmp_path, {f"diffusion_model.{fused}.{name}": value for name, value in tensors.items()}).deltas
        parts = [delta.change(part) for delta, part in zip(found.values(), three.split(64), strict=True)]
        q = skew(upper, 8) if "oft_R.weight" in tensors else blocks.double() - blocks.double().transpose(1, 2)
        if "oft_R.weight" in tensors:
            r = block_diagonal(torch.eye(8) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
            wanted = three @ r.T - three
        else:
            one = torch.eye(16, dtype=torch.float64)
            wanted = block_diagonal((one + q) @ torch.linalg.inv(one - q)).T @ three - three
        torch.testing.assert_close(torch.cat(parts), wanted, rtol=0, atol=1e-5)
    text = refused(tmp_path, {f"{fused}.oft_blocks": files.oft_blocks(192, 24)})
    assert "stands for q, k and v, but rows that are rotated together cannot be separated" in text


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"oft_R.weight": torch.ones(8, 27)}, "[8, 27] should have the values of a triangle"),
        ({"oft_R.weight": torch.ones(7, 28)}, "for 1 or all blocks of 64 inputs"),
        ({"oft_R.weight": torch.ones(64, 0)}, "should have the values of a triangle"),
        ({"oft_R.weight": torch.ones(64)}, "should have the values of a triangle"),
        ({"oft_R.weight": torch.ones(8, 28) * 1e30}, "makes no rotation; its values are too large"),
        ({"oft_R.weight": torch.ones(8, 28), "dora_scale": torch.ones(64, 1)}, "cannot have dora_scale too"),
        ({"oft_R.weight": torch.ones(8, 28), "alpha": torch.ones(1)}, "cannot have alpha too"),
        ({"oft_blocks": torch.ones(8, 8, 7)}, "should be square blocks for 64 outputs"),
        ({"oft_blocks": torch.ones(0, 8, 8)}, "should be square blocks for 64 outputs"),
        ({"oft_blocks": torch.ones(2, 8, 8, 8)}, "is a BOFT, which is not implemented"),
        ({"oft_blocks": torch.ones(8, 8, 8), "rescale": torch.ones(8)}, "[8] should be [64, 1]"),
        ({"oft_blocks": torch.ones(8, 8, 8), "alpha": torch.ones(2)}, "should be one number"),
        ({"rescale": torch.ones(64)}, "it should have lora_A and lora_B"),
    ],
)  # fmt: skip
def test_rotations_that_cannot_be_are_named(tmp_path, tensors, words):
    assert words in refused(tmp_path, {f"{ONE}.{name}": value for name, value in tensors.items()})


# ------------------------------------------------------------------ other kinds and other models


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("boft_R", "it is BOFT, 1 of 1 keys"),
        ("boft_s", "it is BOFT"),
        ("ia3_l", "it is IA3"),
        ("on_input", "it is IA3"),
        ("vera_lambda_b", "it is VeRA"),
        ("vera_lambda_d.default", "it is VeRA"),
        ("a1.weight", "it is GLoRA"),
        ("bm.weight", "it is GLoRA"),
        ("oft_diag", "it is an older OFT (oft_diag)"),
        ("lora_E", "it is AdaLoRA"),
        ("lora_B.bias", "it is a LoRA with biases of its own"),
        ("lora_mid.weight", "it is a LoRA of convolutions"),
        ("hada_t1", "it is a LoHa of convolutions"),
        ("lokr_t2", "it is a LoKr of convolutions"),
        ("hra_u", "it is HRA"),
        ("fourierft_spectrum.default", "it is FourierFT"),
    ],
)
def test_other_kinds_are_refused_by_their_name(tmp_path, ending, kind):
    text = refused(tmp_path, {f"base_model.model.{ONE}.{ending}": torch.ones(4, 64)})
    assert kind in text
    assert "adapters may be LoRA, LoKr, LoHa, OFT, DoRA or differences of weights" in text


TEXT_ENCODERS = [
    "text_encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.text_encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.gate_proj.lora_A.weight",
    "lora_te_layers_0_self_attn_q_proj.lora_down.weight",
    "lora_te1_model_layers_0_mlp_down_proj.lora_up.weight",
    "model.layers.0.self_attn.o_proj.lora_A.weight",
    "te1.model.layers.0.input_layernorm.diff",
    "model.layers.0.post_attention_layernorm.diff",
]


@pytest.mark.parametrize("key", TEXT_ENCODERS)
def test_the_text_encoders_part_is_refused_by_name_or_skipped(tmp_path, key):
    down, up = files.factors([ONE])[ONE]
    own = {f"{ONE}.lora_A.weight": down, f"{ONE}.lora_B.weight": up}
    text = refused(tmp_path, own | {key: torch.ones(4, 4)})
    assert f"keys of the text encoder, 1 of 3 ({key})" in text
    assert "load the rest with --lora-skip text_encoder" in text
    assert list(read(tmp_path, own | {key: torch.ones(4, 4)}, skip=("text_encoder",)).deltas) == [ONE]
    with pytest.raises(CheckpointError, match="none of its 1 keys names a layer of this DiT"):
        read(tmp_path, {key: torch.ones(4, 4)}, skip=("text_encoder",))
    with pytest.raises(CheckpointError, match=r"1 of its 4 keys cannot be matched to a layer: layers.9.x.alpha"):
        read(tmp_path, own | {key: torch.ones(4, 4), "layers.9.x.alpha": torch.ones(1)}, skip=("text_encoder",))


# ------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("adapter_model.safetensors", "other.safetensors", "adapter_config.json"), "adapter_model.safetensors"),
        (("pytorch_lora_weights.safetensors", "a.safetensors"), "pytorch_lora_weights.safetensors"),
        (("style.safetensors", "README.md"), "style.safetensors"),
    ],
)
def test_the_file_of_a_folder(tmp_path, names, chosen):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "checkpoint-500.safetensors").mkdir()
    assert lora_file(tmp_path) == tmp_path / chosen
    assert lora_file(tmp_path / "absent") == tmp_path / "absent"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("b.safetensors", "a.safetensors"), "it holds a.safetensors, b.safetensors: name one"),
        ((), "it holds no .safe"),
    ],
)
def test_a_folder_without_one_file_is_named_with_what_it_holds(tmp_path, names, words):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        lora_file(tmp_path)
    assert str(error.value).startswith(f"LoRA folder {tmp_path}: expected adapter_model.safetensors or pytorch_lora")
    assert words in str(error.value)


def test_rows_of_a_kronecker_product_are_multiplied_out_alone():
    """Bit by bit those of the whole, wherever they begin and end."""
    delta = Kronecker((torch.randn(6, 3),), (torch.randn(5, 4),), scale=0.7)
    whole = 0.7 * torch.kron(*delta.w1, *delta.w2)
    for first, last in itertools.combinations(range(31), 2):
        assert torch.equal(delta.rows(first, last).matrix(WIDE), whole[first:last])
