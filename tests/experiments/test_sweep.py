"""Sweeps on a tiny model: cells have `gen`'s bits, nothing is done twice, failures stay alone, a kill loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import control_nets
import lora_files
import pytest
from click.testing import CliRunner
from PIL import Image

import zimage
from bench.__main__ import main as bench
from zimage.batch.rows import with_files
from zimage.cli import main
from zimage.errors import CheckpointError, RequestError
from zimage.experiments.again import opened
from zimage.experiments.record import CAPTIONS, RECORDS, WORKERS, Record, read_records
from zimage.experiments.recorded import request_of
from zimage.experiments.spread import with_paths
from zimage.pictures.files import read_metadata

ROOT = Path(__file__).parent.parent.parent
SMALL = ["--width", "64", "--height", "48", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """Two LoRA files."""
    folder = tmp_path_factory.mktemp("styles")
    for name, seed in (("one", 1), ("two", 2)):
        lora_files.write(
            folder / f"{name}.safetensors", lora_files.NAMINGS["kohya"](lora_files.factors([lora_files.ONE], seed))
        )
    return folder


@pytest.fixture
def sweep(tiny_folder, tmp_path, capsys):
    """A sweep into tmp_path/out: (exit status, records, standard error)."""

    def call(*arguments, folder="out", status=0):
        given = ["sweep", "a cat", *SMALL, "--model", tiny_folder, "-o", tmp_path / folder, *arguments]
        found = main(list(map(str, given)))
        said = capsys.readouterr().err
        assert found == status, said
        return read_records(tmp_path / folder), said

    return call


def pixels(path):
    with Image.open(path) as image:
        return image.tobytes()


def total(records, name):
    return sum(record.counts.get(name, 0) for record in records)


def test_every_cell_has_the_bits_of_gen(sweep, style, tiny_folder, tmp_path, capsys):
    lora = f"lora=,{style / 'one.safetensors'}:0.7"
    records, said = sweep("--vary", "steps=1,2", "--vary", lora, "--vary", "hidden_layer=,-3", "--seeds", "3-4")
    assert len(records) == 16
    assert "16 cells in" in said
    assert len({pixels(tmp_path / "out" / record.path) for record in records}) == 16
    for record in records[::5]:
        options = ["--steps", record.axes["steps"], "--seed", record.seed]
        options += ["--hidden-layer", record.axes["hidden_layer"]] if record.axes["hidden_layer"] else []
        options += ["--lora", record.axes["lora"][0]] if record.axes["lora"] else []
        alone = tmp_path / "alone.png"
        given = ["gen", "a cat", *SMALL, "--model", tiny_folder, *options, "-q", "-o", alone]
        assert main(list(map(str, given))) == 0
        assert pixels(alone) == pixels(tmp_path / "out" / record.path)
        assert read_metadata(alone) == read_metadata(tmp_path / "out" / record.path)


def test_a_record_tells_all_of_a_cell(sweep, tmp_path, tiny_folder):
    (record,), _ = sweep("--vary", "steps=2", "--seeds", "5")
    assert (record.axes, record.prompt, record.seed, record.kind) == ({"steps": 2}, "a cat", 5, "cell")
    assert record.request["shift"] == 3.0, "what was left open is decided"
    assert record.load == {"model": str(tiny_folder), "device": "cpu", "dtype": "fp32"}
    assert record.path == f"{record.id}.png"
    assert {"open", "load", "encode", "denoise", "decode"} <= record.timings.keys()
    assert record.memory["cpu"] > 50e6
    assert record.counts == {"loads": 3, "encodes": 1, "opened": 1}
    assert record.model["model"]["fingerprint"] == read_metadata(tmp_path / "out" / record.path)["model"]["fingerprint"]
    assert record.machine["dtype"] == "float32"
    assert record.error is None
    assert not (tmp_path / "out" / CAPTIONS).exists()


@pytest.mark.parametrize("residency", ["keep", "stage"])
def test_nothing_that_stays_the_same_is_loaded_or_encoded_twice(sweep, style, residency, tmp_path):
    loras = f"lora=,{style / 'one.safetensors'},{style / 'two.safetensors'}"
    axes = ["--vary", loras, "--vary", "system_prompt=,In oil.", "--vary", "guidance=0,2"]
    records, _ = sweep(*axes, "a dog", "--each", "--residency", residency, "--steps", "1")
    assert len(records) == 24
    assert total(records, "opened") == 1
    assert total(records, "loads") == 3, "text encoder, DiT and VAE, once each"
    assert total(records, "encodes") == 2 * 2 + 1, "two prompts, each with and without a system prompt, and a negative"
    assert len({pixels(tmp_path / "out" / record.path) for record in records}) == 24


def test_a_caption_is_not_encoded_again_for_another_model_with_the_same_encoder(sweep):
    records, _ = sweep("--vary", "precision=,int8", "--vary", "hidden_layer=,-3", "--steps", "1")
    assert (total(records, "opened"), total(records, "encodes")) == (2, 2)
    assert total(records, "loads") == 5, "the text encoder is loaded once, DiT and VAE with each of the two"


def test_what_is_done_is_not_done_again(sweep, tmp_path):
    before, _ = sweep("--vary", "steps=1,2")
    times = [(tmp_path / "out" / record.path).stat().st_mtime_ns for record in before]
    again, said = sweep("--vary", "steps=1,2")
    assert again == before
    assert "2 cells of 2 there already" in said
    larger, said = sweep("--vary", "steps=1,2,3", "--vary", "shift=,6")
    assert "2 cells of 6 there already" in said
    assert {record.id for record in before} < {record.id for record in larger}
    assert all(record.axes.keys() == {"steps", "shift"} for record in larger)
    assert [(tmp_path / "out" / record.path).stat().st_mtime_ns for record in before] == times
    (tmp_path / "out" / before[0].path).unlink()
    _, said = sweep("--vary", "steps=1,2")
    assert "1 cell of 2 there already" in said
    assert (tmp_path / "out" / before[0].path).is_file()


def test_folders_that_lie_where_a_sweep_draws_are_left_alone(sweep, tmp_path):
    for name in ("captions", "workers"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "own.txt").write_text("a caption for training")
    (tmp_path / "out" / WORKERS).mkdir()  # of a sweep with workers that was killed
    sweep("--steps", "1")
    assert all((tmp_path / "out" / name / "own.txt").is_file() for name in ("captions", "workers"))
    assert not [name for name in (CAPTIONS, WORKERS) if (tmp_path / "out" / name).exists()]


def test_a_picture_is_on_the_disk_before_its_record(sweep, tmp_path, monkeypatch):
    fsync, settled = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda file: settled.append(os.fstat(file).st_ino) or fsync(file))
    (record,), _ = sweep("--steps", "1")
    assert settled == [(tmp_path / "out" / name).stat().st_ino for name in (record.path, RECORDS)]


def test_bad_cells_are_records_and_the_others_go_on(sweep, tmp_path):
    axes = ["--vary", "model=,nowhere", "--vary", "hidden_layer=,-99", "--vary", "guidance=0,1", "--negative", "dogs"]
    records, said = sweep(*axes, "--steps", "1", status=1)
    errors = {(r.axes["model"], r.axes["hidden_layer"], r.axes["guidance"]): r.error for r in records}
    assert len(errors) == 8
    assert errors.pop((None, None, 1.0)) is None
    assert all(error.startswith("negative: it has no effect") for axes, error in errors.items() if axes[2] == 0)
    assert "hidden layer -99 does not exist" in errors[(None, -99, 1.0)]
    assert "nowhere" in errors[("nowhere", None, 1.0)]
    assert all(record.path is None for record in records if record.error)
    assert "7 of 8 cells failed; the same command tries them again" in said
    again, _ = sweep(*axes, "--steps", "1", status=1)
    assert {record.id for record in again} == {record.id for record in records}


def test_a_cell_that_fails_while_it_is_drawn_fails_alone(sweep, monkeypatch):
    from zimage.render import denoising

    step, calls = denoising._Batch.step, []

    def failing(self, reached):
        calls.append(reached.step)
        if len(calls) == 2:
            raise RuntimeError("the card fell off")
        return step(self, reached)

    monkeypatch.setattr(denoising._Batch, "step", failing)
    records, _ = sweep("--seeds", "0-2", "--steps", "1", status=1)
    assert [record.error for record in records] == [None, "RuntimeError: the card fell off", None]
    records, _ = sweep("--seeds", "0-2", "--steps", "1")
    assert [record.error for record in records] == [None] * 3


def test_a_file_and_options_make_a_sweep(sweep, tmp_path):
    (tmp_path / "sweep.toml").write_text(
        'prompts = ["never drawn"]\nseeds = "0-1"\n[settings]\nsteps = 3\n[vary]\nguidance = [0, 2]\n'
        '[[zip]]\nforce_think_block = ["", true]\nthinking_content = ["", "Soft, warm."]\n'
    )
    records, _ = sweep("--toml", tmp_path / "sweep.toml", "--steps", "1", "--vary", "shift=3,6")
    assert len(records) == 2 * 2 * 2 * 2
    assert {record.prompt for record in records} == {"a cat"}
    assert {record.request["steps"] for record in records} == {1}
    thought = {(r.request["force_think_block"], r.request["thinking_content"]) for r in records}
    assert thought == {(False, None), (True, "Soft, warm.")}


def test_an_axis_of_an_option_takes_the_place_of_the_files(tmp_path, capsys):
    (tmp_path / "sweep.toml").write_text('prompts = ["a"]\n[vary]\nsteps = [1, 2]\nshift = [3, 6]\n')
    given = ["sweep", "-o", tmp_path / "out", "--toml", tmp_path / "sweep.toml", "--vary", "steps=,8", "--dry-run"]
    assert main([*map(str, given), "--steps", "4"]) == 0
    labels = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert labels == [f"shift {shift}, steps {steps}, seed 0" for shift in (3, 6) for steps in ("default", "8")]
    assert main([*map(str, given), "--shift", "4"]) == 2
    assert "shift: every cell takes it from its axis" in capsys.readouterr().err


def test_prompts_and_axes_come_from_a_file_alone(tiny_folder, tmp_path, capsys):
    (tmp_path / "sweep.toml").write_text(f'prompts = ["a cat", "b"]\n[settings]\nsteps = 1\nmodel = "{tiny_folder}"')
    given = ["sweep", *SMALL, "--toml", tmp_path / "sweep.toml", "-o", tmp_path / "out"]
    assert main(list(map(str, given))) == 0, capsys.readouterr().err
    assert [record.prompt for record in read_records(tmp_path / "out")] == ["a cat", "b"]


def test_a_dry_run_draws_nothing_and_lists_all(tmp_path, capsys):
    given = ["sweep", "a cat", "-o", tmp_path / "out", "--vary", "steps=1,2", "--vary", "dtype=fp32,bf16", "--dry-run"]
    assert main(list(map(str, given))) == 0
    said = capsys.readouterr()
    assert [line.split("  ")[1] for line in said.out.splitlines()] == [
        "steps 1, dtype fp32, seed 0",
        "steps 2, dtype fp32, seed 0",
        "steps 1, dtype bf16, seed 0",
        "steps 2, dtype bf16, seed 0",
    ]
    assert "4 cells: 2 loads, 2 sets of LoRAs, 2 captions" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--vary", "stepz=1"], "there is no setting 'stepz' to vary; did you mean 'steps'?"),
        (["--vary", "steps=1", "--vary", "steps=2"], "steps: it stands in two axes"),
        (["--zip", "--vary", "steps=1,2", "--vary", "shift=3"], "zipped axes need as many values each"),
        (["--seeds", "x"], "seeds 'x' should be numbers and ranges"),
        (["--toml", "nowhere.toml"], "nowhere.toml"),
        (["--steps", "4", "--vary", "steps=1,2"], "steps: every cell takes it from its axis"),
    ],
)
def test_wrong_usage_is_one_line_before_anything_is_made(tmp_path, capsys, arguments, says):
    assert main(["sweep", "a cat", "-o", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_sweep_needs_a_prompt_or_embeddings(tmp_path, capsys):
    assert main(["sweep", "-o", str(tmp_path / "out"), "--vary", "steps=1"]) == 2
    assert "a prompt is needed" in capsys.readouterr().err


def test_one_sweep_at_a_time_writes_a_folder(sweep, tmp_path):
    from zimage.experiments.record import Journal

    with Journal(tmp_path / "out"):
        _, said = sweep("--steps", "1", status=2)
    assert "another command is writing the records" in said


def test_bench_has_the_same_command(tmp_path):
    command = [sys.executable, "-m", "bench", "sweep", "a cat", "-o", str(tmp_path / "out"), "--vary", "stepz=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "Draw PROMPTs under every combination" in CliRunner().invoke(bench, ["sweep", "--help"]).output


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A picture with a transparent corner, and a ControlNet."""
    folder = tmp_path_factory.mktemp("given")
    clear = Image.linear_gradient("L").resize((64, 48)).convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 20, 20))
    clear.save(folder / "clear.png")
    Image.radial_gradient("L").resize((96, 80)).convert("RGB").save(folder / "seen.png")
    sizes = {"control_layers_places": [0, 1], "control_refiner_layers_places": [0]}
    control_nets.write(folder / "union", "2.1", n_refiner_layers=1, **sizes)
    return folder


