"""Opening and loading model folders: layouts that must give the same model, and damage that must be named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zimage
from zimage.errors import CheckpointError
from zimage.formats.checkpoint import Checkpoint

SETTINGS = {"seed": 1, "steps": 2, "width": 64, "height": 48}


def rewrite(folder, part, change, split=1):
    """Change a component's tensors and write them back, in `split` shards with an index when more than one."""
    file = next((folder / part).glob("*.safetensors"))
    tensors = change(load_file(file))
    if split == 1:
        save_file(tensors, file)
        return
    file.unlink()
    keys, weight_map = sorted(tensors), {}
    for n in range(split):
        name = f"{file.stem}-{n + 1:05}-of-{split:05}.safetensors"
        shard = {key: tensors[key] for key in keys[n::split]}
        save_file(shard, file.with_name(name))
        weight_map |= dict.fromkeys(shard, name)
    file.with_name(file.name + ".index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_config(folder, part, **changes):
    path = folder / part / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVED"}))


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def render(folder, **load):
    pipe = zimage.ZImage.load(folder, **{"dtype": "fp32", "device": "cpu", **load})
    return pipe.generate("a cat", **SETTINGS).images[0].tobytes()


def test_sharded_folders_give_the_same_pixels(tiny_folder, folder):
    for part in ("transformer", "text_encoder"):
        rewrite(folder, part, dict, split=3)
    assert render(folder) == render(tiny_folder)


def test_files_without_the_model_prefix_give_the_same_pixels(tiny_folder, folder):
    rewrite(folder, "text_encoder", lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    assert render(folder) == render(tiny_folder)


def test_stored_dtype_does_not_matter_where_values_are_exact(tiny_folder, folder):
    """Published DiTs come in fp32 and bf16; the tiny weights are exact in both."""
    rewrite(folder, "transformer", lambda t: {k: v.bfloat16() for k, v in t.items()})
    assert render(folder) == render(tiny_folder)


def test_weights_widened_late_give_the_same_pixels_from_half_the_memory(folder, tiny_folder, monkeypatch):
    for part in ("transformer", "text_encoder"):
        rewrite(folder, part, lambda t: {k: v.bfloat16() for k, v in t.items()})
    monkeypatch.setattr("zimage.loading.planner.KEEP_SHARE", 0.0)  # as on a machine where nothing fits
    pipe = zimage.ZImage.load(folder, dtype="fp32", device="cpu")
    assert pipe.dit.layers[0].feed_forward.w1.weight.dtype == torch.bfloat16
    assert pipe.generate("a cat", **SETTINGS).images[0].tobytes() == render(tiny_folder)


def test_weights_of_the_right_dtype_are_views_of_the_file(tiny_folder):
    pipe = zimage.ZImage.load(tiny_folder, dtype="fp32", device="cpu")
    mapped = pipe.dit.layers[0].feed_forward.w1.weight.data_ptr()
    with open("/proc/self/maps") as maps:
        ranges = [line.split() for line in maps if line.rstrip().endswith("diffusion_pytorch_model.safetensors")]
    spans = [tuple(int(x, 16) for x in columns[0].split("-")) for columns in ranges]
    assert any(start <= mapped < end for start, end in spans)


def test_weights_are_not_read_before_they_are_used(folder):
    """One touched page a tensor made the kernel read a third of the DiT before the first block could run."""
    dit = zimage.load_component(folder, "dit", dtype="fp32")
    assert dit.x_pad_token.is_cpu
    file = str(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    smaps = Path("/proc/self/smaps").read_text().split(file)[1:]
    resident = [line.split()[1] for part in smaps for line in part.splitlines()[:6] if line.startswith("Rss:")]
    assert resident
    assert set(resident) == {"0"}


def test_unaligned_tensors(tmp_path):
    """A writer may leave a header of any length."""
    content = torch.arange(6, dtype=torch.float32)
    file = tmp_path / "model.safetensors"
    header = '{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    for length in (len(header), len(header) + 1):
        file.write_bytes(length.to_bytes(8, "little") + header.ljust(length).encode() + content.numpy().tobytes())
        assert torch.equal(Checkpoint.of_folder(tmp_path, "vae").reader()("a"), content.view(2, 3))


def test_components_load_alone_and_agree(tiny_folder):
    pipe = zimage.ZImage.load(tiny_folder, dtype="fp32", device="cpu")
    captions = pipe.encode(["a cat", "a longer prompt"])
    refiner = zimage.load_component(tiny_folder, "context_refiner", dtype="fp32")
    assert all(torch.equal(a, b) for a, b in zip(refiner(captions), pipe.dit.refine(captions), strict=True))
    assert [len(r) % 32 for r in refiner(captions)] == [0, 0]
    vae = zimage.load_component(tiny_folder / "vae", "vae", dtype="fp32")
    latents = torch.randn(1, 16, 4, 4)
    assert torch.equal(vae.decode(latents), pipe.decode(latents))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: next((f / "transformer").glob("*.safetensors")).unlink(), "no weights were found"),
        (lambda f: _truncate(f / "transformer"), "is not a whole safetensors file"),
        (lambda f: _lose_shard(f), "1 of 2 shards are missing"),
        (lambda f: rewrite(f, "vae", lambda t: dict(list(t.items())[1:])), "1 tensors missing"),
        (lambda f: rewrite(f, "vae", lambda t: {**t, "extra": torch.ones(1)}), "1 tensors unexpected: extra"),
        (lambda f: rewrite(f, "transformer", _squash), r"x_pad_token \[64\] should be \[1, 64\]"),
        (lambda f: edit_config(f, "transformer", dim="REMOVED"), "the key 'dim' is missing"),
        (lambda f: edit_config(f, "transformer", dim="64"), "dim = '64' should be of type int"),
        (lambda f: edit_config(f, "transformer", n_kv_heads=1), "must equal n_heads"),
        (lambda f: edit_config(f, "text_encoder", hidden_act="gelu"), "hidden_act = 'gelu' is not implemented"),
        (lambda f: edit_config(f, "text_encoder", layer_types=["sliding_attention"]), "only 'full_attention'"),
        (lambda f: edit_config(f, "vae", _class_name="AutoencoderDC"), "'AutoencoderDC' is not implemented"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "vae" / "config.json").write_text("[]"), "should hold a JSON object"),
        (lambda f: (f / "vae" / "config.json").unlink(), "is missing"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "should hold tokenizer.json"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), "the tokenizer cannot be read"),
        (lambda f: _scheduler(f, use_dynamic_shifting=True), "use_dynamic_shifting = True is not implemented"),
    ],
)  # fmt: skip
def test_damage_is_named_in_one_line(folder, damage, words):
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as error:
        zimage.ZImage.load(folder, dtype="fp32", device="cpu")
    assert "\n" not in str(error.value)


