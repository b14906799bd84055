"""`zimage weights verify`: sound weights pass, and every kind of damage is named with its place."""

import json
import re
import shutil
import struct
import subprocess
import sys

import loose
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.weights import COMPONENTS
from zimage.cli import main
from zimage.formats.headers import read_header
from zimage.weights.components import all_finite
from zimage.weights.manifest import KNOWN, Record, find_known, hash_file, known_files

DIT = "transformer/diffusion_pytorch_model.safetensors"


def header_of(file):
    with file.open("rb") as stream:
        return read_header(stream, file.stat().st_size)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return loose.write_folder(tmp_path_factory.mktemp("models") / "model", loose.states())


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def run(capsys):
    """Verify; returns (status, what was printed)."""

    def call(*arguments):
        status = main(["weights", "verify", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def record(folder):
    """As a fetch would leave it."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    facts = {str(f.relative_to(folder)): {"size": f.stat().st_size, "sha256": hash_file(f).sha256} for f in files}
    Record(folder, "someone/model", "0" * 40, facts).write()


def test_a_sound_folder(run, folder):
    status, out = run(folder)
    assert status == 0
    assert re.search(rf"^ok +{DIT}  [\d.]+ \w+, \d+ tensors F32, hash not on record$", out, re.MULTILINE)
    assert re.search(r"^ok +dit  .* keys and shapes fit config.json$", out, re.MULTILINE)
    assert re.search(r"^ok +model  the components fit together; tokenizer of 261 entries, shift 3$", out, re.MULTILINE)
    assert out.splitlines()[-1] == f"{folder}: sound"


def test_json_says_the_same(run, folder):
    status, out = run(folder, "--json", "--values")
    said = json.loads(out)
    assert (status, said["sound"]) == (0, True)
    (dit,) = (report for report in said["reports"] if report["path"] == DIT)
    assert dit["size"] == (folder / DIT).stat().st_size
    assert dit["dtypes"] == {"F32": dit["tensors"]}
    assert "all values finite" in dit["notes"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(run, folder, value):
    tensors = load_file(folder / DIT)
    tensors["layers.1.feed_forward.w1.weight"][3, 4] = value
    save_file(tensors, folder / DIT)
    assert run(folder)[0] == 0
    status, out = run(folder, "--values")
    assert status == 1
    assert "layers.1.feed_forward.w1.weight holds 1 values that are NaN or infinite" in out
    assert re.search(rf"^WRONG +{DIT}", out, re.MULTILINE)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_place_and_dtype_is_looked_at(dtype, value):
    kind = getattr(torch, dtype)
    assert all_finite(torch.randn(1000).to(kind))
    for place in (0, 1, 17, 511, 998, 999):
        numbers = torch.randn(1000).to(kind)
        numbers[place] = value
        assert all_finite(numbers) == bool(numbers.float().isfinite().all())  # e4m3 has no infinity


def test_hashes_as_fetched(run, folder):
    record(folder)
    status, out = run(folder)
    assert (status, out.count("sha256 as fetched"), "not on record" in out) == (0, 9 - 1, False)
    content = bytearray((folder / DIT).read_bytes())
    content[-2] ^= 1
    (folder / DIT).write_bytes(content)
    status, out = run(folder)
    assert status == 1
    assert "when fetched; fetch it again" in out
    assert run(folder, "--no-hashes")[0] == 0
    assert run(folder / DIT)[0] == 1, "a file knows the record of its folder"
    assert run(folder / "transformer")[0] == 1
    (folder / DIT).write_bytes(content[:-4])
    assert "was fetched with" in run(folder)[1]
    (folder / DIT).unlink()
    assert "it is missing" in run(folder)[1]
    (folder / ".zimage-manifest.json").write_text("{}")
    assert "is damaged" in run(folder)[1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: _rewrite(f / DIT, lambda c: c[:-100]), "it is truncated"),
        (lambda f: _rewrite(f / DIT, lambda c: c + b"\0"), "1 bytes after the last tensor"),
        (lambda f: _rewrite(f / DIT, lambda c: b""), "0 bytes, too few"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), "it is not JSON"),
        (lambda f: (f / "vae" / "config.json").unlink(), "config.json is missing"),
        (lambda f: _change(f / DIT, lambda t: t.pop("x_pad_token")), "1 tensors missing: x_pad_token"),
        (lambda f: _change(f / DIT, lambda t: t.update(more=torch.ones(1))), "1 tensors unexpected: more"),
        (lambda f: shutil.rmtree(f / "vae"), "it has no vae"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    ],
)
def test_damage_is_named(run, folder, damage, words):
    (folder / "model_index.json").write_text("{}")
    assert run(folder)[0] == 0
    damage(folder)
    status, out = run(folder)
    assert status == 1, out
    assert words in out


def _rewrite(file, change):
    file.write_bytes(change(file.read_bytes()))


def _change(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "b overlaps a"),
        ({"a": entry(), "b": entry(offsets=(16, 24))}, "8 bytes before b belong to no tensor"),
        ({"a": entry(shape=(3,))}, "should take 12 bytes, not 8"),
        ({"a": entry(shape=(1 << 40, 1 << 40))}, "should take"),
        ({"a": entry(shape=(1 << 70,))}, "a whole number has more than 64 bits"),
        ({"a": entry(shape=(-2,), offsets=(8, 0))}, "whole numbers"),
        ({"a": entry(shape=(1,) * 100)}, "at most 8 axes"),
        ({"a": entry(shape=(2.0,))}, "whole numbers"),
        ({"a": entry(dtype="F33")}, "dtype 'F33' is unknown"),
        ({"a": entry(dtype=["F32"])}, "unusable"),
        ({"a": entry(offsets=(0, 8, 9))}, "unusable"),
        ({"a": {"dtype": "F32"}}, "lacks 'shape'"),
        ({"a": 3}, "unusable"),
        ({"a": entry(offsets=(0, 1 << 50), shape=(1 << 48,))}, "it is truncated"),
        ("[1]", "should hold a JSON object"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a": 1, "a": 1}', "a key appears twice"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_headers_that_lie(tmp_path, header, words):
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    assert words in " ".join(header_of(file).problems)
    assert main(["weights", "verify", str(file)]) == 1


@pytest.mark.parametrize("length", [25, 1 << 31, (1 << 64) - 1])
def test_a_declared_size_is_not_believed(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(22))
    (problem,) = header_of(tmp_path / "a.safetensors").problems
    assert f"declares a header of {length:,} bytes in a file of 32" in problem


def test_loose_files(run, made, tmp_path):
    states = loose.states()
    native = loose.save(loose.renamed("dit", "native", states["dit"]), tmp_path / "native.safetensors")
    status, out = run(native)
    assert (status, "ok    dit" in out, "the architecture inferred from their shapes" in out) == (0, True, True)
    assert run(made)[0] == 0
    assert run(made / "transformer")[0] == 0
    parts = loose.renamed("dit", "native", states["dit"], "model.diffusion_model.")
    parts |= loose.renamed("vae", "ldm", states["vae"], "vae.")
    status, out = run(loose.save(parts, tmp_path / "two.safetensors"))
    assert (status, out.count("keys and shapes fit")) == (0, 2)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    assert run(tmp_path / "other.safetensors")[0] == 1
    assert run(tmp_path / "none")[0] == 1


def test_a_loose_file_of_unusual_shapes_needs_the_config(run, tiny_folder, tmp_path):
    dit = loose.save(loose.renamed("dit", "native", load_file(tiny_folder / DIT)), tmp_path / "dit.safetensors")
    status, out = run(dit)
    assert (status, "heads of size 32" in out) == (1, True)
    status, out = run(dit, "--configs", tiny_folder)
    assert (status, "keys and shapes fit the given config" in out) == (0, True)
    assert run(tiny_folder, "--configs", tiny_folder)[0] == 2


def test_pickles_are_named_and_left_alone(run, folder):
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n(S'false'\ntR.")
    status, out = run(folder)
    assert (status, "a pickle: not opened, and never loaded" in out) == (0, True)


def test_the_manifest_knows_what_is_published_and_guesses_nothing():
    files = known_files()
    assert json.loads(KNOWN.read_text())["note"]
    assert (
        find_known("transformer/diffusion_pytorch_model-00002-of-00003.safetensors", "Tongyi-MAI/Z-Image").dtype
        == "BF16"
    )
    assert find_known("transformer/config.bin", "Tongyi-MAI/Z-Image") is None
    assert find_known("qwen_3_4b.safetensors").tensors == 398
    counts = {(f.role, f.layout): (f.tensors, f.parameters) for f in files if f.tensors}
    for role, part in (("dit", "transformer"), ("text_encoder", "text_encoder"), ("vae", "vae")):
        module, config, _ = COMPONENTS[part]
        with torch.device("meta"):
            weights = list(module.from_config(config).parameters())
        for layout in {layout for r, layout in counts if r == role}:
            tensors = 453 if layout == "native" else len(weights)
            assert counts[role, layout] == (tensors, sum(weight.numel() for weight in weights))
    for file in files:
        assert file.size is None or file.size > 0
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)


@pytest.mark.parametrize("command", [(), ("fetch",), ("verify",), ("convert",)])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\nfrom zimage.cli import main\nstatus = main(sys.argv[1:])\n"
        "print([m for m in ('torch', 'numpy', 'safetensors', 'huggingface_hub') if m in sys.modules], status)"
    )
    assert main(["weights"]) == 0
    arguments = [sys.executable, "-c", code, "weights", *command, "--help"]
    assert subprocess.check_output(arguments, text=True).splitlines()[-1] == "[] 0"
