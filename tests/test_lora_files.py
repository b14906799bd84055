"""Reading LoRA files: every naming, form and source of alpha gives the same deltas, and damage is named."""

import json
import math
from pathlib import Path

import lora_files as files
import pytest
import torch
from lora_files import ALPHA, PROJECTIONS, RANK, SHAPES

from bench import weights as full_weights
from zimage.dit import ZImageDiT
from zimage.errors import CheckpointError
from zimage.formats.lora import read_lora
from zimage.formats.lora_keys import layer_names
from zimage.nn.adapters import linear_shapes
from zimage.nn.deltas import Kronecker

WIDE = torch.zeros(0)
Q, K = "layers.0.attention.to_q", "layers.0.attention.to_k"
W1 = "layers.1.feed_forward.w1"


def read(path: Path, tensors, config=None) -> dict:
    """Path → matrix (out, in)."""
    file = files.write(path / "lora.safetensors", tensors, config)
    return {layer: delta.matrix(WIDE) for layer, delta in read_lora(file, SHAPES).deltas.items()}


def pair(path: str, prefix: str = "transformer.", **more) -> dict:
    """One adapter in diffusers' naming, and further tensors beside it."""
    down, up = files.factors([path])[path]
    return {f"{prefix}{path}.lora_A.weight": down, f"{prefix}{path}.lora_B.weight": up} | {
        f"{prefix}{path}.{name}": value for name, value in more.items()
    }


def product(path: str) -> torch.Tensor:
    down, up = files.factors([path])[path]
    return up @ down


@pytest.mark.parametrize("naming", files.NAMINGS)
def test_every_naming_gives_the_same_deltas(naming, tmp_path):
    """All linear layers of the DiT, bit for bit."""
    given = files.factors(SHAPES)
    wanted = files.matrices(given)
    found = read(tmp_path, files.NAMINGS[naming](given))
    assert found.keys() == wanted.keys()
    for path, matrix in wanted.items():
        assert torch.equal(found[path], matrix), path


@pytest.mark.parametrize("config", [None, full_weights.TRANSFORMER], ids=["tiny", "full size"])
def test_names_tell_all_layers_apart(config):
    """No two layers share a name, and a native name that differs belongs to one layer or to a block's q, k and v."""
    shapes = SHAPES
    if config:
        with torch.device("meta"):
            shapes = linear_shapes(ZImageDiT.from_config(config))
    names = layer_names(shapes)
    single = {name: layers[0] for name, layers in names.items() if len(layers) == 1}
    own = {path.replace(".", "_"): path for path in shapes}
    assert own.items() <= single.items()
    native = {name: path for name, path in single.items() if name not in own}
    assert len(set(native.values())) == len(native)
    blocks = [path.removesuffix(".to_q") for path in shapes if path.endswith(".to_q")]
    assert sorted(native.values()) == sorted(
        [f"{block}.to_out.0" for block in blocks] + [path for path in shapes if path.startswith(("all_x", "all_final"))]
    )
    fused = {layers for layers in names.values() if len(layers) > 1}
    assert fused == {tuple(f"{block}.to_{part}" for part in "qkv") for block in blocks}


# ------------------------------------------------------------------ alpha

HEADER = {"r": RANK, "lora_alpha": 8.0}


