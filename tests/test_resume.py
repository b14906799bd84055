"""`gen --checkpoint` and `--resume`: killed at any moment, a render goes on to the same pictures."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from zimage.cli import main
from zimage.events import Event
from zimage.render.state import RenderState, StateFile, load_state, save_state

ROOT = Path(__file__).parent.parent
RENDER = ["-n", "3", "--steps", "6", "--width", "64", "--height", "48", "--dtype", "fp32", "--device", "cpu"]

# A process that has loaded what takes time, and forks a fresh one for every run. Torch is used in the forks only.
FORKS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import zimage.pipeline
from zimage.cli import main
from zimage.render.state import StateFile
from zimage.events import Event

def start(arguments, log):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        os._exit(main(arguments))
    return child

def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def pixels(folder):
    from PIL import Image
    return {p.name: hash(Image.open(p).tobytes()) for p in sorted(folder.glob("[0-9]*.png"))}

given, moments = json.loads(sys.argv[1]), int(sys.argv[2])
draw = random.Random(1)
Path("whole").mkdir()
begin = time.monotonic()
assert finish(start([*given, "-o", "whole/{index}.png"], "log")) == 0, Path("log").read_text()
seconds = time.monotonic() - begin
expected = pixels(Path("whole"))
assert len(expected) == 3
afresh = begun = 0
for i in range(moments):
    folder = Path(f"run{i}")
    folder.mkdir()
    state, arguments = folder / "state", [*given, "-o", str(folder / "{index}.png")]
    while True:  # killed twice or thrice, mostly
        child = start([*arguments, "--resume", str(state)], folder / "log")
        time.sleep(draw.uniform(0, 1.1 * seconds))
        os.kill(child, signal.SIGKILL)
        if finish(child) == 0 or (len(pixels(folder)) == 3 and not state.exists()):  # too late: it was done
            for file in folder.iterdir():
                file.unlink()
        elif draw.random() < 0.6:
            break
    assert not pixels(folder).items() - expected.items()
    known = state.exists()
    again = ["gen", "--resume", str(state)] if known else [*arguments, "--resume", str(state)]
    assert finish(start(again, folder / "log")) == 0, (folder / "log").read_text()
    said = (folder / "log").read_text()
    assert ("continuing" if known else "starting from the beginning") in said, said
    begun, afresh = begun + known, afresh + (not known)
    assert pixels(folder) == expected, (i, sorted(p.name for p in folder.iterdir()))
    assert not state.exists()
print(json.dumps({"begun": begun, "afresh": afresh}))
"""


def test_killed_at_random_moments_it_ends_in_the_same_pixels(tiny_folder, tmp_path):
    given = ["gen", "a cat", "--seed", "3", "--model", str(tiny_folder), *RENDER]
    code = [sys.executable, "-c", FORKS, json.dumps(given), "20"]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["begun"] + counts["afresh"] == 20
    assert counts["begun"] >= 5


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = main(["gen", *arguments])
        return status, capsys.readouterr()

    call.model = ["--model", str(tiny_folder), "--dtype", "fp32", "--device", "cpu"]
    return call


def stopped(monkeypatch, run, *arguments):
    """Begin a render and stop it after its first picture."""
    from zimage.cli.target import Target

    save = Target.save

    def once(*a):
        save(*a)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Target, "save", once)
        status, _ = run("a cat", *run.model, *arguments)
    assert status == 130


def test_what_was_saved_is_not_saved_again_and_the_state_is_removed(run, monkeypatch, tmp_path):
    size = ["-n", "2", "--steps", "2", "--width", "64", "--height", "64", "--seed", "5"]
    assert run("a cat", *run.model, *size, "-o", "whole-{index}.png")[0] == 0
    stopped(monkeypatch, run, *size, "--checkpoint", "state", "-o", "{index}.png")
    assert sorted(p.name for p in tmp_path.glob("[12]*.png")) == ["1.png"]
    status, said = run("--resume", "state")
    assert status == 0
    assert "continuing state: 2 images denoised" in said.err
    assert said.out.split() == ["1.png", "2.png"]
    for i in "12":
        assert Image.open(f"{i}.png").tobytes() == Image.open(f"whole-{i}.png").tobytes()
    assert not Path("state").exists()


