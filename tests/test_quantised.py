"""Quantised weights: what a tensor is follows from its companions, and what is not understood is named."""

import json

import loose
import pytest
import torch

import zimage
from zimage.errors import CheckpointError
from zimage.formats.checkpoint import Checkpoint
from zimage.formats.unsupported import TOOLS
from zimage.nn.packed import is_packed


@pytest.fixture(scope="module")
def states():
    return {"dit": loose.states()["dit"]}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(5)
    caption = torch.randn(9, loose.QWEN["hidden_size"], generator=generator)
    return torch.randn(1, 16, 8, 6, generator=generator), torch.tensor([0.6]), [caption]


E4M3 = torch.float8_e4m3fn
MORE = {  # what else people have, most of it without a word on what it is
    "mxfp8": loose.mxfp8,
    "convrot_w4a4": loose.int4_convrot,
    "nvfp4 undescribed": loose.undescribed(loose.nvfp4),
    "mxfp8 undescribed": loose.undescribed(loose.mxfp8),
    "int8 undescribed": loose.int8_whole,
    "int8 per row undescribed": loose.int8_rows,
    "int8 without a format": loose.undescribed(loose.int8_rows, {"per_row": True}),
    "int8 in blocks": loose.in_blocks(torch.int8, 64, 64),
    "int8_blockwise": loose.undescribed(
        loose.in_blocks(torch.int8, 80, 80), {"format": "int8_blockwise", "group_size": 80}
    ),
    "float8_e4m3fn_rowwise": loose.undescribed(loose.lightx2v_fp8, {"format": "float8_e4m3fn_rowwise"}),
    "float8_e4m3fn_blockwise": loose.undescribed(loose.in_blocks(E4M3, 64, 128), {"format": "float8_e4m3fn_blockwise"}),
    "fp8 as Qwen ships it": loose.in_blocks(E4M3, 128, 128, "weight_scale_inv"),
    "fp8 in groups of a row": loose.in_blocks(E4M3, 1, 64),
}
OF_THE_TOOL = [name for name in MORE if name.startswith(("mxfp8", "nvfp4", "convrot"))]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=loose.COMFY) if name in OF_THE_TOOL else name for name in MORE]
)
def test_what_companions_show(states, inputs, tmp_path, name):
    """Kept as they are, counted as they are, and the numbers are those that the codes stand for."""
    file, numbers = loose.quantised(loose.renamed("dit", "native", states["dit"]), MORE[name])
    loose.save(file, tmp_path / "dit.safetensors")
    checkpoint = Checkpoint.of_file(tmp_path / "dit.safetensors", "dit")
    read = checkpoint.reader()
    for key in ("layers.0.attention.to_k.weight", "layers.1.feed_forward.w2.weight"):  # rows of a fused one; ragged
        packed, entry = read(key), checkpoint.entries[key]
        assert is_packed(packed)
        assert packed.shape == entry.shape
        assert 0 <= sum(t.nbytes for t in packed.tensors()) - entry.nbytes < 4  # of a scale that three share
        assert entry.nbytes < 1.2 * entry.count
        fused = numbers.get(key) if "to_k" not in key else numbers[key.replace("to_k", "qkv")].chunk(3)[1]
        assert torch.allclose(packed.decode(), fused.float(), rtol=1e-5, atol=1e-7)
        assert torch.equal(packed.rows(3, 70).decode(), packed.decode()[3:70])
    dit = zimage.load_component(tmp_path / "dit.safetensors", "dit", dtype="fp32")
    plain = zimage.load_component(loose.save(numbers, tmp_path / "plain.safetensors"), "dit", dtype="fp32")
    ours, theirs = dit(*inputs), plain(*inputs)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f, m: f.update({f"{m}.weight_zero_point": torch.zeros(1)}), "unexpected: .*weight_zero_point"),
        (lambda f, m: f.update({f"{m}.weight_scale": torch.ones(7)}), "has 7 scales"),
        (lambda f, m: f.update({f"{m}.comfy_quant": loose.described({"format": "mxfp8"})}), "the format 'mxfp8'"),
        (lambda f, m: f.update({f"{m}.comfy_quant": loose.described({"format": "w4a8"})}), "'w4a8'; implemented are"),
        (lambda f, m: f.update({f"{m}.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}), "is not JSON"),
        (lambda f, m: f.update({f"{m}.weight": f[f"{m}.weight"].byte()}), "U8 with weight_scale F32, .* do not fit"),
        (lambda f, m: f.update({f"{m}.weight_scale": f[f"{m}.weight_scale"].long()}), "weight_scale I64, .* not fit"),
        (lambda f, m: f.update({f"{m}.weight_scale": torch.ones(3, 5)}), r"has 15 scales \[3, 5\]"),
        (lambda f, m: f.update({f"{m}.weight_scale_2": torch.ones(())}), "unexpected: .*weight_scale_2"),
        (lambda f, m: f.update({f"{m}.weight": f[f"{m}.weight"].to(torch.int32)}), r"not implemented: .*\(I32\)"),
    ],
)
def test_what_is_not_understood_is_named(states, tmp_path, change, says):
    file, _ = loose.quantised(states["dit"], loose.lightx2v_fp8)
    change(file, "layers.1.feed_forward.w3")
    with pytest.raises(CheckpointError, match=says) as error:
        zimage.load_component(loose.save(file, tmp_path / "dit.safetensors"), "dit")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("group", ["256", None, [4], 8, -4, 4096, 1.5])
def test_a_rotation_that_does_not_fit_is_named(tmp_path, group):
    about = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    tensors = {
        "weight": torch.ones(96, 64).char(),
        "weight_scale": torch.ones(96, 1),
        "comfy_quant": loose.described(about),
    }
    file = {f"layers.0.attention.qkv.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"convrot_groupsize .* does not fit its 64 columns"):
        Checkpoint.of_file(loose.save(file, tmp_path / "dit.safetensors"), "dit")


def test_scales_in_another_shard_than_their_codes_are_found(states, tmp_path):
    """Shards are cut by size, between a weight and its scale as anywhere else."""
    file, _ = loose.quantised(states["dit"], loose.int8_rows)
    (tmp_path / "config.json").write_text(json.dumps(loose.DIT))
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for key, value in file.items():
        shards["b.safetensors" if key.endswith("_scale") else "a.safetensors"][key] = value
    for name, tensors in shards.items():
        loose.save(tensors, tmp_path / name)
    index = {key: name for name, tensors in shards.items() for key in tensors}
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert zimage.load_component(tmp_path, "dit").layers[0].feed_forward.w1.packed.codes.dtype == torch.int8


FOREIGN = {
    "nunchaku (SVDQuant)": {"qweight": torch.ones(4, 2).char(), "wscales": torch.ones(4)},
    "SDNQ": {"weight": torch.ones(4, 4).byte(), "scale": torch.ones(4, 1)},
    "MLX": {"weight": torch.ones(4, 1, dtype=torch.int32), "scales": torch.ones(4, 1), "biases": torch.ones(4, 1)},
    "bitsandbytes": {"weight": torch.ones(8, 1).byte(), "weight.absmax": torch.ones(1)},
    "GPTQ or AWQ": {"qweight": torch.ones(4, 2).int(), "qzeros": torch.ones(1, 2).int()},
    "quanto": {"weight._data": torch.ones(4, 4).char(), "weight._scale": torch.ones(4, 1)},
    "compressed-tensors": {"weight_packed": torch.ones(4, 1).int(), "weight_scale": torch.ones(4, 1)},
    "ModelOpt": {"weight_quantizer._amax": torch.ones(1)},
    "HQQ": {"W_q": torch.ones(4, 4).byte()},
}


@pytest.mark.parametrize("tool", FOREIGN)
def test_tools_are_refused_by_name(tmp_path, tool):
    tensors = {f"layers.0.attention.to_q.{name}": value for name, value in FOREIGN[tool].items()}
    file = loose.save(
        {**tensors, "layers.0.attention.to_q.weight": torch.ones(4, 4).byte()} | tensors, tmp_path / "dit"
    )
    with pytest.raises(CheckpointError) as error:
        zimage.load_component(file, "dit")
    assert f"is quantised by {tool} (" in str(error.value)
    assert "use a file of the same model in bf16, fp8, int8, nvfp4 or GGUF" in str(error.value)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_configs_that_name_a_tool_are_refused(tiny_folder, tmp_path, tool):
    config = json.loads((tiny_folder / "transformer" / "config.json").read_text())
    for method in tool.methods:
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        with pytest.raises(CheckpointError, match=r"says that .* quantised it") as error:
            zimage.load_component(tmp_path, "dit")
        assert tool.name in str(error.value)