@pytest.mark.parametrize(
    ("alpha", "header", "beside", "scale"),
    [
        (2.0, HEADER, {"r": RANK, "lora_alpha": 16}, 2 / RANK),
        (None, HEADER, {"r": RANK, "lora_alpha": 16}, 8 / RANK),
        (None, None, {"r": RANK, "lora_alpha": 16}, 16 / RANK),
        (None, None, None, 1.0),
        (None, {f"transformer.{key}": value for key, value in HEADER.items()} | {"text_encoder.r": 9}, None, 8 / RANK),
        (None, {**HEADER, "use_rslora": True}, None, 8 / math.sqrt(RANK)),
        (None, {"r": 9, "lora_alpha": 1, "rank_pattern": {"to_q": RANK}, "alpha_pattern": {"to_q": 6}}, None, 6 / RANK),
        (None, {**HEADER, "alpha_pattern": {"^layers.0.attention.to_q": 6, "to_q": 7}}, None, 6 / RANK),
        (None, {**HEADER, "alpha_pattern": {"layers.1.attention.to_q": 6, "o_q": 5}}, None, 8 / RANK),
    ],
    ids=[
        "tensor",
        "header",
        "beside",
        "rank",
        "pipeline's header",
        "rslora",
        "patterns",
        "first pattern",
        "no pattern",
    ],
)
def test_alpha_is_taken_from_the_first_source_that_has_it(tmp_path, alpha, header, beside, scale):
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    tensors = pair(Q, **({"alpha": torch.tensor(alpha)} if alpha else {}))
    torch.testing.assert_close(read(tmp_path, tensors, header)[Q], scale * product(Q))


@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0).bfloat16()], ids=str)
def test_alpha_may_be_any_single_number(tmp_path, alpha):
    assert torch.equal(read(tmp_path, pair(Q, alpha=alpha))[Q], product(Q) * 0.5)


# ------------------------------------------------------------------ other forms


def prefixed(path: str, tensors: dict) -> dict:
    return {f"lycoris_{path.replace('.', '_')}.{name}": value for name, value in tensors.items()}


def whole(tensors: dict, name: str) -> torch.Tensor:
    return tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]


@pytest.mark.parametrize("low", ["", "w1", "w2", "w1 w2"])
def test_lokr(tmp_path, low):
    """w1 ⊗ w2, scaled by alpha / rank only where a factor is a product."""
    tensors = files.lokr(W1, 10, 8, low)
    explicit = torch.einsum("ab,cd->acbd", whole(tensors, "lokr_w1"), whole(tensors, "lokr_w2")).reshape(SHAPES[W1])
    found = read(tmp_path, prefixed(W1, tensors | {"alpha": torch.tensor(ALPHA)}))
    torch.testing.assert_close(found[W1], explicit * (ALPHA / RANK if low else 1.0))


@pytest.mark.parametrize(("rows", "low"), [(8, ""), (8, "w1"), (3, "w2"), (16, "w1 w2")])
def test_lokr_of_fused_layers(tmp_path, rows, low):
    """q, k and v have a third of the rows each, also where no factor can be cut in three."""
    path = "layers.0.attention.qkv"
    tensors = files.lokr(path, rows, 8, low)
    found = read(tmp_path, prefixed(path, tensors))
    explicit = torch.kron(whole(tensors, "lokr_w1"), whole(tensors, "lokr_w2"))
    assert list(found) == [f"layers.0.attention.to_{part}" for part in "qkv"]
    torch.testing.assert_close(torch.cat(list(found.values())), explicit)


@pytest.mark.parametrize("path", [W1, "layers.0.attention.qkv"])
def test_loha(tmp_path, path):
    out, into = SHAPES.get(path, (192, 64))
    t = files.loha(out, into)
    explicit = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * (ALPHA / RANK)
    found = read(tmp_path, prefixed(path, t | {"alpha": torch.tensor(ALPHA)}))
    torch.testing.assert_close(torch.cat(list(found.values())), explicit)


def test_lokr_as_peft_scales_it(tmp_path):
    """PEFT multiplies by alpha / r also where both factors are whole."""
    tensors = {f"base_model.model.{W1}.{name}": value for name, value in files.lokr(W1, 10, 8, "").items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 16, "alpha": 4}))
    plain = files.lokr(W1, 10, 8, "")
    torch.testing.assert_close(read(tmp_path, tensors)[W1], torch.kron(plain["lokr_w1"], plain["lokr_w2"]) / 4)


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [("lora_magnitude_vector", (64,), 1), ("dora_scale", (64, 1), 1), ("dora_scale", (1, 64), 0)],
)
def test_dora(tmp_path, name, shape, axis):
    """W + ΔW has the magnitudes as the norms of its rows or columns, and the direction of W + up · down."""
    magnitude = torch.rand(shape) + 0.5
    file = files.write(tmp_path / "dora.safetensors", pair(Q, **{name: magnitude}))
    weight = torch.randn(64, 64)
    moved = weight + read_lora(file, SHAPES).deltas[Q].change(weight)
    torch.testing.assert_close(moved.norm(dim=axis), magnitude.flatten())
    moved, direction = (m / m.norm(dim=axis, keepdim=True) for m in (moved, weight + product(Q)))
    torch.testing.assert_close(moved, direction)


