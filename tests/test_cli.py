"""The command line as a user meets it: files, names, statuses, one-line errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from zimage.cli import cli, main
from zimage.pictures import files as picture_file

ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "1", "--width", "64", "--height", "48", "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def call(command, *arguments):
        quick = [*QUICK, "--model", str(tiny_folder)] if command != "info" else []
        status = main([command, *quick, *arguments])  # options given later win
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    call.model = ["--model", str(tiny_folder)]
    return call


def test_gen_is_the_default_command_and_names_the_file(run, tmp_path):
    status, out, err = run("a cat, face!", "--seed", "5")
    assert (status, out) == (0, "a-cat-face-5.png\n")
    assert "seed 5" in err
    assert Image.open(tmp_path / "a-cat-face-5.png").size == (64, 48)
    assert "\r" not in err, "no progress line in a pipe"


def test_default_names_are_numbered_and_never_overwritten(run, tmp_path):
    names = [run("gen", "a cat", "--seed", "5")[1].strip() for _ in range(3)]
    assert names == ["a-cat-5.png", "a-cat-5-2.png", "a-cat-5-3.png"]
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1


def test_an_explicit_file_is_replaced_and_it_says_so(run, tmp_path):
    (tmp_path / "out.png").write_text("old")
    status, out, err = run("gen", "a cat", "-o", "out.png")
    assert (status, out) == (0, "out.png\n")
    assert "replacing out.png" in err
    assert Image.open(tmp_path / "out.png").format == "PNG"
    assert os.listdir(tmp_path) == ["out.png"], "no temporary file is left"


def test_patterns_folders_and_many_images(run, tmp_path):
    (tmp_path / "d").mkdir()
    status, out, _ = run("gen", "a", "b", "--each", "-n", "2", "--seed", "3", "-o", "d/{index}-{prompt}-{seed}.webp")
    assert status == 0
    assert out.split() == ["d/1-a-3.webp", "d/2-a-4.webp", "d/3-b-3.webp", "d/4-b-4.webp"]
    assert run("gen", "a", "-n", "2", "-o", "same.jpg")[1].split() == ["same.jpg", "same-2.jpg"]
    assert run("gen", "a", "--seed", "1", "-o", "d")[1].split() == ["d/a-1.png"]


def test_prompts_from_standard_input_and_files(run, tmp_path, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("a cat\n"))
    assert run("gen", "-", "--seed", "1")[1] == "a-cat-1.png\n"
    (tmp_path / "prompts.txt").write_text("one\n\n  two  \n")
    assert run("gen", "--file", "prompts.txt", "--seed", "1")[1].split() == ["one-1.png", "two-1.png"]


def test_json_result_holds_every_setting(run):
    status, out, err = run("gen", "a cat", "--seed", "5", "--json", "--guidance", "2")
    result = json.loads(out)
    assert (status, err) == (0, "")
    assert result["images"][0]["path"] == "a-cat-5.png"
    assert result["images"][0]["request"]["guidance"] == 2.0
    assert result["images"][0]["request"]["negative"] == ""


def test_png_carries_settings_and_from_gives_the_same_pixels(run, tmp_path):
    run("gen", "a “quoted” cat", "--seed", "7", "--guidance", "1.5", "--negative", "dogs", "-o", "one.png")
    with Image.open(tmp_path / "one.png") as image:
        line = image.info["parameters"]
        one = image.tobytes()
    assert line.splitlines()[:2] == ["a “quoted” cat", "Negative prompt: dogs"]
    assert "Steps: 1, Sampler: Euler, Schedule type: Simple, CFG scale: 2.5, Seed: 7, Size: 64x48" in line
    status, _, err = run("gen", "--from", "one.png", "-o", "two.png")
    assert status == 0
    assert "warning" not in err
    assert Image.open(tmp_path / "two.png").tobytes() == one
    run("gen", "--from", "one.png", "--seed", "8", "-o", "three.png")
    assert Image.open(tmp_path / "three.png").tobytes() != one


def test_from_warns_when_something_differs(run, tmp_path, tiny_folder):
    run("gen", "a cat", "--seed", "7", "-o", "one.jpg")
    _, _, err = run("gen", "--from", "one.jpg", "-o", "two.png", "--dtype", "bf16")
    assert "warning: dtype was float32, now bfloat16: pixels may differ" in err


@pytest.mark.parametrize(
    ("fact", "before"),
    [
        ("model", {"name": "tiny", "fingerprint": "0123456789abcdef"}),
        ("precision", "int8"),
        ("attention", "flash2"),
        ("compile", True),
        ("device", "cuda"),
        ("torch", "1.0"),
        ("version", "0.0"),
    ],
)
def test_from_names_whatever_pixels_depend_on(run, tmp_path, fact, before):
    run("gen", "a cat", "--seed", "7", "-o", "one.png")
    with Image.open(tmp_path / "one.png") as image:
        record = json.loads(image.info["zimage"])
        assert str(tmp_path) not in image.info["zimage"], "no folders"
        picture_file.save(image, tmp_path / "before.png", {**record, fact: before}, replace=False)
    lines = run("gen", "--from", "before.png", "-o", "two.png")[2].splitlines()
    assert [line.split(" was ")[0] for line in lines if "warning" in line] == [f"warning: {fact}"]


@pytest.mark.parametrize(("name", "value"), [("model", "nowhere"), ("rewriter_url", "http://127.0.0.1:9"), ("o", "x")])
def test_a_picture_brings_a_request_and_nothing_else(run, tmp_path, name, value):
    """Whoever made it does not say which model is loaded, whom prompts are sent to or where files go."""
    run("gen", "a cat", "--seed", "7", "-o", "one.png")
    with Image.open(tmp_path / "one.png") as image:
        record = json.loads(image.info["zimage"])
        record["request"][name] = value
        picture_file.save(image, tmp_path / "made.png", record, replace=False)
    status, out, err = run("gen", "--from", "made.png", "--rewrite", "rewrite-expand")
    assert (status, out) == (2, "")
    assert err == f"error: made.png sets {name!r}, which is not a setting of a picture; remove it there\n"


def test_the_image_of_a_picture_is_given_again_and_told_by_its_content(run, tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (64, 48), colour).save(tmp_path / name)
    run("gen", "a cat", "--seed", "7", "--image", "a.png", "-o", "one.png")
    status, _, err = run("gen", "--from", "one.png", "-o", "two.png")
    assert status == 2
    assert "one.png was made from the image a.png" in err
    assert "pass it with --image" in err
    assert "warning" not in run("gen", "--from", "one.png", "--image", "b.png", "-o", "two.png")[2]
    assert Image.open(tmp_path / "two.png").tobytes() == Image.open(tmp_path / "one.png").tobytes()
    assert "warning: image was a.png" in run("gen", "--from", "one.png", "--image", "c.png", "-o", "two.png")[2]


def test_what_is_not_said_is_the_same_as_in_the_library(run, tmp_path, pipe):
    """No think block, no template, the layer and the steps of the checkpoint's kind."""
    main(["gen", "a cat", "--seed", "7", "--width", "64", "--height", "48", "-o", "one.png", *QUICK[6:], *run.model])
    expected = pipe.generate("a cat", seed=7, width=64, height=48)
    with Image.open(tmp_path / "one.png") as image:
        assert image.tobytes() == expected.images[0].tobytes()
        assert json.loads(image.info["zimage"]) == expected.metadata[0]
    assert expected.request.force_think_block is False


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["gen"], 2, "a prompt is needed; pass it as an argument"),
        (["gen", "a", "--template", "photo-overcats"], 2, "did you mean 'photo-overcast'"),
        (["gen", "a", "--steps", "0"], 2, "steps 0 is too small; the minimum is 1"),
        (["gen", "a", "--width", "1000"], 2, "nearest 992 or 1008"),
        (["gen", "a", "--height", "99999"], 2, "the maximum is 16384"),
        (["gen", "a", "--steps", "many"], 2, "not a valid int"),
        (["gen", "a", "--seed", "-2"], 2, "seed -2 is too small"),
        (["gen", "a", "--device", "tpu"], 2, "device 'tpu' is not known"),
        (["gen", "a", "--device", "cuda:9"], 2, "is not on this machine"),
        (["gen", "a", "--dtype", "fp8"], 2, "--dtype"),
        (["gen", "a", "--stepz", "3"], 2, "--stepz"),
        (["gen", "a", "--negative", "b"], 2, "no effect at guidance 0"),
        (["gen", "a", "-o", "nowhere/x.png"], 2, "does not exist"),
        (["gen", "a", "-o", "x.gif"], 2, "should end in one of .png"),
        (["gen", "a", "-o", "{what}.png"], 2, "its fields may be"),
        (["gen", "a", "-o", "{seed.x}.png"], 2, "is not valid; its fields may be"),
        (["gen", "--file", "absent.txt"], 2, "cannot be read"),
        (["gen", "a", "--file", "absent.txt"], 2, "not both"),
        (["gen", "--from", "absent.png"], 2, "is missing"),
        (["gen", "a", "--model", "nowhere"], 1, "is neither a folder"),
        (["info", "nowhere"], 1, "is neither a folder"),
    ],
)
def test_bad_input_is_one_line_and_a_status(run, tmp_path, arguments, status, words):
    found, out, err = run(*arguments)
    assert found == status
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_interrupting_leaves_nothing_half_written(tiny_folder, tmp_path):
    command = [sys.executable, str(ROOT / "cli.py"), "gen", "a", "--model", str(tiny_folder), *QUICK, "--steps", "1000"]
    process = subprocess.Popen(
        [*command, "--width", "256", "-n", "50"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "1000 steps" in process.stderr.readline()  # the settings, printed when the render begins
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: interrupted; the unfinished picture was not saved"
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_two_at_once_get_two_names(tiny_folder, tmp_path):
    command = [sys.executable, str(ROOT / "cli.py"), "gen", "a", "--model", str(tiny_folder), *QUICK, "--seed", "1"]
    processes = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in "ab"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == ["a-1-2.png", "a-1.png"]


def test_info_prints_components_sizes_and_memory(run, tiny_folder):
    status, out, _ = run("info", str(tiny_folder))
    assert status == 0
    for words in ("Qwen3", "ZImageDiT", "AutoencoderKL", "8 steps", "shift 3", "memory"):
        assert words in out
    facts = json.loads(run("info", str(tiny_folder), "--json")[1])
    assert [c["name"] for c in facts["components"]] == ["text_encoder", "dit", "vae"]
    assert facts["components"][1]["tensors"] == 73


def test_info_works_where_the_model_does_not_fit(run, tiny_folder, monkeypatch):
    monkeypatch.setattr("zimage.loading.planner.available_memory", lambda device: 1000)
    assert run("info", str(tiny_folder))[0] == 0
    status, _, err = run("gen", "a")
    assert status == 2
    assert "its weights alone are larger" in err


def test_the_plan_is_printed_before_loading(run, tiny_folder, monkeypatch):
    monkeypatch.setattr("zimage.loading.planner.process_memory", lambda: 300_000_000)  # not what other tests left here
    status, out, _ = run("info", str(tiny_folder), "--plan", "--memory", "4", "--width", "64", "--height", "32")
    assert status == 0
    for words in ("plan          64×32; at most 4.00 GB on cpu (memory 4)", "text encoder  cpu", "DiT", "VAE", "peak"):
        assert words in out
    facts = json.loads(run("info", str(tiny_folder), "--memory", "4", "--json")[1])["plan"]
    assert facts["limits"] == {"cpu": 4_000_000_000}
    assert all(0 < stage["peak"] <= 4_000_000_000 for stage in facts["stages"].values())
    more = json.loads(run("info", str(tiny_folder), "--memory", "4", "--json", "--batch-size", "4")[1])["plan"]
    assert more["stages"]["dit"]["activations"] > facts["stages"]["dit"]["activations"]
    status, _, err = run("gen", "a", "--memory", "4", "-v")
    assert status == 0
    assert err.index("at most 4.00 GB on cpu (memory 4)") < err.index("seed")


def test_a_budget_that_cannot_be_met_is_one_line_and_no_file(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("zimage.loading.planner.process_memory", lambda: 300_000_000)  # not what other tests left here
    for memory, words in (("0.01", "GB are allowed (memory 0.01); no size fits: set memory 0.4"), ("-1", "above 0")):
        status, out, err = run("gen", "a", "--memory", memory, "-q")
        assert (status, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
    assert "refused       " in run("info", str(tiny_folder), "--plan", "--memory", "0.01")[1]
    assert os.listdir(tmp_path) == []


def test_an_uninstalled_clone_says_how_to_install(tmp_path):
    process = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "cli.py"), "gen", "a"], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 1
    assert process.stderr.startswith("error: not installed yet (")
    assert "pip install -c constraints.txt -e ." in process.stderr
    assert process.stderr.count("\n") == 1


def test_words_the_demo_has_not_learned_are_hinted_at():
    from zimage.cli.hints import unknown_words
    from zimage.weights import DEMO

    assert unknown_words(DEMO, ["a cat on a blue background"]) is None
    hint = unknown_words(DEMO, ["a zebra and a tigre on a blue background"])
    assert hint.startswith("hint: this model does not know 'zebra', 'tigre'; similar: tiger")
    assert "cat" in hint
    assert unknown_words(DEMO.parent, ["a zebra"]) is None, "models without a vocabulary get no hints"


@pytest.mark.parametrize(
    ("lines", "options", "source"),
    [
        ("hidden_layer = -400", [], "(from zimage.toml [default] line 2)"),
        ("hidden_layer = -3", ["--hidden-layer", "-400"], None),
        ("layer_weights = {-2 = 1.0}", ["--hidden-layer", "-400"], None),
        ("width = 64", ["--hidden-layer", "-400"], None),
        ("memory = 1e-6", [], "(from zimage.toml [default] line 2)"),
        ("memory = 1e-6", ["--memory", "2e-6"], None),
    ],
)
def test_a_fault_that_shows_late_is_the_files_only_where_the_file_set_it(
    run, tiny_folder, tmp_path, monkeypatch, lines, options, source
):
    (tmp_path / "zimage.toml").write_text(f"[default]\n{lines}\n")
    monkeypatch.setenv("ZIMAGE_CONFIG", str(tmp_path / "zimage.toml"))
    status, _, err = run("gen", "a cat", "--model", str(tiny_folder), "-o", str(tmp_path / "x.png"), *options)
    assert status == 2
    last = err.splitlines()[-1]
    assert last.endswith(source) if source else "zimage.toml" not in last
    assert not (tmp_path / "x.png").exists()


def test_no_line_of_the_overview_is_cut_off():
    assert "..." not in CliRunner().invoke(cli, ["--help"]).output.partition("Commands:")[2]