def conditions(given):
    image = ["--image", given / "clear.png", "--mask", "alpha", "--strength", "0.7", "--template", "photo-overcast"]
    return [*image, "--control", f"{given / 'union'}:{given / 'seen.png'}:0.4", "--steps", "3"]


def test_a_record_draws_its_picture_again(sweep, given, style, tmp_path):
    (record,), _ = sweep(*conditions(given), "--lora", f"{style / 'one.safetensors'}:0.5")
    read = read_records(tmp_path / "out")[0]
    assert read == record
    *_, last = opened(read.load).run(request_of(read))
    assert last.image.tobytes() == pixels(tmp_path / "out" / read.path)


@pytest.mark.parametrize(
    "image", ["a.png", {"name": "a.png"}, {"name": "a.png", "hash": "0" * 12, "path": "nowhere.png"}]
)
def test_a_record_whose_files_are_gone_or_never_were_is_refused(image):
    with pytest.raises((RequestError, CheckpointError), match=r"request\.image|nowhere\.png"):
        request_of(Record("a", request={"prompt": "a cat", "image": image}))


def test_a_picture_and_what_was_asked_for_make_the_request_of_a_job(seeing_folder, given):
    pipe = zimage.ZImage.load(seeing_folder, device="cpu", dtype="fp32", vision_model=seeing_folder / "vision")
    asked = {
        **{"prompt": "a cat", "seed": 1, "image": str(given / "clear.png"), "mask": "alpha"},
        **{"reference": [f"{given / 'seen.png'}:0.4"], "control": [f"{given / 'union'}:{given / 'seen.png'}:0.4"]},
    }
    job = pipe.prepare(zimage.Request.from_mapping(asked))
    pointed = with_files(asked, lambda role, path: path)
    assert with_paths(pipe.metadata(job, 0)["request"], pointed) == {**job.to_dict()["request"], "template": None}


