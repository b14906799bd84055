"""The bench's own arithmetic: floors, ratios and tables. What it measures is not tested here."""

import json
import shutil
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click import ClickException
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import KL

import zimage
from bench import tables, weights, writers
from bench.__main__ import main
from bench.card import watch
from bench.card.command import check_room
from bench.card.record import Record
from bench.card.sections import MINUTES, SECTIONS
from bench.card.worker import Work
from bench.counted import milliseconds, summed
from bench.kernels import TOLERANCE, relative
from bench.pairs import report
from bench.peaks import DEVICES, peaks_of
from bench.profile import SCENARIOS, Profile, configurations, placements
from bench.ranks import NVLINK, decode_share, step_share
from bench.roofline import costs
from bench.sides import zimage as sides_zimage
from bench.timing import timed
from zimage.experiments.record import Record as ProfileRecord
from zimage.parallel.layout import attention_elements
from zimage.vae import AutoencoderKL

DIT_PARAMETERS = 6_154_908_736


def test_floors_agree_with_the_published_sizes():
    """Two FLOPs per weight and token, attention's beside them; every block's weights read once."""
    found = costs(1024, 32)
    flops, traffic = found["step"].plain, found["step"].bytes
    tokens = 4096 + 32
    attention = 34 * 4 * tokens**2 * 3840
    assert flops == pytest.approx(2 * 5.7e9 * tokens + attention, rel=0.05)
    assert traffic == pytest.approx(2 * DIT_PARAMETERS, rel=0.1)
    assert found["encode"].bytes == pytest.approx(35 * 101e6 * 2, rel=0.02)
    assert found["decode"].plain == pytest.approx(10e12, rel=0.1)
    assert costs(256, 32)["decode"].plain < found["decode"].plain / 14