def test_dora_of_a_zero_row_is_finite(tmp_path):
    file = files.write(tmp_path / "dora.safetensors", pair(Q, dora_scale=torch.ones(64, 1)))
    weight = -product(Q)
    weight[1:] = 1.0
    assert torch.isfinite(read_lora(file, SHAPES).deltas[Q].change(weight)).all()


def test_factors_stay_small(tmp_path):
    """A LoKr of the full model would take gigabytes as matrices."""
    file = files.write(tmp_path / "lokr.safetensors", prefixed(W1, files.lokr(W1, 10, 8, "w2")))
    delta = read_lora(file, SHAPES).deltas[W1]
    assert isinstance(delta, Kronecker)
    assert sum(t.numel() for t in (*delta.w1, *delta.w2)) < SHAPES[W1][0] * SHAPES[W1][1] / 5


# ------------------------------------------------------------------ refusals


def damaged(change) -> dict:
    tensors = files.NAMINGS["onetrainer"](files.factors(PROJECTIONS))
    change(tensors)
    return tensors


DOWN, UP = f"transformer.{Q}.lora_down.weight", f"transformer.{Q}.lora_up.weight"
NEW = torch.ones(4, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"layers.9.attention.to_q.lora_down.weight": NEW}), "1 of its 49 keys cannot be matched"),
        (lambda t: t.update({f"transformer.{Q}.lora_mid.weight": NEW}), "layers.0.attention.to_q.lora_mid.weight"),
        (lambda t: t.update({f"transformer.{Q}.diff": NEW}), f"{Q} has alpha, diff, lora_A, lora_B; it should have"),
        (lambda t: t.update({f"transformer.{Q}.lora_up.bias": NEW}), "lora_up.bias"),
        (lambda t: t.update({"text_encoder.layers.0.q.lora_down.weight": NEW}), "keys of the text encoder, 1 of 49"),
        (lambda t: t.update({"lora_te1_layers_0_q.lora_down.weight": NEW}), "only adapters of the DiT"),
        (lambda t: t.update({f"{Q}.lora_A.weight": NEW}), "are the same tensor of the same layer"),
        (lambda t: t.update({"layers.0.attention.qkv.lora_up.weight": NEW}), "are adapters of the same layer"),
        (lambda t: t.update({"layers.0.attention.out.lora_up.weight": NEW}), "are adapters of the same layer"),
        (lambda t: t.pop(UP), f"{Q} has alpha, lora_A; it should have lora_A and lora_B"),
        (lambda t: (t.pop(UP), t.pop(DOWN)), f"{Q} has alpha; it should have"),
        (lambda t: t.update({UP: torch.ones(64, 3)}), "of shapes [64, 3], [4, 64] should share one rank"),
        (lambda t: t.update({UP: torch.ones(64, 0), DOWN: torch.ones(0, 64)}), "should share one rank above 0"),
        (lambda t: t.update({UP: torch.ones(64)}), "should be matrices"),
        (lambda t: t.update({UP: torch.ones(64, 4, 1, 1)}), "should be matrices"),
        (lambda t: t.update({UP: torch.ones(32, 4)}), f"1 of 16 layers do not fit: {Q} [32, 64] should be [64, 64]"),
        (lambda t: t.update({UP: torch.full((64, 4), math.nan)}), f"{UP} holds NaN or infinity"),
        (lambda t: t.update({UP: torch.ones(64, 4, dtype=torch.int8)}), f"{UP} is stored as torch.int8"),
        (lambda t: t.update({f"transformer.{Q}.alpha": torch.tensor(0.0)}), "should be one number other than 0"),
        (lambda t: t.update({f"transformer.{Q}.alpha": torch.tensor(math.inf)}), "NaN or infinity"),
        (lambda t: t.update({f"transformer.{Q}.alpha": torch.ones(2)}), "should be one number"),
        (lambda t: t.update({f"transformer.{Q}.dora_scale": torch.ones(3)}), "should be [64], [64, 1] or [1, 64]"),
        (lambda t: t.update({"a\nkey": NEW}), "cannot be matched to a layer: 'a\\nkey'"),
        (lambda t: t.clear(), "none of its 0 keys"),
        (lambda t: (t.clear(), t.update({"double_blocks.0.img_attn.qkv.lora_A.weight": NEW})), "trained for Z-Image"),
        (lambda t: (t.clear(), t.update({"layers.0.attention.to_q.weight": NEW})), "none of its 1 keys"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_in_one_line(tmp_path, change, words):
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, damaged(change))
    assert words in str(error.value)
    assert str(tmp_path / "lora.safetensors") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_norm_per_column_of_fused_layers_is_refused(tmp_path):
    tensors = files.NAMINGS["kohya fused"](files.factors(PROJECTIONS))
    tensors["lora_unet_layers_0_attention_qkv.dora_scale"] = torch.ones(1, 64)
    with pytest.raises(CheckpointError, match="norm per column of q, k and v together"):
        read(tmp_path, tensors)


