"""`gen --gpus N` and torchrun: pictures of several ranks, and how all of them end when one does.

Commands are real ones with real processes. A killed rank ends all within 30 s, with one line on standard error and a
status that is not 0; no process is left.
"""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from commands import LONG, STATE, Command
from PIL import Image

from zimage.cli import main
from zimage.errors import RequestError
from zimage.parallel import environment
from zimage.parallel.environment import FAILED, INTERRUPTED, LOST, REASONS
from zimage.pictures.files import read_metadata

SHORT = ("a red cat", "--seed", "1", "--steps", "4", "--width", "64", "--height", "64", "--dtype", "fp32")
CPU = ("--device", "cpu")
README = Path(__file__).parents[2] / "zimage" / "parallel" / "README.md"
SAVING = 'event.image and event.image.save(f"{ranks.rank}.png")'
DEADLINE = 30.0  # seconds from the end of a rank to that of all


@pytest.fixture
def start(tmp_path):
    """Starts commands in folders of their own; none outlives the test."""
    started = []

    def begin(*arguments, torchrun=0, folder=None):
        folder = folder or tmp_path / str(len(started))
        folder.mkdir(exist_ok=True)
        started.append(Command(folder, "gen", *arguments, *CPU, torchrun=torchrun))
        return started[-1]

    yield begin
    for command in started:
        command.kill()


def pixels(file) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


# ------------------------------------------------------------------ pictures


def test_pictures_are_those_of_one_rank(start, tmp_path):
    two = start(*SHORT, "--gpus", 2, "-o", "picture.png", "--json")
    assert main(["gen", *SHORT, *CPU, "-o", str(tmp_path / "one.png"), "-q"]) == 0
    assert two.end(120) == 0, two.err
    picture = two.folder / "picture.png"
    assert abs(pixels(picture) - pixels(tmp_path / "one.png")).max() <= 1
    assert read_metadata(picture)["ranks"] == 2
    (told,) = json.loads((two.folder / "out").read_text())["images"]
    assert told["path"] == "picture.png"
    assert two.errors == []


def test_the_program_of_the_readme_draws(tmp_path):
    """On two ranks of a CPU, the demo in the place of a model that is not here; it saves what it draws."""
    text = README.read_text(encoding="utf-8").partition("In a program of your own")[2].split("\n\nA rank waits")[0]
    program = textwrap.dedent(text.partition("\n\n")[2])
    for shown, here in (
        ('"Z-Image-Turbo", device=f"cuda:{os.environ[\'LOCAL_RANK\']}"', 'device="cpu"'),
        ("...", SAVING),
    ):
        assert program.count(shown) == 1, shown
        program = program.replace(shown, here)
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("*.png")] == ["0.png"]  # only the first rank's events have pictures


@pytest.mark.full
def test_torchrun_draws_the_same_bits(start):
    ours, theirs = start(*SHORT, "--gpus", 3, "-o", "a.png"), start(*SHORT, "-o", "a.png", torchrun=3)
    assert [ours.end(120), theirs.end(120)] == [0, 0], theirs.err
    assert (pixels(ours.folder / "a.png") == pixels(theirs.folder / "a.png")).all()


@pytest.mark.full
@pytest.mark.parametrize("arguments", [("--help",), ("--steps", "0"), (*SHORT, "--gpus", 4)], ids=str)
def test_under_torchrun_the_others_end_when_there_is_nothing_to_draw(start, arguments):
    command = start(*arguments, torchrun=2)
    status = command.end(60)
    assert (status == 0) == (arguments == ("--help",))
    assert command.err.count("error: ") == (status != 0)


@pytest.mark.full
def test_a_killed_rank_loses_nothing(start):
    settings = (*SHORT, "--steps", 60, "--images", 2, "--gpus", 2)
    whole, killed = start(*settings, "-o", "{seed}.png"), start(*settings, "-o", "{seed}.png", "--save-state", STATE)
    ranks = killed.ranks(2)
    killed.until_it_draws()
    os.kill(ranks[1], signal.SIGKILL)
    assert killed.end(DEADLINE) == 1
    again = start("--resume", STATE, "--gpus", 2, folder=killed.folder)
    assert [whole.end(120), again.end(120)] == [0, 0], again.err
    for name in ("1.png", "2.png"):
        assert (pixels(whole.folder / name) == pixels(again.folder / name)).all()