def test_ranks_exchange_by_the_formula_and_gain_what_is_published():
    """2 × H100: 1.66 times one a step."""
    tokens, caption, heads = 4096, 32, 30
    blocks = [(tokens, 2), (tokens + caption, 30)]  # the noise refiner sees no caption
    moved = sum(n * attention_elements(1, 128, [length // 2] * 2, [heads // 2] * 2) for length, n in blocks)
    share = step_share(1024, caption, "bf16", 2)
    assert share.travelling == 2 * (moved // 2 + tokens // 2 * 64)  # of one rank, in bf16; and its patches
    alone, both = (sum(step_share(1024, caption, "bf16", n).seconds(DEVICES["h100"], NVLINK, "bf16")) for n in (1, 2))
    assert alone / both == pytest.approx(1.66, rel=0.05)


def test_a_decode_is_divided_but_for_what_all_ranks_do():
    alone, four = (decode_share(1024, 32, "bf16", n) for n in (1, 4))
    assert 0.25 <= four.cost.plain / alone.cost.plain <= 0.26
    assert alone.travelling == 0 < four.travelling < 100e6


@pytest.mark.parametrize(("ranks", "says"), [("2,x", "2,x"), ("0", "0"), ("2,,4", "2,,4")])
def test_numbers_of_ranks_are_checked(ranks, says):
    done = CliRunner().invoke(main, ["roofline", "--ranks", ranks])
    assert done.exit_code == 2
    assert says in done.output


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
    output = tmp_path / "profile.jsonl"
    arguments = ["--model", str(tiny_folder), "--repeat", "2", "--device", "cpu", "--output", str(output)]
    done = CliRunner().invoke(main, ["profile", *arguments, "--sweep", "precision=bf16,int8", "--sweep", "dtype=fp32"])
    assert done.exit_code == 0, done.output
    records = [ProfileRecord.from_plain(json.loads(line)) for line in output.read_text().splitlines()]
    assert [json.loads(record.line()) for record in records] == json.loads(done.output.splitlines()[-1])["records"]
    assert [(r.axes["precision"], r.axes["scenario"]) for r in records] == list(product(("bf16", "int8"), SCENARIOS))
    assert len({record.id for record in records}) == len(records)
    for first in (0, len(SCENARIOS)):
        found = {record.axes["scenario"]: record for record in records[first : first + len(SCENARIOS)]}
        for longer in ("encode_medium", "encode_with_template", "encode_with_thinking"):
            assert found[longer].counts["tokens"] > found["encode_short"].counts["tokens"]
        assert found["generate_text"].timings["token"] > 0
        assert found["full_generation"].timings["total"] > found["full_generation"].timings["denoise"] > 0
        assert found["repeated_encode"].memory["leak_bytes"] >= 0
        for record in found.values():
            assert record.kind == "profile"
            assert record.memory["cpu"] > 50e6
            assert all(least <= record.timings[name] <= most for name, (least, most) in record.spread.items())


def test_a_scenario_and_a_configuration_that_fail_are_records(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(Profile, "encode_short", lambda self: iter([][0]))
    arguments = ["--model", str(tiny_folder), "--repeat", "1", "--tests", "encode_short,cuda_sync", "--json"]
    done = CliRunner().invoke(main, ["profile", *arguments, "--sweep", "device=cpu,cuda:9"])
    assert done.exit_code == 0, done.output
    errors = [record["error"] for record in json.loads(done.output)["records"]]
    assert errors[:2] == ["IndexError: list index out of range", None]
    assert all("device 'cuda:9' is not on this machine" in error for error in errors[2:])


def test_profile_sweeps_every_placement_of_the_components(tiny_folder, monkeypatch):
    assert len(list(configurations(placements(["cpu", "cuda:0"])))) == 8
    arguments = ["--model", str(tiny_folder), "--repeat", "1", "--tests", "cuda_sync", "--json", "--sweep-devices"]
    monkeypatch.setattr("bench.profile.here", lambda: ["cpu"])
    (record,) = json.loads(CliRunner().invoke(main, ["profile", *arguments]).output)["records"]
    devices = {f"{name}_device": "cpu" for name in ("text_encoder", "dit", "vae")}
    assert record["load"] == {"model": str(tiny_folder), **devices}
    assert record["axes"] == {"scenario": "cuda_sync", **devices}


def test_what_is_measured_is_kept_when_a_profile_is_stopped(tmp_path, tiny_folder, monkeypatch):
    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Profile, "encode_short", stopped)
    output = tmp_path / "profile.jsonl"
    arguments = ["--model", str(tiny_folder), "--repeat", "1", "--tests", "cuda_sync,encode_short"]
    assert CliRunner().invoke(main, ["profile", *arguments, "--output", str(output)]).exit_code != 0
    assert [json.loads(line)["axes"]["scenario"] for line in output.read_text().splitlines()] == ["cuda_sync"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_card_needs_a_gpu_and_says_so():
    done = CliRunner().invoke(main, ["card"])
    assert (done.exit_code, done.output) == (1, "Error: card needs an NVIDIA GPU, and PyTorch sees none here\n")


SPEAKS = """
import json, os, sys, time
work = json.loads(sys.argv[1])
def say(*message): print(json.dumps(message), flush=True)
say("about", {})
say("section", "decode")
for name in ("hangs", "dies", "loses the GPU", "is in order"):
    if f"decode/{name}" not in work["skip"]:
        say("begin", name)
        time.sleep(60 * (name == "hangs"))
        print("out of luck", file=sys.stderr) or os._exit(3) if name == "dies" else None
        say("row", {"section": "decode", "name": name, "ms": 1.0})
        say("lost", "") or time.sleep(60) if name == "loses the GPU" else None
say("end")
"""


def test_a_row_that_hangs_is_stopped_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(watch, "COMMAND", [sys.executable, "-c", SPEAKS])
    work, clock = Work([512], 1, False, "", [], [], {}), watch.Clock({"decode": 20.0}, row_seconds=1.0)
    messages = list(watch.watched(work, clock))
    hung, died, lost, fine = (message[1] for message in messages if message[0] == "row")
    assert hung == {"section": "decode", "name": "hangs", "error": "stopped after 1 s"}
    assert died["error"] == "the process ended with status 3: out of luck"
    assert lost["ms"] == fine["ms"] == 1.0
    assert messages[-1] == ["end"]
    assert 18 < clock.left["decode"] < 19.2


def test_a_worker_that_cannot_start_ends_the_run(monkeypatch):
    monkeypatch.setattr(watch, "COMMAND", [sys.executable, "-c", "raise SystemExit('no room')"])
    work, clock = Work([512], 1, False, "", [], [], {}), watch.Clock({}, 1.0)
    assert list(watch.watched(work, clock))[-1][0] == "no"


def test_a_card_takes_at_most_ten_minutes():
    assert sum(section.seconds for section in SECTIONS) <= 60 * MINUTES - 10, "and some seconds to start"


def test_files_that_do_not_fit_are_not_begun(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=5e9))
    done = CliRunner().invoke(main, ["card", "--folder", str(tmp_path), "--output", str(tmp_path / "card.json")])
    assert done.exit_code == 2
    assert "has 5 GB free and 18 are needed; pass another --folder" in done.output
    check_room(tmp_path, ("peaks", "demo/int8"))  # these write none


def test_tables_of_a_card_come_from_its_rows(tmp_path, monkeypatch):
    """Where no GPU has been measured, the documents say so."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    block = "<!-- result: card -->\n<!-- end -->"
    assert "No GPU has been measured" in tables.filled(block)
    rows = [
        {"section": "steps", "name": "bf16 512", "ms": 92.1, "over_floor": 1.14},
        {"section": "steps", "name": "bf16 1024", "ms": 401.0, "over_floor": 1.13},
        {"section": "steps", "name": "bf16 1024 compiled", "error": "RuntimeError: no"},
        {"section": "steps", "name": "diffusers bf16 1024", "ms": 512.0},
        {"section": "attention", "name": "flash2", "absent": "flash_attn | is not installed"},
        {"section": "text", "name": "write", "ms_per_token": 25.2},
        {"section": "text", "name": "write, CUDA graphs", "not_run": "the section's time was over"},
    ]
    machine = {"torch": "2.13.0", "commit": "abc"}
    about = {"gpu": "RTX 4090", "driver": "580.1", "machine": machine, "command": "python -m bench card"}
    (tmp_path / "card.json").write_text(json.dumps({**about, "settings": {"sizes": [512, 1024]}, "rows": rows}))
    text = tables.filled(block)
    assert "| bf16 | 92.1 (1.14) | 401 (1.13) |" in text
    assert "| diffusers, bf16 | – | 512 |" in text
    assert "compiled" not in text, "a row that failed gives no figure"
    assert "not run" not in text
    assert "| writing, a token | 25.2 ms a token |" in text
    assert "`python -m bench card` (RTX 4090, driver 580.1, PyTorch 2.13.0, commit abc)" in text
    every = tables.filled("<!-- result: card_rows -->\n<!-- end -->")
    assert "| attention | flash2 | absent | flash_attn / is not installed |" in every
    assert "| steps | bf16 1024 compiled | FAILED | RuntimeError: no |" in every


def test_results_are_whole_after_every_row(tmp_path, monkeypatch):
    """The file is replaced, not written to: whoever reads it while a run goes on finds JSON."""
    record = Record(tmp_path / "card.json")
    record.begin({"gpu": "A"})
    record.add({"section": "decode", "name": "whole", "ms": 1.0})
    before = record.file.read_text()
    monkeypatch.setattr("json.dumps", lambda *a, **k: before[:20])
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record.add({"section": "decode", "name": "exact", "ms": 1.0})
    assert record.file.read_text() == before


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [1]}', "{}"])
def test_a_file_of_something_else_is_not_gone_on_with(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ClickException, match="is not a result of `bench card`"):
        Record.resumed(tmp_path / "card.json")


def test_a_gpu_is_known_by_its_name():
    assert peaks_of("NVIDIA GeForce RTX 4090") is DEVICES["rtx4090"]
    assert peaks_of("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    for other in ("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe", "Tesla T4"):
        assert peaks_of(other) is None


def test_attention_has_a_peak_of_its_own():
    """No precision makes attention quicker, and fp8 leaves four blocks as they are."""
    peaks, attention = DEVICES["rtx4090"], 34 / 34 * 32 * 4 * (4096 + 32) ** 2 * 3840
    step = {precision: costs(1024, 32, precision)["step"] for precision in ("bf16", "fp16", "fp8", "int8")}
    assert step["bf16"].plain == pytest.approx(55.1e12, rel=1e-3)
    assert step["int8"].plain == pytest.approx(attention, rel=0.01)
    assert step["fp8"].plain > 1.5 * attention
    ms = {precision: 1e3 * cost.seconds(peaks, precision) for precision, cost in step.items()}
    assert ms == pytest.approx({"bf16": 333.9, "fp16": 192.3, "fp8": 210.0, "int8": 121.5}, abs=0.1)


def test_a_counted_step_is_the_sum_of_its_launches():
    peaks = DEVICES["rtx4090"]
    launched = [
        ["products", 330e9, 0, "float16", 3],
        ["attention", 165e9, 0, "float16", 1],
        ["norm", 0, 1008e6, None, 2],
    ]
    assert milliseconds(launched, peaks) == pytest.approx({"products": 3.0, "attention": 1.0, "norm": 2.0})
    kinds = [("attention", 1), ("mm", 1), ("norm.kernel", 0), ("cat", 0)]
    launches = [
        SimpleNamespace(name=name, flops=flops, bytes=8, dtype=torch.int8) for name, flops in (*kinds, kinds[1])
    ]
    found = {entry[0]: entry[1:] for entry in summed(launches)}
    assert list(found) == ["attention", "products", "norm", "PyTorch's own passes"]
    assert found["products"] == [1, 8, "int8", 2]


def test_what_counting_lacks_is_said_in_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = CliRunner().invoke(main, ["roofline", "--counted"])
    assert (done.exit_code, done.output) == (1, "Error: nothing can be counted here: needs g++\n")


def test_times_do_not_count_the_first_call():
    calls = []
    timing = timed(lambda: time.sleep(0 if calls.append(1) or len(calls) > 1 else 0.2), "cpu", repeats=3)
    assert (timing.calls, len(calls)) == (3, 4)
    assert timing.least <= timing.ms <= timing.most < 100
    assert timed(lambda: time.sleep(0.05), "cpu", repeats=100, seconds=0.02).calls == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "error"),
    [
        ([1.0], [1.0], 0),
        ([0.0], [0.0], 0),
        ([1.5], [1.0], 0.5),
        ([1.0], [0.0], float("inf")),
        ([float("nan")], [1], None),
    ],
)
def test_a_difference_that_is_no_number_is_no_agreement(ours, theirs, error):
    found = relative(torch.tensor(ours), torch.tensor(theirs))
    assert not found <= TOLERANCE if error is None else found == error


def test_q4_k_files_hold_what_the_package_reads():
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) + 0.1
    found = gguf.quants.dequantize(writers.q4_k(weight).numpy(), gguf.GGMLQuantizationType.Q4_K)
    assert relative(torch.from_numpy(found), weight) < 0.1


def test_an_op_is_found_by_its_file(tmp_path, monkeypatch):
    """Adding an op means adding a file: tests and bench walk the folder."""
    from zimage import kernels

    text = Path(kernels.layer_norm.__file__).read_text(encoding="utf-8")
    (tmp_path / "planted.py").write_text(text.replace('name="layer_norm_scale"', 'name="planted"'), encoding="utf-8")
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    names = [spec.name for spec in kernels.specs()]
    assert "planted" in names
    assert len(names) == len(set(names))


def test_the_first_readmes_figures_come_from_results():
    for title, (name, figure) in tables.HEADLINES.items():
        assert f"| {title} | {tables.read(name)['median']['zimage'][figure]:.3g} s" in tables.headlines()


def test_what_is_timed_is_encoding_and_not_the_cache(tiny_folder, monkeypatch):
    assert Profile({"model": tiny_folder, "device": "cpu"}).pipe.cache.entries == 0
    load, loaded = zimage.ZImage.load, []
    monkeypatch.setattr(zimage.ZImage, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    clock = SimpleNamespace(lap=lambda name: clock.figures.update({name: 1.0}), figures={}, total=lambda: None)
    clock.warm, clock.on = lambda name, call: call(), lambda device: None
    sides_zimage.render(clock, str(tiny_folder), 64, 1, "fp32", "a cat")
    assert loaded[0].cache.entries == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tests", "encode_shrt"], "encode_short"),
        (["--sweep", "dtype"], "NAME=VALUE"),
        (["--sweep", "dtype=fp33"], "use bf16, fp16"),
        (["--sweep", "steps=4,8"], "steps is not a setting of loading"),
        (["--sweep-devices", "--device", "cpu"], "leave out --device"),
        (["--repeat", "0"], "is not in the range"),
        (["--output", "nowhere/profile.jsonl"], "nowhere/profile.jsonl lies in no folder; make nowhere first"),
    ],
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