def test_parts_that_do_not_fit_together_are_named(folder, monkeypatch):
    monkeypatch.setattr("zimage.loading.files.check_fit", lambda *_: None)  # as if the weights had the changed shapes
    for part, change, words in (
        ("vae", {"latent_channels": 8}, r"latent channels \(16\) must equal the VAE's \(8\)"),
        ("text_encoder", {"hidden_size": 32}, r"caption width \(64\) must equal the text encoder's width \(32\)"),
        ("text_encoder", {"vocab_size": 100}, "exceed the text encoder's 100"),
    ):
        before = (folder / part / "config.json").read_text()
        edit_config(folder, part, **change)
        with pytest.raises(CheckpointError, match=words):
            zimage.ZImage.load(folder, dtype="fp32", device="cpu")
        (folder / part / "config.json").write_text(before)


def test_without_a_scheduler_config_the_shift_must_be_given(folder):
    shutil.rmtree(folder / "scheduler")
    pipe = zimage.ZImage.load(folder, dtype="fp32", device="cpu")
    with pytest.raises(zimage.ZImageError, match="set the shift"):
        pipe.generate("a cat", **SETTINGS)
    assert pipe.generate("a cat", shift=3.0, **SETTINGS).request.shift == 3.0


def test_fingerprints_tell_models_apart(tiny_folder, folder):
    same = zimage.ZImage.load(folder).model.fingerprint
    assert same == zimage.ZImage.load(tiny_folder).model.fingerprint
    rewrite(folder, "vae", lambda t: {**t, "decoder.conv_in.bias": t["decoder.conv_in.bias"] + 1})
    assert zimage.ZImage.load(folder).model.fingerprint != same


def _truncate(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])


def _lose_shard(folder):
    rewrite(folder, "transformer", dict, split=2)
    next((folder / "transformer").glob("*-00002-of-*")).unlink()


def _squash(tensors):
    return {**tensors, "x_pad_token": tensors["x_pad_token"][0].contiguous()}


def _scheduler(folder, **changes):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
