"""`zimage weights convert`: the same numbers under other names, nothing half-written, memory that does not grow."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import loose
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import zimage
from bench.weights import TRANSFORMER
from zimage.cli import main
from zimage.dit import ZImageDiT
from zimage.errors import CheckpointError
from zimage.vae import AutoencoderKLWan
from zimage.weights.convert import convert
from zimage.weights.writer import Planned, placing, write_file

PARTS = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae"}
SETTINGS = {"seed": 1, "steps": 1, "width": 64, "height": 48}


@pytest.fixture(scope="module")
def states():
    return loose.states()


@pytest.fixture(scope="module")
def folder(states, tmp_path_factory):
    return loose.write_folder(tmp_path_factory.mktemp("models") / "model", states)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Convert in an empty folder; returns (status, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = main(["weights", "convert", *map(str, arguments)])
        return status, capsys.readouterr().err

    return call


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("part", "layout"), [("dit", "native"), ("vae", "ldm"), ("text_encoder", "bare"), ("text_encoder", "transformers")]
)
def test_to_a_single_file_and_back(run, folder, states, part, layout):
    assert run(folder, "file.safetensors", "--layout", layout)[0] == 0
    assert same(load_file("file.safetensors"), loose.renamed(part, layout, states[part]))
    status, err = run("file.safetensors", "again", "--layout", "diffusers")
    assert status == 0, err
    (again,) = Path("again").glob("*.safetensors")
    assert same(load_file(again), states[part])
    assert same(zimage.load_component("again", part, dtype="bf16").state_dict(), states[part])


def test_all_in_one_and_back_to_a_whole_folder_gives_the_same_pixels(run, folder, states):
    assert run(folder, "all.safetensors", "--layout", "all-in-one")[0] == 0
    expected = (
        loose.renamed("dit", "native", states["dit"], "model.diffusion_model.")
        | loose.renamed("text_encoder", "transformers", states["text_encoder"], "text_encoders.qwen3_4b.transformer.")
        | loose.renamed("vae", "ldm", states["vae"], "vae.")
    )
    assert same(load_file("all.safetensors"), expected)
    assert run("all.safetensors", "whole", "--layout", "diffusers", "--configs", folder)[0] == 0
    pictures = [zimage.ZImage.load(f, dtype="fp32", device="cpu").generate("a cat", **SETTINGS).images[0]
                for f in (folder, "whole")]  # fmt: skip
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_one_component_of_many(run, folder, states):
    assert run(folder, "vae.safetensors", "--component", "vae")[0] == 0
    assert same(load_file("vae.safetensors"), states["vae"])
    status, err = run(folder, "x.safetensors")
    assert status == 2
    assert "choose one with --component" in err


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", "float32"), ("fp16", "float16"), ("keep", "bfloat16")])
def test_dtypes(run, folder, states, dtype, kind):
    assert run(folder / "transformer", "out", "--dtype", dtype)[0] == 0
    (file,) = Path("out").glob("*.safetensors")
    assert same(load_file(file), {key: value.to(getattr(torch, kind)) for key, value in states["dit"].items()})


@pytest.mark.parametrize(
    "writer",
    [loose.lightx2v_fp8, loose.int8_rows, loose.in_blocks(torch.int8, 64, 128)],
    ids=["fp8 per row", "int8", "blocks"],
)
def test_quantised_weights_are_widened_and_not_kept(run, states, writer):
    file, numbers = loose.quantised(states["dit"], writer)
    loose.save(file, Path("fp8.safetensors"))
    status, err = run("fp8.safetensors", "out.safetensors", "--layout", "native")
    assert (status, "cannot be kept; pass a --dtype" in err) == (2, True)
    assert run("fp8.safetensors", "out.safetensors", "--layout", "diffusers", "--dtype", "fp32")[0] == 0
    found = load_file("out.safetensors")
    assert found.keys() == numbers.keys()
    assert all(torch.allclose(found[key], numbers[key].float(), rtol=1e-6) for key in numbers)


def test_gguf_files_are_unpacked(run, states):
    pytest.importorskip("gguf")
    native = loose.renamed("dit", "native", states["dit"])
    numbers = loose.write_gguf(Path("dit.gguf"), "lumina2", native, "Q8_0", loose.is_matrix)
    assert run("dit.gguf", "out.safetensors", "--layout", "native", "--dtype", "fp32")[0] == 0
    found = load_file("out.safetensors")
    assert found.keys() == numbers.keys()
    assert all(torch.allclose(found[key], numbers[key].float(), rtol=1e-6) for key in numbers)


def test_a_wan_vae_keeps_its_names(run, tmp_path):
    (tmp_path / "wan").mkdir()
    shapes = AutoencoderKLWan.from_config(tiny.WAN).published_shapes()
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    loose.save(tensors, tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "wan" / "config.json").write_text(json.dumps(tiny.WAN))
    assert run("wan", "out", "--dtype", "fp16")[0] == 0
    assert same(load_file("out/diffusion_pytorch_model.safetensors"), {k: v.half() for k, v in tensors.items()})
    status, err = run("wan", "wan.safetensors", "--layout", "ldm")
    assert (status, "no names for AutoencoderKLWan" in err) == (2, True)


def test_folders_are_sharded_with_an_index_and_bring_their_other_files(run, folder, states):
    assert run(folder, "out", "--shard-size", "20M")[0] == 0
    index = json.loads(Path("out/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(Path("out/transformer").glob("*.safetensors"))
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05}.safetensors"
    assert max(shard.stat().st_size for shard in shards) < 20_100_000
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in states["dit"].values())
    assert same(zimage.load_component("out", "dit", dtype="bf16").state_dict(), states["dit"])
    for name in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        assert (Path("out") / name).read_bytes() == (folder / name).read_bytes()


def test_the_dtype_that_a_config_notes_follows(run, folder, tmp_path):
    (tmp_path / "te").mkdir()
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (tmp_path / "te" / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    os.link(folder / "text_encoder" / "model.safetensors", tmp_path / "te" / "model.safetensors")
    assert run("te", "out", "--dtype", "fp32")[0] == 0
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == "float32"


def test_nothing_is_replaced_unasked(run, folder):
    Path("vae.safetensors").write_text("mine")
    status, err = run(folder, "vae.safetensors", "--layout", "ldm")
    assert (status, "use --force" in err) == (2, True)
    assert Path("vae.safetensors").read_text() == "mine"
    assert run(folder, "vae.safetensors", "--layout", "ldm", "--force")[0] == 0
    assert run(folder, "out")[0] == 0
    assert run(folder, "out")[0] == 2
    assert run(folder, "out", "--force", "--dtype", "fp32")[0] == 0
    assert sorted(os.listdir()) == ["out", "vae.safetensors"]


@pytest.mark.parametrize(
    ("target", "arguments", "words"),
    [
        ("no/such.safetensors", ["--layout", "ldm"], "does not exist; make it first"),
        ("out", ["--layout", "native"], "is a single file"),
        ("model/inside", [], "lies inside"),
        ("model", ["--force"], "is the source itself"),
        (".", ["--force"], "is not a model folder"),
        ("full", ["--force"], "is not a model folder"),
        ("file", ["--force"], "does not replace with a folder"),
        ("out", ["--shard-size", "much"], "is not a size"),
        ("out", ["--shard-size", "0"], "is not a size"),
        ("out", ["--shard-size", "9" * 400], "is not a size"),
        ("out", ["--configs", "model"], "--configs is for loose files"),
    ],
)
def test_what_cannot_work_is_one_line(run, folder, tmp_path, target, arguments, words):
    os.symlink(folder, tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters.txt").write_text("")
    (tmp_path / "file").write_text("")
    before = sorted(os.listdir()), sorted(os.listdir(folder))
    status, err = run("model", target, *arguments)
    assert status == 2
    assert words in err
    assert len(err.splitlines()) == 1
    assert (sorted(os.listdir()), sorted(os.listdir(folder))) == before


@pytest.mark.parametrize(("name", "layout"), [("dit.safetensors", "native"), ("small", "diffusers")])
def test_what_a_link_leads_to_is_written_and_the_link_stays(run, folder, tmp_path, name, layout):
    (tmp_path / "disk").mkdir()
    os.symlink(f"disk/{name}", name)
    for more in ([], ["--force"]):  # the first makes what is behind the link, the second replaces it
        assert run(folder, name, "--layout", layout, *more)[0] == 0
        assert os.readlink(name) == f"disk/{name}"
        assert os.listdir("disk") == [name]


def test_a_pipe_is_not_replaced(run, folder):
    os.mkfifo("pipe.safetensors")
    status, err = run(folder, "pipe.safetensors", "--layout", "native", "--force")
    assert (status, "pipe.safetensors is a named pipe; name a regular file" in err) == (2, True)
    assert stat.S_ISFIFO(os.stat("pipe.safetensors").st_mode)


def test_a_folder_is_not_replaced_by_its_own_component(run, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    status, err = run("model/vae", "model", "--force")
    assert (status, "would be replaced" in err) == (2, True)
    assert (tmp_path / "model" / "vae" / "config.json").is_file()


def test_a_source_that_is_none(run, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    (tmp_path / "pickle.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    for source, words in (
        ("none", "does not exist"), ("cut.safetensors", "not a whole safetensors file"),
        ("empty", "holds no component"), ("other.safetensors", "holds no component"),
        ("pickle.safetensors", "is a pickle"),
    ):  # fmt: skip
        status, err = run(source, "out.safetensors", "--layout", "native")
        assert status == 1, source
        assert words in err
    assert not (tmp_path / "out.safetensors").exists()


def test_too_little_room_is_said_first(run, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 70_000_000))
    status, err = run(folder, "out", "--dtype", "fp32")
    assert (status, "are to be written and 0.00 GB are free" in err) == (2, True)
    assert os.listdir() == []


def test_a_value_beyond_fp16_is_named_and_nothing_left(run, states):
    key = "layers.0.feed_forward.w2.weight"
    loose.save({**states["dit"], key: states["dit"][key] * 1e9}, Path("in.safetensors"))
    status, err = run("in.safetensors", "out.safetensors", "--layout", "native", "--dtype", "fp16")
    assert (status, f"{key} holds" in err, "use bf16" in err) == (1, True, True)
    assert os.listdir() == ["in.safetensors"]


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_an_interruption_leaves_what_was_there(run, folder, monkeypatch, target):
    assert run(folder, target, "--component", "vae")[0] == 0

    def state():
        return {f: f.read_bytes() for f in sorted(Path(".").rglob("*")) if f.is_file()}

    before, calls = state(), iter(range(40))

    def interrupted(*_):
        if next(calls) == 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["zimage.cli.weights"].Watch, "__call__", interrupted)
    status, err = run(folder, target, "--component", "vae", "--dtype", "fp32", "--force")
    assert (status, f"{target} was not changed" in err) == (130, True)
    assert state() == before


def test_a_disk_that_fills_up_is_one_line(run, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zimage.weights.writer._write_piece", full)
    status, err = run(folder, "out")
    assert (status, "error: out: No space left on device" in err, len(err.splitlines())) == (1, True, 1)
    assert os.listdir() == []


def test_all_zero_pieces_are_holes_that_read_as_zeros(tmp_path):
    tensors = {"zeros": torch.zeros(8 << 20), "ones": torch.ones(3), "end": torch.zeros(1 << 20, dtype=torch.bfloat16)}
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16"}
    plan = [Planned(k, kinds[v.dtype], tuple(v.shape), lambda v=v: iter(v.split(1 << 20))) for k, v in tensors.items()]
    with placing(tmp_path / "a.safetensors", replace=False) as temporary:
        write_file(temporary, plan)
    assert same(load_file(tmp_path / "a.safetensors"), tensors)
    assert (tmp_path / "a.safetensors").stat().st_blocks * 512 < 1 << 20
    wrong = [Planned("short", "F32", (4,), lambda: iter([torch.ones(3)]))]
    with (
        pytest.raises(CheckpointError, match="short: 12 bytes came instead of 16"),
        placing(tmp_path / "b", False) as temporary,
    ):
        write_file(temporary, wrong)
    assert os.listdir(tmp_path) == ["a.safetensors"]


PROGRAM = """
import sys
from zimage.weights.convert import convert
from pathlib import Path
convert(Path(sys.argv[1]), Path(sys.argv[2]), to="native", dtype="bf16")
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def sparse_dit(file, misaligned=0, **changes):
    """A DiT of the published size but for `changes`, fp32 zeros that take no room on the disk; returns its length."""
    with torch.device("meta"):
        model = ZImageDiT.from_config({**TRANSFORMER, **changes})
    header, offset = {}, 0
    for key, value in model.state_dict().items():
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [offset, offset + 4 * value.numel()]}
        offset += 4 * value.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + misaligned)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    return 8 + len(text) + offset


SMALLER = {"dim": 1920, "n_heads": 15, "n_kv_heads": 15, "n_layers": 4, "n_refiner_layers": 1}


@pytest.mark.parametrize(
    ("changes", "misaligned", "file_gb"),
    [(SMALLER, 1, 1.1), pytest.param({}, 0, 24.6, marks=pytest.mark.full)],
)
def test_memory_does_not_grow_with_the_file(tmp_path, changes, misaligned, file_gb):
    length = sparse_dit(tmp_path / "in.safetensors", misaligned, **changes)
    assert length > file_gb * 1e9
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "in.safetensors", tmp_path / "out.safetensors"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 0.65e9
    out = (tmp_path / "out.safetensors").stat()
    assert out.st_size == pytest.approx(length / 2, rel=1e-4)
    assert out.st_blocks * 512 < 10e6


def test_as_a_function(folder, tmp_path):
    done = convert(folder, tmp_path / "dit.safetensors", to="native")
    assert (done.components, done.layout) == (("dit",), "native")
    assert done.path == tmp_path / "dit.safetensors"
