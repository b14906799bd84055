"""Models found where people have them: folders with another DiT, tokenizers, variants, shards, the hub's cache."""

import json
import os
import shutil
from pathlib import Path

import loose
import pytest
import tiny
from safetensors.torch import load_file

import zimage
from zimage.cli import main
from zimage.errors import CheckpointError
from zimage.formats.hub_cache import snapshot
from zimage.loading.files import ModelFiles

FP32 = {"device": "cpu", "dtype": "fp32"}
DIT = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def states():
    return loose.states()


@pytest.fixture(scope="module")
def folder(states, tmp_path_factory):
    return loose.write_folder(tmp_path_factory.mktemp("found") / "model", states)


@pytest.fixture
def dit(states, tmp_path):
    return loose.save(states["dit"], tmp_path / "dit.safetensors")


def shift_of(*path, **settings):
    pipe = zimage.ZImage.load(*path, **FP32, **settings)
    return pipe.prepare(zimage.Request("a cat")).request.shift, pipe.model.assumptions


def write_shift(folder, shift):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**tiny.SCHEDULER, "shift": shift}))
    return folder


# ------------------------------------------------------------------ what is not replaced


def test_a_folders_schedule_counts_for_another_dit(folder, dit, tmp_path):
    converted = shutil.copytree(folder / "transformer", tmp_path / "converted")
    shift, lines = shift_of(folder, dit=converted)
    assert (shift, lines) == (3.0, [f"DiT from another folder: the schedule of {folder} (shift 3) is assumed"])
    shift, lines = shift_of(folder, dit=dit)
    assert shift == 3.0
    assert lines[-1] == f"DiT from a loose file: the schedule of {folder} (shift 3) is assumed"


def test_a_dit_of_another_model_brings_its_schedule(folder, tmp_path):
    other = write_shift(shutil.copytree(folder, tmp_path / "other"), 6.0)
    shift, lines = shift_of(folder, dit=other / "transformer")
    assert (shift, lines) == (6.0, [f"DiT of another model: the schedule of {other} (shift 6) is assumed"])
    assert shift_of(folder, vae=other / "vae") == (3.0, [])


def test_options_override_the_folders_schedule(folder, dit):
    assert shift_of(folder, dit=dit, variant="base")[0] == 6.0
    pipe = zimage.ZImage.load(folder, dit=dit, **FP32)
    assert pipe.prepare(zimage.Request("a cat", shift=2.5)).request.shift == 2.5


def test_a_folder_without_what_is_replaced(folder, dit, tmp_path):
    rest = shutil.copytree(folder, tmp_path / "rest", ignore=shutil.ignore_patterns("transformer"))
    assert shift_of(rest, dit=dit)[0] == 3.0


def test_a_components_folder_is_not_a_model(folder):
    with pytest.raises(CheckpointError, match="is the folder of one component; pass it as dit"):
        zimage.ZImage.load(folder / "transformer")


# ------------------------------------------------------------------ tokenizers


@pytest.fixture
def parts(states, tmp_path):
    """Loose files without a tokenizer beside them."""
    (tmp_path / "parts").mkdir()
    return {name: loose.save(state, tmp_path / "parts" / f"{name}.safetensors") for name, state in states.items()}


def test_a_tokenizer_as_one_file(folder, parts):
    model = zimage.ZImage.load(**parts, tokenizer=folder / "tokenizer" / "tokenizer.json", **FP32).model
    assert model.tokenizer.encode("a cat") == tiny.tokenizer().encode("a cat").ids


def test_the_tokenizer_of_the_model_that_the_settings_name(folder, parts, tmp_path):
    config = tmp_path / "zimage.toml"
    config.write_text(f'[default]\nmodel = "{folder}"\n')
    options = [text for name, file in parts.items() for text in (f"--{name.replace('_', '-')}", str(file))]
    assert main(["info", "--config", str(config), *options]) == 0