@pytest.mark.full
def test_workers_draw_the_same_cells(sweep, style, tmp_path):
    axes = ["--vary", f"lora=,{style / 'one.safetensors'}", "--vary", "steps=1,2", "--vary", "hidden_layer=,-99"]
    alone, _ = sweep(*axes, folder="alone", status=1)
    spread, said = sweep(*axes, "--workers", "2", status=1)
    assert "4 of 8 cells failed" in said
    told = ("id", "axes", "prompt", "seed", "request", "load", "path", "error", "model", "version")
    plain = [{record.id: [getattr(record, name) for name in told] for record in found} for found in (alone, spread)]
    assert plain[0] == plain[1]
    for record in alone:
        if record.path:
            assert pixels(tmp_path / "alone" / record.path) == pixels(tmp_path / "out" / record.path)
    _, said = sweep(*axes, "--workers", "2", status=1)
    assert "4 cells of 8 there already" in said
    assert not (tmp_path / "out" / WORKERS).exists()


def test_encoders_need_workers(tmp_path, capsys):
    assert main(["sweep", "a cat", "-o", str(tmp_path / "out"), "--encoders", "1"]) == 2
    assert "encoders: they have no effect without workers" in capsys.readouterr().err


# A process that has loaded what takes time and forks a sweep for every kill.
KILLS = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import zimage.pipeline, zimage.experiments.drawing
from zimage.cli import main