def test_every_setting_comes_from_the_state(run, monkeypatch, tmp_path):
    Image.new("RGB", (64, 48), "red").save("start.png")
    Image.new("L", (64, 48), "white").save("mask.png")
    settings = ["--steps", "4", "--image", "start.png", "--mask", "mask.png", "--strength", "0.7", "--guidance", "2"]
    settings += ["--negative", "dogs", "--template", "photo-overcast", "--layer-weights", "-2:1,-3:1", "--seed", "5"]
    settings += ["--guidance-method", "apg:momentum=-0.5", "--preset", "comfyui", "--variation", "7:0.3"]
    assert run("a cat", *run.model, *settings, "-o", "whole.png")[0] == 0
    stopped(monkeypatch, run, *settings, "--checkpoint", "state", "-o", "one.png")
    Path("one.png").unlink()
    (tmp_path / "zimage.toml").write_text("[default]\nsteps = 9\ndtype = 'bf16'\n")
    monkeypatch.setenv("ZIMAGE_CONFIG", "zimage.toml")
    again = ["--steps", "4", "--strength", "0.7", "--image", "start.png", "--layer-weights", "-2:1,-3:1"]
    again += ["--guidance-method", "apg:momentum=-0.5", "--preset", "comfyui", "--cfg", "3", "--variation", "7:0.3"]
    status, said = run("--resume", "state", *again)
    assert (status, said.out) == (0, "one.png\n"), said.err
    assert Image.open("one.png").tobytes() == Image.open("whole.png").tobytes()
    assert Image.open("one.png").info["zimage"] == Image.open("whole.png").info["zimage"]


def test_keeping_the_state_takes_a_tenth_of_the_time_at_most(tmp_path, monkeypatch):
    """A state grows with its images: written after each of many quick steps it would take longer than they do."""
    written = []
    monkeypatch.setattr(
        "zimage.render.state.save_state", lambda *_: (time.sleep(0.02), written.append(time.monotonic()))
    )
    kept = StateFile(tmp_path / "state", {})
    for step in range(1, 101):
        kept.update(Event("denoise", step, 101, latents=torch.zeros(1, 16, 2, 2)))
    assert len(written) == 1, "a hundred steps in no time"
    time.sleep(0.25)
    kept.update(Event("denoise", 100, 101, latents=torch.zeros(1, 16, 2, 2)))
    assert len(written) == 2
    kept.update(Event("denoise", 101, 101, latents=torch.zeros(1, 16, 2, 2)))
    assert len(written) == 3, "a finished image is always kept"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "state", "--steps", "9"], "the render in state has steps 2, not 9"),
        (["a dog", "--resume", "state"], "the render in state has prompt 'a cat', not 'a dog'"),
        (["--resume", "state", "--save-state", "other"], "leave out --save-state"),
        (["--resume", "state", "--from", "x.png"], "leave out --from"),
        (["--resume", "state", "--dtype", "bf16"], "the render in state has dtype float32, not bfloat16"),
        (["a cat", "--checkpoint", "state"], "continue with --resume state"),
        (["a cat", "--save-state", "nowhere/state"], "does not exist"),
        (["--resume", "nothing"], "a prompt is needed"),
        (["--resume", "text"], "cannot be read as the state"),
        (["--resume", "hollow"], "does not hold a complete state"),
        (["--resume", "earlier"], "is a state of format 1, not 3; finish the render with the version that wrote it"),
        (["--resume", "empty"], "cannot be read as the state of a render: it lacks 'step'"),
        (["--resume", "listed"], "listed should hold a JSON object, not list"),
    ],
)
def test_what_would_end_otherwise_is_refused_and_nothing_lost(run, monkeypatch, arguments, words):
    stopped(monkeypatch, run, "--steps", "2", "--seed", "1", "--checkpoint", "state", "-o", "x.png")
    Path("text").write_text("hello")
    save_state(Path("hollow"), RenderState(), {})
    kept = {"format": "zimage-render", "version": "3", "state": "{}"}
    save_file({}, "earlier", {**kept, "version": "1"})
    save_file({}, "empty", kept)
    save_file({}, "listed", {**kept, "state": "[1]"})
    before = Path("state").read_bytes()
    status, said = run(*arguments)
    assert status in (1, 2)
    assert words in said.err.splitlines()[-1]
    assert Path("state").read_bytes() == before


def test_a_file_that_changed_is_refused(run, monkeypatch):
    Image.new("RGB", (64, 64), "red").save("start.png")
    stopped(monkeypatch, run, "--steps", "2", "--image", "start.png", "--checkpoint", "state", "-o", "x.png")
    Image.new("RGB", (64, 64), "blue").save("start.png")
    status, said = run("--resume", "state")
    assert status == 2
    assert "is not the file that the render in state began with" in said.err


def test_the_state_is_written_before_the_first_step(run, monkeypatch):
    import zimage.pipeline

    with monkeypatch.context() as patch:
        patch.setattr(zimage.pipeline.ZImage, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("a cat", *run.model, "--steps", "1", "--checkpoint", "state", "-o", "x.png")[0] == 130
    state, record = load_state(Path("state"))
    assert (state.step, state.decoded) == (0, 0)
    assert record["job"]["seeds"] is not None
    assert run("--resume", "state")[0] == 0