def test_unequal_products_of_a_loha_are_refused(tmp_path):
    tensors = files.loha(64, 64) | {"hada_w2_b": torch.ones(RANK, 32)}
    with pytest.raises(CheckpointError, match="should have the same shape"):
        read(tmp_path, prefixed(Q, tensors))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([], "should hold a JSON object"),
        ({"r": 4}, "lora_alpha = None should be a number other than 0"),
        ({"lora_alpha": 4}, "r = None should be a whole number above 0"),
        ({"r": 0, "lora_alpha": 4}, "r = 0 should be a whole number above 0"),
        ({"r": True, "lora_alpha": 4}, "r = True"),
        ({"r": 4, "lora_alpha": math.nan}, "lora_alpha = nan"),
        ({"r": 8, "lora_alpha": 4}, "has rank 4, but lora_adapter_metadata says 8"),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": [1]}, "alpha_pattern should be an object"),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": "x"}}, "to_q = 'x' should be a number"),
        ({"r": 4, "lora_alpha": 4, "rank_pattern": {"(": 4}}, "is not a regular expression"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, config, words):
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, pair(Q), config)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_are_no_json_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file(pair(Q), tmp_path / "a.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="in its header is not JSON"):
        read_lora(tmp_path / "a.safetensors", SHAPES)
    files.write(tmp_path / "b.safetensors", pair(Q))
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is not JSON"):
        read_lora(tmp_path / "b.safetensors", SHAPES)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.safetensors", None, "is missing"),
        ("a.safetensors", b"", "not a whole safetensors file"),
        ("a.safetensors", b"garbage that is no header at all", "not a whole safetensors file"),
        ("a.safetensors", b"PK\x03\x04" + bytes(64), "is a pickle"),
        ("a.safetensors", (1 << 62).to_bytes(8, "little") + b"{}", "not a whole safetensors file"),
        ("a.pt", b"", "not a whole safetensors file"),
        ("a.ckpt", b"\x80\x02}q\x00.", "use a safetensors file"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_lora(tmp_path / name, SHAPES)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; it should be a regular file"):
        read_lora(tmp_path, SHAPES)
    file = files.write(tmp_path / "a.safetensors", pair(Q))
    content = file.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 9, 8, 3):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="not a whole safetensors file") as error:
            read_lora(file, SHAPES)
        assert "\n" not in str(error.value)
    unknown = content.replace(b'"F32"', b'"F4" ', 1)
    file.write_bytes(unknown)
    with pytest.raises(CheckpointError):
        read_lora(file, SHAPES)