# ------------------------------------------------------------------ the end of all


def ended(command: Command, status: int, line: str) -> None:
    assert command.end(DEADLINE) == status
    assert command.errors == [f"error: {line}"]
    assert not list(command.folder.glob("*.png"))


def killed(rank: int, count: int = 2, how: str = "SIGKILL") -> str:
    return f"rank {rank} of {count} was killed ({how}), and all others were ended"


INTERRUPTION = "interrupted; the unfinished picture was not saved"


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_a_killed_rank_ends_all(start, rank):
    command = start(*LONG, "--gpus", 2)
    ranks = command.ranks(2)
    command.until_it_draws()
    os.kill(ranks[rank], signal.SIGKILL)
    ended(command, 1, killed(rank))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)]
)
def test_an_interrupt_ends_all(start, number, status):
    command = start(*LONG, "--gpus", 2)
    command.ranks(2)
    command.until_it_draws()
    os.kill(command.process.pid, number)
    ended(command, status, INTERRUPTION)


@pytest.mark.full
@pytest.mark.parametrize("seconds", [0.01, 0.3])
def test_an_interrupt_ends_ranks_that_start(start, seconds):
    command = start(*LONG, "--gpus", 2)
    command.ranks(2)
    time.sleep(seconds)
    os.kill(command.process.pid, signal.SIGINT)
    ended(command, 130, INTERRUPTION)


@pytest.mark.full
@pytest.mark.parametrize("begins", [True, False], ids=["while they start", "while they draw"])
def test_ranks_end_with_the_process_that_started_them(start, begins):
    command = start(*LONG, "--gpus", 2)
    command.ranks(2)
    if not begins:
        command.until_it_draws()
    command.process.kill()
    assert command.end(DEADLINE) == -signal.SIGKILL


@pytest.mark.full
def test_an_interrupt_ends_ranks_that_wait_for_ever(start):
    """As on a GPU, where nothing tells a rank that another has died."""
    command = start(*LONG, "--gpus", 2)
    ranks = command.ranks(2)
    command.until_it_draws()
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(1)
    os.kill(command.process.pid, signal.SIGINT)
    ended(command, 130, INTERRUPTION)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_a_rank_killed_at_any_moment_ends_all(start, seed):
    dice = random.Random(seed)
    command = start(*LONG, "--gpus", 3)
    ranks, rank = command.ranks(3), dice.randrange(3)
    if seed % 2:
        command.until_it_draws()
    time.sleep(dice.random() * (0.5 if seed % 2 else 8))
    os.kill(ranks[rank], signal.SIGKILL)
    ended(command, 1, killed(rank, 3))


FAULT = """
import os, sys, threading, time
def fail(*_):
    from zimage.errors import OutOfMemory
    raise OutOfMemory("the GPU ran out of memory")
def plant():
    while "follow" not in vars(sys.modules.get("zimage.parallel.follower", os)):
        time.sleep(0.001)
    sys.modules["zimage.parallel.follower"].stages.draw = fail
if os.environ.get("RANK") == "1":
    threading.Thread(target=plant, daemon=True).start()
"""


