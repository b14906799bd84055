"""Loose files give the same picture as the published folder: every naming, every way to quantise, any combination."""

import json

import loose
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import zimage
from bench.weights import COMPONENTS
from zimage.cli import cli
from zimage.errors import CheckpointError, RequestError
from zimage.formats.checkpoint import Checkpoint
from zimage.formats.layouts import LAYOUTS, layout
from zimage.kernels.decode_k_blocks import HALVES
from zimage.kernels.rotate import rotate
from zimage.loading.weights import on_meta
from zimage.nn import ggml
from zimage.nn.packed import PackedLinear, is_packed
from zimage.nn.quant import QuantisedLinear

SETTINGS = {"seed": 1, "steps": 2, "width": 64, "height": 48}
FP32 = {"device": "cpu", "dtype": "fp32"}
gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def states():
    return loose.states()


@pytest.fixture(scope="module")
def folder(states, tmp_path_factory):
    return loose.write_folder(tmp_path_factory.mktemp("loose") / "model", states)


@pytest.fixture(scope="module")
def pixels(folder):
    return render(folder)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(5)
    caption = torch.randn(9, loose.QWEN["hidden_size"], generator=generator)
    return torch.randn(1, 16, 8, 6, generator=generator), torch.tensor([0.6]), [caption]


def render(*path, **settings):
    pipe = zimage.ZImage.load(*path, **FP32, **settings)
    return pipe.generate("a cat", **SETTINGS).images[0].tobytes()


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("part", "name"), [("dit", "native"), ("text_encoder", "bare"), ("text_encoder", "gguf"), ("vae", "ldm")]
)
def test_tables_are_bijections_on_the_published_keys(part, name):
    cls, config, _ = COMPONENTS["transformer" if part == "dit" else part]
    with on_meta():
        keys = list(cls.from_config(config).state_dict())
    known, last = layout(part, name), layout(part, name).last_index(keys)
    foreign = [known.foreign(key, last) for key in keys]
    assert len(set(foreign)) == len(keys)
    assert [known.canonical(key, last) for key in foreign] == keys


def test_native_names_are_those_of_the_published_file():
    cls, config, _ = COMPONENTS["transformer"]
    with on_meta():
        state = cls.from_config(config).state_dict()
    native = loose.renamed("dit", "native", state)
    assert len(native) == 453
    assert native["layers.29.attention.qkv.weight"].shape == (3 * 3840, 3840)
    for key in ("x_embedder.weight", "final_layer.linear.bias", "layers.0.attention.out.weight"):
        assert key in native
    assert "context_refiner.1.attention.k_norm.weight" in native


def test_loose_files_of_every_naming(states, folder, pixels, tmp_path):
    files = {
        "dit": loose.save(loose.renamed("dit", "native", states["dit"]), tmp_path / "a.safetensors"),
        "text_encoder": loose.save(loose.renamed("text_encoder", "bare", states["text_encoder"]), tmp_path / "b.bin"),
        "vae": loose.save(loose.renamed("vae", "ldm", states["vae"]), tmp_path / "c"),
    }
    assert render(**files, tokenizer=folder / "tokenizer", variant="turbo") == pixels
    canonical = {name: loose.save(states[name], tmp_path / f"{name}.safetensors") for name in files}
    assert render(**canonical, tokenizer=folder / "tokenizer", variant="turbo") == pixels


def test_parts_in_the_place_of_a_models_own(states, folder, pixels, tmp_path):
    native = loose.save(loose.renamed("dit", "native", states["dit"]), tmp_path / "dit.safetensors")
    assert render(folder, dit=native, variant="turbo") == pixels
    assert render(dit=folder / "transformer", text_encoder=folder / "text_encoder", vae=folder / "vae") == pixels