def test_vocab_and_merges_beside_the_encoder(parts, tmp_path):
    place = tmp_path / "parts" / "tokenizer"
    place.mkdir()
    tiny.tokenizer().model.save(str(place))
    first = tiny.tokenizer().get_vocab_size(with_added_tokens=False)
    added = {str(first + i): {"content": token} for i, token in enumerate(tiny.SPECIAL_TOKENS)}
    (place / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    model = zimage.ZImage.load(**parts, **FP32).model
    assert model.tokenizer.encode("a <think>") == tiny.tokenizer().encode("a <think>").ids


def test_without_a_tokenizer_the_line_says_where_to_get_it(parts):
    with pytest.raises(CheckpointError, match=r"no tokenizer beside it; use --tokenizer DIR or FILE .*Qwen/Qwen3-4B"):
        zimage.ZImage.load(**parts)


# ------------------------------------------------------------------ names of files


def test_one_shard_is_not_a_model(folder, states, tmp_path):
    shard = loose.save(states["dit"], tmp_path / f"{DIT}-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=f"is one of 3 shards: pass the folder {tmp_path}"):
        zimage.ZImage.load(folder, dit=shard)
    whole = shard.rename(tmp_path / f"{DIT}-00001-of-00001.safetensors")
    zimage.ZImage.load(folder, dit=whole)


def in_shards(folder, variant=""):
    """The transformer's weights in two shards, with the names that diffusers gives a variant."""
    place = folder / "transformer"
    (file,) = place.glob("*.safetensors")
    tensors, names, index = load_file(file), [], {}
    for n, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        names.append(f"{DIT}{variant}-0000{n}-of-00002.safetensors")
        loose.save({key: tensors[key] for key in keys}, place / names[-1])
        index |= dict.fromkeys(keys, names[-1])
    file.unlink()
    path = place / f"{DIT}.safetensors.index{variant}.json"
    path.write_text(json.dumps({"weight_map": index}))
    return path, index, names


@pytest.mark.parametrize("sharded", [False, True])
def test_variants_in_folders(tiny_folder, tmp_path, sharded):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    for file in [*folder.glob("*/*.safetensors")]:
        file.rename(file.with_suffix(".bf16.safetensors"))
    if sharded:
        in_shards(folder, ".bf16")
    model = zimage.ZImage.load(folder, **FP32).model
    assert model.fingerprint[:4] == ModelFiles.of_folder(tiny_folder).fingerprint[:4]
    assert len(model.components["dit"].checkpoint.files) == 1 + sharded


def test_a_tensor_in_two_shards_names_both(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    _, index, names = in_shards(folder)
    place, key = folder / "transformer", next(key for key, name in index.items() if name == names[0])
    first, second = (load_file(place / name) for name in names)
    loose.save({**second, key: first[key] + 1}, place / names[1])
    with pytest.raises(CheckpointError, match=f"1 tensors lie in two shards, {names[0]} and {names[1]}: {key}"):
        zimage.ZImage.load(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "should hold a JSON object"),
        ({}, "'weight_map' should map"),
        ({"weight_map": {}}, "'weight_map' should map"),
        ({"weight_map": ["a"]}, "'weight_map' should map"),
        ({"weight_map": {"a": 1}}, "'weight_map' should map"),
        ({"weight_map": {"a": None}}, "'weight_map' should map"),
        *(
            ({"weight_map": {"a": name}}, "should be a safetensors file in the same folder")
            for name in ("..", "", ".", "../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors")
        ),
        ({"weight_map": {"a": "x\0.safetensors"}}, "should be a safetensors file in the same folder"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, "should be a safetensors file in the same folder"),
        ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, "should be a safetensors file in the same folder"),
        ({"weight_map": {"a": "x.safetensors"}}, "1 of 1 shards are missing: x.safetensors"),
        ({"weight_map": {"a": "pipe.safetensors"}}, "is a named pipe; it should be a regular file"),
        ({"weight_map": {"a": "folder.safetensors"}}, "is a folder; it should be a regular file"),
    ],
)
def test_indexes_are_checked(tiny_folder, tmp_path, content, says):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path, _, _ = in_shards(folder)
    os.mkfifo(path.with_name("pipe.safetensors"))
    path.with_name("folder.safetensors").mkdir()
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=says) as error:
        zimage.load_component(folder, "dit")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ the hub's cache