def start(arguments):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        os._exit(main(arguments))
    return child

given, kills = json.loads(sys.argv[1]), int(sys.argv[2])
draw, begun = random.Random(1), time.monotonic()
assert os.waitpid(start([*given, "-o", "whole"]), 0)[1] == 0, open("log").read()
seconds, killed = time.monotonic() - begun, 0
while killed < kills:
    child = start([*given, "-o", "killed"])
    time.sleep(draw.uniform(0.02, seconds / 4))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        killed += 1
    else:  # it was done before
        assert os.waitstatus_to_exitcode(status) == 0, open("log").read()
        os.rename("killed", f"done{killed}")
assert os.waitpid(start([*given, "-o", "killed"]), 0)[1] == 0, open("log").read()
"""


@pytest.mark.parametrize("residency", [pytest.param("keep", marks=pytest.mark.full), "stage"])
def test_a_sweep_killed_at_ten_moments_ends_with_the_same_cells(tiny_folder, style, tmp_path, residency):
    axes = ["--vary", f"lora=,{style / 'one.safetensors'}", "--vary", "hidden_layer=,-3", "--vary", "steps=2,4"]
    given = ["sweep", "a cat", *SMALL, "--model", str(tiny_folder), *axes, "--seeds", "0-1", "--residency", residency]
    command = [sys.executable, "-c", KILLS, json.dumps(given), "10"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole, killed = (read_records(tmp_path / name) for name in ("whole", "killed"))
    assert len(whole) == 16
    assert {record.id: lasting(record) for record in whole} == {record.id: lasting(record) for record in killed}
    for record in whole:
        assert pixels(tmp_path / "whole" / record.path) == pixels(tmp_path / "killed" / record.path)
    names = {record.path for record in whole} | {RECORDS}
    assert {path.name for path in (tmp_path / "killed").iterdir()} == names, "nothing is left over"


def lasting(record):
    """What of a record does not depend on the process that drew it."""
    return {**vars(record), "timings": None, "counts": None, "memory": None}