def test_an_all_in_one_file(states, folder, pixels, tmp_path):
    whole = (
        loose.renamed("dit", "native", states["dit"], "model.diffusion_model.")
        | loose.renamed("text_encoder", "transformers", states["text_encoder"], "text_encoders.qwen3_4b.transformer.")
        | loose.renamed("vae", "ldm", states["vae"], "vae.")
    )
    file = loose.save(whole, tmp_path / "model.safetensors")
    assert render(file, tokenizer=folder / "tokenizer", variant="turbo") == pixels
    loose.save({**whole, "model.diffusion_model.spare": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match="unexpected: spare"):
        zimage.ZImage.load(file, tokenizer=folder / "tokenizer", variant="turbo")


def test_the_variant_gives_the_shift_and_the_defaults(states, folder, tmp_path):
    file = loose.save(states["dit"], tmp_path / "dit.safetensors")
    parts = {"text_encoder": folder / "text_encoder", "vae": folder / "vae"}
    request = zimage.ZImage.load(dit=file, **parts, variant="base").prepare(zimage.Request("a cat")).request
    assert (request.shift, request.steps, request.guidance) == (6.0, 30, 4.0)
    with pytest.raises(RequestError, match="variant"):
        zimage.ZImage.load(dit=file, **parts).generate("a cat")


def test_a_loose_dit_in_a_model_folder_takes_its_schedule_and_says_so(states, folder, tmp_path):
    pipe = zimage.ZImage.load(folder, dit=loose.save(states["dit"], tmp_path / "dit.safetensors"))
    assert pipe.prepare(zimage.Request("a cat")).request.shift == 3.0
    assert any("schedule" in line and "shift 3" in line for line in pipe.model.assumptions)


def test_what_shapes_do_not_tell_is_said(states, folder, tmp_path):
    file = loose.save(states["dit"], tmp_path / "dit.safetensors")
    assert [line.split()[0] for line in zimage.ZImage.load(folder, dit=file, variant="base").model.assumptions] == [
        "DiT"
    ]
    assert zimage.ZImage.load(folder).model.assumptions == []
    done = CliRunner().invoke(cli, ["info", str(folder), "--dit", str(file)])
    assert done.exit_code == 0, done.output
    assert "assumed       DiT from a loose file" in done.output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: {"dit": f / "vae"}, "_class_name = 'AutoencoderKL' is not implemented"),
        (lambda f: {"dit": f / "vae" / "diffusion_pytorch_model.safetensors"}, "holds no dit; it holds vae"),
        (lambda f: {"dit": f / "nothing.safetensors"}, "is missing"),
        (lambda f: {"dit": f / "vae" / "config.json"}, "is not a whole safetensors file"),
        (lambda f: {"vae": f / "text_encoder" / "model.safetensors"}, "holds no vae; it holds text_encoder"),
    ],
)
def test_a_file_that_is_something_else(folder, change, says):
    with pytest.raises(CheckpointError, match=says):
        zimage.ZImage.load(folder, **change(folder))


def test_a_missing_tokenizer_says_where_to_get_one(states, folder, tmp_path):
    file = loose.save(states["text_encoder"], tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"use --tokenizer DIR.*Qwen3-4B"):
        zimage.ZImage.load(dit=folder / "transformer", text_encoder=file, vae=folder / "vae")
    with pytest.raises(RequestError, match="vae is missing"):
        zimage.ZImage.load(dit=folder / "transformer", text_encoder=file)