@pytest.fixture
def cached(tiny_folder, tmp_path):
    """A model as huggingface_hub caches it: blobs by their hashes, snapshots of links."""
    cache = tmp_path / "hub" / "models--Some-One--My-Model"
    (cache / "blobs").mkdir(parents=True)
    for n, file in enumerate(path for path in sorted(tiny_folder.rglob("*")) if path.is_file()):
        blob = shutil.copy(file, cache / "blobs" / f"{n:040x}")
        link = cache / "snapshots" / ("c0ffee" + 34 * "0") / file.relative_to(tiny_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return cache


def test_the_hubs_cache_is_a_model_with_a_name(cached, tmp_path, tiny_folder):
    (revision,) = (cached / "snapshots").iterdir()
    (tmp_path / "turbo").symlink_to(revision)
    for path in (cached, revision, tmp_path / "turbo"):
        pipe = zimage.ZImage.load(path, **FP32)
        assert pipe.model.name == "Some-One/My-Model"
        assert pipe.model.fingerprint == ModelFiles.of_folder(tiny_folder).fingerprint
    assert zimage.load_component(cached, "vae")
    vae = revision / "vae" / f"{DIT}.safetensors"
    assert ModelFiles.name.fget(_origin(vae)) == DIT


def _origin(path):
    model = object.__new__(ModelFiles)
    model.origin = path
    return model


def test_the_newest_snapshot_counts_and_main_first(cached):
    (old,) = (cached / "snapshots").iterdir()
    new = cached / "snapshots" / "beef"
    new.mkdir()
    os.utime(old, (1, 1))
    assert snapshot(cached) == new
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(old.name)
    assert snapshot(cached) == old
    for name in ("../../..", "gone", "", "x" * 200):
        (cached / "refs" / "main").write_text(name)
        assert snapshot(cached) == new
    shutil.rmtree(cached / "snapshots")
    with pytest.raises(CheckpointError, match="without a snapshot"):
        zimage.ZImage.load(cached)


@pytest.mark.parametrize("name", ["Tongyi-MAI/Z-Image-Turbo", "Some.One/my_model"])
def test_a_name_on_the_hub_says_what_downloads_it(name):
    with pytest.raises(CheckpointError, match=f"`zimage weights fetch {name}` downloads it"):
        zimage.ZImage.load(name)
    with pytest.raises(CheckpointError, match="downloads it"):
        zimage.load_component(name, "dit")


@pytest.mark.parametrize("path", ["no/such/folder", "nothing", "x" * 5000, "a/b..c", "ä/b", "a/" + "b" * 97])
def test_what_is_nowhere_is_said(path):
    with pytest.raises(CheckpointError, match="is neither a folder in the published layout nor a file") as error:
        zimage.ZImage.load(path)
    assert "fetch" not in str(error.value)


# ------------------------------------------------------------------ info of loose files


def test_info_shows_a_loose_files_header(states, tmp_path, capsys):
    native = loose.renamed("dit", "native", states["dit"], "model.diffusion_model.")
    file = loose.save(native, tmp_path / "dit.safetensors", {"a\x1b": "line\nbreak \x1b]0;x\x07" + "y" * 500})
    assert main(["info", str(file)]) == 0
    out = capsys.readouterr().out
    assert f"{file}  safetensors, " in out
    assert "holds         dit (native names behind model.diffusion_model.)" in out
    assert f"BF16        {len(native):>8,}" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) < 250
    assert main(["info", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["tensors"]) == facts["dtypes"]["BF16"]["tensors"] == len(native)
    assert facts["bytes"] == file.stat().st_size
    assert main(["info", str(file), "--plan"]) == 2


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["transformer.layers.0.attention.to_q.lora_A.weight"], "LoRA or another adapter"),
        (["lora_unet__layers_0_attention_qkv.hada_w1_a"], "LoRA or another adapter"),
        (["layers.0.attention.to_q.qweight", "layers.0.attention.to_q.wscales"], "quantised by nunchaku (SVDQuant)"),
        (["something.else"], "nothing that is known here"),
    ],
)
def test_info_says_what_a_file_is(tmp_path, capsys, keys, says):
    file = loose.save({key: loose.described({}) for key in keys}, tmp_path / "x")
    assert main(["info", str(file)]) == 0
    assert says in capsys.readouterr().out


def test_a_file_that_may_not_be_read_is_one_line(dit, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CheckpointError, match=f"{dit} cannot be read: Permission denied"):
        zimage.load_component(dit, "dit")


def test_info_shows_the_header_of_a_whole_model_without_a_tokenizer(states, folder, tmp_path, capsys):
    prefixes = {"dit": "diffusion_model.", "text_encoder": "text_encoders.llm.", "vae": "vae."}
    tensors = {prefix + key: value for name, prefix in prefixes.items() for key, value in states[name].items()}
    file = loose.save(tensors, tmp_path / "whole.safetensors")
    assert main(["info", str(file)]) == 0
    out = capsys.readouterr().out
    assert "tokenizer     none was found; a render needs --tokenizer\n" in out
    assert main(["info", str(file), "--plan"]) == 1
    assert "has no tokenizer beside it; use --tokenizer" in capsys.readouterr().err
    assert main(["info", str(file), "--tokenizer", str(folder / "tokenizer")]) == 0
    assert "vocabulary    261 tokens" in capsys.readouterr().out


def test_info_of_what_cannot_be_read(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x02}q\x00.")
    assert main(["info", str(tmp_path / "x.safetensors")]) == 1
    assert "is a pickle" in capsys.readouterr().err
    assert Path(tmp_path / "x.safetensors").is_file()


def test_a_folder_that_is_no_model_is_called_so(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not a model folder: it holds none of text_encoder, transformer, vae"):
        zimage.ZImage.load(tmp_path)


@pytest.mark.parametrize("option", ["model", "dit", "tokenizer", "vae", "cache-folder", "lora-folder"])
def test_an_empty_path_is_refused(folder, capsys, option):
    """As of a shell's variable that was not set: the folder's own file would be used without a word."""
    model = [] if option == "model" else ["--model", str(folder)]
    assert main(["gen", "a cat", *model, f"--{option}", ""]) == 2
    assert f"{option.replace('-', '_')}: the path is empty" in capsys.readouterr().err