@pytest.mark.full
def test_an_error_of_another_rank_ends_all_with_its_line(start, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended(start(*LONG, "--gpus", 2), 1, "rank 1: the GPU ran out of memory")


# ------------------------------------------------------------------ what is refused, and what is told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "2"], "gpus 2: this computer has 0; pass at most that many, or device cpu for ranks on the CPU"),
        (["--gpus", "2", "--compile"], "compile: compiled blocks cannot wait for other ranks"),
        (["--gpus", "2", "--device", "cuda:1"], "device cuda:1: each rank computes on a GPU of its own"),
        (["--gpus", "2", "--vae-device", "mps"], "vae_device mps: each rank computes on a GPU of its own"),
        (["--gpus", "3", "--cfg-parallel"], "gpus is 3; pass an even number"),
        (["--cfg-parallel"], "cfg_parallel divides the GPUs that draw a picture into two halves; pass gpus"),
        (["--gpus", "0"], "gpus 0 is too small; the minimum is 1"),
        (["--gpus", "2", "--server", "http://localhost:1"], "--gpus belongs to the server; leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(arguments, told, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["gen", "a cat", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_torchrun_and_gpus_must_agree(monkeypatch, capsys):
    from zimage.cli import ranks

    monkeypatch.setattr(ranks, "place", lambda: environment.Place(0, 3, 0))
    assert main(["gen", "a cat", "--gpus", "2"]) == 2
    assert "gpus 2: torchrun has started 3 ranks; leave it out, or pass 3" in capsys.readouterr().err


def test_each_rank_has_its_own_of_any_gpu(monkeypatch):
    """One that is named is never exchanged for a CPU."""
    from zimage.cli import ranks

    monkeypatch.setattr(ranks, "place", lambda: environment.Place(1, 2, 1))
    for there, auto in ((True, "cuda:1"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert ranks.own_devices({"device": "auto"})["device"] == ranks.own_devices({})["device"] == auto
        assert ranks.own_devices({"dit_device": "cuda"}) == {"device": auto, "dit_device": "cuda:1"}
        assert ranks.own_devices({"device": "cuda", "vae_device": "cpu"}) == {"device": "cuda:1", "vae_device": "cpu"}


@pytest.mark.parametrize(("dit", "vae", "found"), [("cpu", "cpu", "cpu"), ("cpu", "cuda:1", "cuda:1")])
def test_ranks_talk_where_the_tensors_are(dit, vae, found):
    from types import SimpleNamespace

    import torch

    from zimage.cli import ranks

    places = {name: SimpleNamespace(device=torch.device(at)) for name, at in (("dit", dit), ("vae", vae))}
    assert ranks.talking(SimpleNamespace(places=places)) == torch.device(found)


def test_settings_of_a_state_are_checked_too(monkeypatch):
    """They are not known before the ranks are started."""
    from zimage.cli import ranks, settings

    monkeypatch.setattr(ranks, "place", lambda: environment.Place(0, 2, 0))
    resolved = settings.resolve_options({"device": "cpu", "compile": True})
    with pytest.raises(RequestError, match="compiled blocks cannot wait"), ranks.drawing(resolved):
        pass


def test_a_word_is_whole_or_not_there(tmp_path, monkeypatch):
    """torchrun's agent fails at half of one."""
    seen, file = [], tmp_path / "word"
    monkeypatch.setenv(environment.ERROR_FILE, str(file))
    monkeypatch.setattr(environment.json, "dump", lambda word, out: seen.append(file.exists()))
    environment.leave_word("no such file", FAILED)
    assert seen == [False]
    assert file.exists()


def test_other_launchers_variables_make_no_rank(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert environment.place() == (0, 1, 0)
    monkeypatch.setenv(environment.TORCHRUN, "a run")
    assert environment.place() == (1, 2, 1)


def failures(tmp_path, *ends) -> dict:
    """(exit status, line, reason) of ranks; without a line they left no word."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    found = {}
    for rank, (status, line, reason) in enumerate(ends):
        file = tmp_path / f"{rank}.json"
        if line:
            os.environ[environment.ERROR_FILE] = str(file)
            environment.leave_word(line, reason)
            del os.environ[environment.ERROR_FILE]
        found[rank] = ProcessFailure(rank, 1000 + rank, status, str(file))
    return found


@pytest.mark.parametrize(
    ("ends", "told", "status"),
    [
        ([(1, "gone", LOST), (-9, "", "")], killed(1), 1),
        ([(143, "interrupted", INTERRUPTED), (-11, "", "")], killed(1, 2, "SIGSEGV"), 1),
        ([(1, "gone", LOST), (2, "no such file", FAILED)], "rank 1: no such file", 2),
        ([(1, "NaN", FAILED), (1, "NaN", FAILED)], "NaN", 1),
        ([(-15, "", ""), (1, "gone", LOST), (-9, "", "")], killed(2, 3), 1),
        ([(143, "interrupted; a note", INTERRUPTED), (143, "interrupted", INTERRUPTED)], "interrupted; a note", 143),
        ([(7, "", ""), (1, "gone", LOST)], "rank 0 of 2 ended with status 7, and all others were ended", 7),
    ],
)  # fmt: skip
def test_the_end_that_explains_the_others_is_told(tmp_path, ends, told, status):
    from zimage.parallel.launch import failure

    error = failure(failures(tmp_path, *ends), len(ends))
    assert (str(error), error.exit_status) == (told, status)
    assert len(set(REASONS)) == 4