@pytest.mark.parametrize("content", [b"PK\x03\x04 and so on", b"\x80\x02}q\x00."])
def test_pickles_are_refused(folder, tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is a pickle"):
        zimage.ZImage.load(folder, dit=tmp_path / "model.safetensors")


def test_heads_of_another_size_need_a_config(tiny_folder):
    with pytest.raises(CheckpointError, match=r"heads of size 32.*config.json"):
        zimage.load_component(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors", "dit")


# ------------------------------------------------------------------ quantised

WRITERS = [
    loose.cast_fp8,
    loose.old_comfy_fp8,
    loose.lightx2v_fp8,
    pytest.param(loose.new_comfy_fp8, marks=loose.COMFY),
    pytest.param(loose.int8_convrot, marks=loose.COMFY),
    pytest.param(loose.nvfp4, marks=loose.COMFY),
]


@pytest.mark.parametrize("quantise", WRITERS, ids=lambda writer: getattr(writer, "__name__", None))
@pytest.mark.parametrize("naming", ["diffusers", "native"])
def test_quantised_files_give_the_numbers_they_hold(states, inputs, tmp_path, quantise, naming):
    file, numbers = loose.quantised(loose.renamed("dit", naming, states["dit"]), quantise)
    dit = zimage.load_component(loose.save(file, tmp_path / "dit.safetensors"), "dit", dtype="fp32")
    plain = zimage.load_component(loose.save(numbers, tmp_path / "plain.safetensors"), "dit", dtype="fp32")
    assert isinstance(dit.layers[0].feed_forward.w1, PackedLinear)
    ours, theirs = dit(*inputs), plain(*inputs)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_gguf(states, folder, inputs, tmp_path, kind):
    """The DiT under native names, the encoder under llama.cpp's."""
    native = loose.renamed("dit", "native", states["dit"])
    file = tmp_path / "dit.gguf"
    numbers = loose.write_gguf(file, "lumina2", native, kind, loose.is_matrix)
    dit = zimage.load_component(file, "dit", dtype="fp32")
    plain = zimage.load_component(loose.save(numbers, tmp_path / "plain.safetensors"), "dit", dtype="fp32")
    ours, theirs = dit(*inputs), plain(*inputs)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    names = loose.renamed("text_encoder", "gguf", states["text_encoder"])
    numbers = loose.write_gguf(tmp_path / "text.gguf", "qwen3", names, kind, lambda key: names[key].ndim == 2)
    text = zimage.load_component(tmp_path / "text.gguf", "text_encoder", dtype="fp32")
    canonical = {layout("text_encoder", "gguf").canonical(key): value.float() for key, value in numbers.items()}
    plain = zimage.load_component(loose.save(canonical, tmp_path / "t.safetensors"), "text_encoder", dtype="fp32")
    ids = torch.arange(12)[None]
    assert torch.allclose(text(ids), plain(ids), atol=1e-5)


@pytest.mark.parametrize("kind", ggml.BYTES)
def test_our_unpacking_is_the_packages(kind):
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (64 * 3, ggml.BYTES[kind]), dtype=np.uint8)
    for at in {**HALVES, "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}.get(kind, (0, 2)):
        codes[:, at : at + 2] = generator.normal(size=(len(codes), 1)).astype(np.float16).view(np.uint8)
    codes = codes.reshape(64, -1)
    want = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[kind])
    assert torch.equal(ggml.GGML(torch.from_numpy(codes), kind).decode(), torch.from_numpy(want))


def test_formats_in_the_headers_metadata(states, inputs, tmp_path):
    file, numbers = loose.quantised(states["dit"], loose.lightx2v_fp8)
    layers = {key.removesuffix(".weight"): {"format": "float8_e4m3fn"} for key in file if loose.is_matrix(key)}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    dit = zimage.load_component(loose.save(file, tmp_path / "dit.safetensors", metadata), "dit", dtype="fp32")
    plain = zimage.load_component(loose.save(numbers, tmp_path / "plain.safetensors"), "dit", dtype="fp32")
    assert torch.allclose(dit(*inputs), plain(*inputs), atol=1e-4)


@pytest.mark.parametrize("group", [4, 16, 256])
def test_rotations_are_their_own_inverse_and_as_described(group):
    x = torch.randn(3, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotate(x, group), loose.rotated_naively(x, group))
    assert torch.allclose(rotate(rotate(x, group), group), x)


@pytest.mark.parity
@loose.needs_comfy
@pytest.mark.parametrize(("quantise", "precision"), [(loose.int8_convrot, "int8"), (loose.new_comfy_fp8, "fp8")])
def test_codes_are_multiplied_as_they_are_where_precision_asks(states, folder, inputs, tmp_path, quantise, precision):
    file, numbers = loose.quantised(states["dit"], quantise)
    whole = loose.save(file, tmp_path / "dit.safetensors")
    dit = zimage.ZImage.load(folder, dit=whole, variant="turbo", **FP32, precision=precision).dit
    plain = zimage.load_component(loose.save(numbers, tmp_path / "plain.safetensors"), "dit", dtype="fp32")
    assert any(isinstance(module, QuantisedLinear) for module in dit.modules())
    ours, theirs = dit(*inputs), plain(*inputs)
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.1  # activations are rounded too


def test_a_folder_may_hold_quantised_weights(tiny_folder, tmp_path):
    """The config tells what shapes do not, so any size of head will do; and the whole pipeline runs."""
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file, numbers = loose.quantised(load_file(weights), loose.lightx2v_fp8)
    save_file(file, weights)
    pipe = zimage.ZImage.load(folder, **FP32)
    assert pipe.planner.sizes["dit"].weights < zimage.ZImage.load(tiny_folder, **FP32).planner.sizes["dit"].weights
    quantised = pipe.generate("a cat", **SETTINGS).images[0]
    save_file(numbers, weights)
    plain = zimage.ZImage.load(folder, **FP32).generate("a cat", **SETTINGS).images[0]
    assert np.abs(np.asarray(quantised, int) - np.asarray(plain, int)).max() <= 1


def test_nothing_is_widened_at_loading(states, tmp_path):
    file, _ = loose.quantised(states["dit"], loose.lightx2v_fp8)
    checkpoint = Checkpoint.of_file(loose.save(file, tmp_path / "dit.safetensors"), "dit")
    packed = checkpoint.reader()("layers.0.feed_forward.w1.weight")
    assert is_packed(packed)
    assert packed.codes.dtype == torch.float8_e4m3fn
    assert not packed.codes.is_contiguous() or packed.codes.untyped_storage().nbytes() > packed.codes.nbytes  # a view


def test_layouts_of_a_part_have_names_of_their_own():
    assert len({(known.component, known.name) for known in LAYOUTS}) == len(LAYOUTS)
