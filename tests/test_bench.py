"""The bench's own arithmetic: floors, ratios and tables. What it measures is not tested here."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import DIT, KL, QWEN

import zimage
from bench import card, tables, weights
from bench.__main__ import main
from bench.pairs import report
from bench.profile import SCENARIOS, Profile
from bench.roofline import costs
from bench.sides import zimage as sides_zimage
from zimage.dit import ZImageDiT
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL

DIT_PARAMETERS = 6_154_908_736


def test_floors_agree_with_the_published_sizes():
    """Two FLOPs per weight and token, attention's beside them; every block's weights read once."""
    found = costs(1024, 32)
    flops, traffic = found["step"]
    tokens = 4096 + 32
    attention = 34 * 4 * tokens**2 * 3840
    assert flops == pytest.approx(2 * 5.7e9 * tokens + attention, rel=0.05)
    assert traffic == pytest.approx(2 * DIT_PARAMETERS, rel=0.1)
    assert found["encode"][1] == pytest.approx(35 * 101e6 * 2, rel=0.02)
    assert found["decode"][0] == pytest.approx(10e12, rel=0.1)
    assert costs(256, 32)["decode"][0] < found["decode"][0] / 14


def test_roofline_sets_measured_figures_beside_floors(tmp_path):
    result = tmp_path / "result.txt"
    result.write_text("a table\n" + json.dumps({"median": {"zimage": {"step": 1.0, "decode": 0.5}}}))
    done = CliRunner().invoke(main, ["roofline", "--measured", str(result)])
    assert done.exit_code == 0, done.output
    rows = {row["stage"]: row for row in json.loads(done.output.splitlines()[-1])["stages"]}
    assert rows["step"]["measured_over_floor"] == pytest.approx(1 / rows["step"]["floor_s"])
    assert "measured_s" not in rows["encode"]
    assert f"{rows['decode']['measured_over_floor']:.2f}" in done.output


def test_sharded_weights_have_the_index_that_diffusers_wants(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    weights._write_shards(AutoencoderKL.from_config(KL), tmp_path, "model")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {name: safe_open(tmp_path / name, "pt") for name in set(index["weight_map"].values())}
    assert len(files) > 1
    tensors = [files[name].get_tensor(key) for key, name in index["weight_map"].items()]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in tensors)


def test_tables_come_from_saved_results(tmp_path, monkeypatch, capsys):
    runs = {"zimage": [{"step": 2.0, "peak_gb": 12.5}], "diffusers": [{"step": 4.0, "peak_gb": 12.5}]}
    report(runs, {"size": 256}, as_json=True)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "step.json").write_text(capsys.readouterr().out)
    text = tables.filled("before\n<!-- result: step -->\nthe table before\n<!-- end -->\nafter")
    assert "| a step, warm | 2 (2 to 2) | 4 (4 to 4) | 0.50 |" in text
    assert "the table before" not in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter")
    assert tables.filled(text) == text


def test_ratios_are_taken_pair_by_pair(capsys):
    """A machine that slows down between pairs changes no ratio."""
    runs = {
        "zimage": [{"step": 1.0}, {"step": 10.0}, {"step": 3.0}],
        "diffusers": [{"step": 2.0}, {"step": 20.0}, {"step": 6.0}],
    }
    report(runs, {"size": 256})
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["ratio"] == {"zimage": {"step": 0.5}}
    assert "3 (1 to 10)" in lines[1]
    assert lines[1].endswith("0.500")


def test_profile_sweeps_settings_and_measures_every_scenario(tmp_path, tiny_folder):
    output = tmp_path / "profile.json"
    arguments = ["--model", str(tiny_folder), "--repeat", "1", "--device", "cpu", "--output", str(output)]
    done = CliRunner().invoke(main, ["profile", *arguments, "--sweep", "precision=bf16,int8", "--sweep", "dtype=fp32"])
    assert done.exit_code == 0, done.output
    runs = json.loads(output.read_text())["runs"]
    assert [run["settings"]["precision"] for run in runs] == ["bf16", "int8"]
    for run in runs:
        assert list(run["median"]) == SCENARIOS
        for longer in ("encode_medium", "encode_with_template", "encode_with_thinking"):
            assert run["median"][longer]["tokens"] > run["median"]["encode_short"]["tokens"]
        assert run["median"]["generate_text"]["token_s"] > 0
        assert run["median"]["full_generation"]["total_s"] > run["median"]["full_generation"]["denoise_s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_card_needs_a_gpu_and_says_so():
    done = CliRunner().invoke(main, ["card"])
    assert (done.exit_code, done.output) == (1, "Error: card needs an NVIDIA GPU, and PyTorch sees none here\n")


def test_every_row_of_card_measures_or_fails_by_itself(monkeypatch):
    """On the CPU and in small, where it runs as on a GPU."""
    small = {"text_encoder": (Qwen3, QWEN, ""), "transformer": (ZImageDiT, DIT, ""), "vae": (AutoencoderKL, KL, "")}
    monkeypatch.setattr(card, "COMPONENTS", small)
    monkeypatch.setattr(card, "CONFIGURATIONS", {name: card.CONFIGURATIONS[name] for name in ("fp32", "flash2")})
    monkeypatch.setattr(card, "SIZES", (64, 128))
    rows = card.every_row(torch.device("cpu"), 1, ("demo", "encoder", "vae"))
    found = {(section, name): card.attempt(measured) for section, name, measured in rows}
    assert found["demo", "fp32"]["psnr_db"] == [99.0, 99.0]
    assert found["demo", "fp32"]["repeats_exactly"]
    assert "NVIDIA GPUs only" in found["demo", "flash2"]["error"]
    assert [row["error"] for row in found.values() if "error" in row] == [found["demo", "flash2"]["error"]]
    step = dict(card.dit_rows(torch.device("cpu"), 1))["bf16 64"]
    assert card.attempt(step)["ms"] > 0


def test_an_op_is_found_by_its_file(tmp_path, monkeypatch):
    """Adding an op means adding a file: tests and bench walk the folder."""
    from zimage import kernels

    text = Path(kernels.swiglu.__file__).read_text(encoding="utf-8")
    (tmp_path / "planted.py").write_text(text.replace('name="swiglu"', 'name="planted"'), encoding="utf-8")
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    names = [spec.name for spec in kernels.specs()]
    assert "planted" in names
    assert len(names) == len(set(names))


def test_the_first_readmes_figures_come_from_results():
    for title, (name, figure) in tables.HEADLINES.items():
        assert f"| {title} | {tables.read(name)['median']['zimage'][figure]:.3g} s" in tables.headlines()


def test_what_is_timed_is_encoding_and_not_the_cache(tiny_folder, monkeypatch):
    assert Profile(tiny_folder, {"device": "cpu"}).pipe.cache.entries == 0
    load, loaded = zimage.ZImage.load, []
    monkeypatch.setattr(zimage.ZImage, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    clock = SimpleNamespace(lap=lambda name: clock.figures.update({name: 1.0}), figures={}, total=lambda: None)
    clock.warm = lambda name, call: call()
    sides_zimage.render(clock, str(tiny_folder), 64, 1, "fp32", "a cat")
    assert loaded[0].cache.entries == 0


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--tests", "encode_shrt"], "encode_short"), (["--sweep", "dtype"], "KEY=VALUE")]
)
def test_profile_names_what_is_wrong(arguments, says):
    done = CliRunner().invoke(main, ["profile", *arguments])
    assert done.exit_code == 2
    assert says in done.output


SDCPP = """#!/bin/sh
for word; do [ "$previous" = -o ] && : > "$word"; previous=$word; done
echo "$@" > "$0.said"
echo "[INFO ] model.cpp:1 - loading tensors completed, taking 0.50s (process: 0.1s)"
echo "[INFO ] stable-diffusion.cpp:2 - get_learned_condition completed, taking 250 ms"
echo "[INFO ] stable-diffusion.cpp:3 - sampling completed, taking 3.00s"
echo "[INFO ] stable-diffusion.cpp:4 - decode_first_stage completed, taking 0.75s"
"""


def test_another_implementation_runs_on_the_same_weights_in_single_files(tmp_path, tiny_folder):
    """A stand-in for stable-diffusion.cpp: the files it is given are whole, its log is read, its memory counted."""
    folder, binary = shutil.copytree(tiny_folder, tmp_path / "model"), tmp_path / "sd-cli"
    (folder / "model_index.json").write_text("{}")  # or it would be filled with weights of full size
    binary.write_text(SDCPP)
    binary.chmod(0o755)
    arguments = [str(folder), "--against", "sdcpp", "--sdcpp", str(binary), "--pairs", "1", "--size", "64"]
    done = CliRunner().invoke(main, ["render", *arguments, "--steps", "2", "--dtype", "fp32"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.output.splitlines()[-1])
    theirs = result["median"]["sdcpp"]
    assert (theirs["load"], theirs["encode"], theirs["step"], theirs["decode"]) == (0.5, 0.25, 1.5, 0.75)
    assert 0 < theirs["peak_gb"] < 1
    assert set(result["ratio"]["zimage"]) == {*theirs}
    said = (tmp_path / "sd-cli.said").read_text().split()
    native = load_file(said[said.index("--diffusion-model") + 1])
    assert "layers.0.attention.qkv.weight" in native


def test_a_peers_binary_must_be_named(tmp_path):
    done = CliRunner().invoke(main, ["render", str(tmp_path), "--against", "sdcpp"])
    assert done.exit_code == 2
    assert "--sdcpp BINARY" in done.output
