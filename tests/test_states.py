"""States of renders from anywhere: everything in them is checked, two never keep the same, no picture is lost."""

import copy
import itertools
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import states
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import zimage
from zimage.cli import main
from zimage.errors import CheckpointError, OutputError, RequestError
from zimage.events import Event
from zimage.formats.lock import Lock
from zimage.render.job import Job
from zimage.render.state import FORMAT, VERSION, RenderState, StateFile, load_state
from zimage.settings.plain import mistake

ROOT = Path(__file__).parent.parent
SIZE = ["--steps", "2", "--width", "32", "--height", "32", "--seed", "5", "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments):
        status = main(["gen", *arguments])
        return status, capsys.readouterr()

    return call


def stopped(monkeypatch, run, *arguments, after=1):
    """Begin a render of two pictures and stop it after some."""
    from zimage.cli.target import Target

    save, saved = Target.save, []

    def some(*a):
        if len(saved) == after:
            raise KeyboardInterrupt
        saved.append(save(*a))
        return saved[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Target, "save", some)
        assert run("a cat", *SIZE, "-n", "2", "--save-state", "state", *arguments)[0] == 130


def edited(**changes):
    """Write values into the record of the state, as somebody may."""
    with safe_open("state", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["state"])
    save_file(tensors, "state", {"format": FORMAT, "version": VERSION, "state": json.dumps({**record, **changes})})


# ---------------------------------------------------------------------- what a state may say


def test_a_state_that_says_that_all_is_done_is_not_believed(run, monkeypatch):
    stopped(monkeypatch, run, "-o", "{index}.png", after=0)
    edited(decoded=2, saved=["/etc/passwd", "x.png"])
    assert run("--resume", "state")[0] == 0
    assert sorted(os.listdir()) == ["1.png", "2.png"], "drawn, then the state is removed"
    stopped(monkeypatch, run, "-o", "{index}.png", after=0)
    edited(decoded=10**9)
    status, said = run("--resume", "state")
    assert (status, said.out) == (1, "")
    assert "1000000000 decoded images" in said.err.splitlines()[-1]
    assert Path("state").exists()


def test_a_picture_that_is_gone_is_drawn_again(run, monkeypatch):
    stopped(monkeypatch, run)
    (first,) = Path().glob("*.png")
    before = first.read_bytes()
    first.unlink()
    assert run("--resume", "state")[0] == 0
    assert sorted(map(str, Path().iterdir())) == ["a-cat-5.png", "a-cat-6.png"]
    assert first.read_bytes() == before


def test_numbered_names_and_other_folders_are_found_again(run, monkeypatch):
    """The first picture had to go elsewhere, as when its name was taken: it is not saved twice."""
    Image.new("RGB", (8, 8)).save("a-cat-5.png")
    stopped(monkeypatch, run)
    assert Path("a-cat-5-2.png").exists()
    status, said = run("--resume", "state")
    assert (status, said.out) == (0, "a-cat-6.png\n")
    assert sorted(os.listdir()) == ["a-cat-5-2.png", "a-cat-5.png", "a-cat-6.png"]


@pytest.mark.parametrize("output", ["../x.png", "/tmp/x.png", "link/x.png", "link.png", ".."])
def test_a_state_does_not_say_where_to_write_on_this_machine(run, monkeypatch, output):
    stopped(monkeypatch, run, "-o", "{index}.png", after=0)
    os.symlink("..", "link")
    os.symlink("../elsewhere.png", "link.png")
    edited(output=output)
    status, said = run("--resume", "state")
    assert status == 2
    assert f"state writes to {output!r}, outside of the current folder; pass that with -o" in said.err
    assert os.listdir("..") == ["here"]
    assert run("--resume", "state", "-o", "../{index}.png")[0] == 0, "named again"
    assert sorted(os.listdir("..")) == ["1.png", "2.png", "here"]


def test_a_state_behind_a_link_is_kept_there(run, monkeypatch):
    Path("disk").mkdir()
    os.symlink("disk/kept", "state")
    stopped(monkeypatch, run)
    assert os.readlink("state") == "disk/kept"
    assert os.listdir("disk") == ["kept"]
    assert run("--resume", "state")[0] == 0
    assert (os.readlink("state"), os.listdir("disk")) == ("disk/kept", []), "it is removed, and the link stays"


def test_a_state_names_no_folder_for_captions(run, monkeypatch):
    stopped(monkeypatch, run, after=0)
    _, record = load_state(Path("state"))
    edited(loading={**record["loading"], "cache_folder": os.path.abspath("../captions")})
    assert run("--resume", "state")[0] == 0
    assert os.listdir("..") == ["here"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": 3}, "state.output should be text, not 3"),
        ({"output": "a\0b.png"}, "its output is not a path"),
        ({"rewritten": 3}, "state.rewritten should be a list, not 3"),
        ({"rewritten": [{"original": "x"}] * 3}, "its lists do not have the lengths"),
        ({"saved": ["x"] * 3}, "its lists do not have the lengths"),
        ({"loading": {"model": 3}}, "model 3 is of type int"),
        ({"loading": {"what": 3}}, "there is no setting 'what'"),
        ({"job": []}, "job should be a table"),
        ({"lora": "x"}, "state.lora should be a list"),
        ({"step": "0"}, "it.step should be a whole number, not '0'"),
        ({"step": 2**70}, "more than 64 bits"),
        ({"decoded": -1}, "should be 0 or more"),
        ({"decoded": True}, "should be a whole number, not True"),
    ],
    ids=str,
)
def test_every_field_has_its_kind(run, monkeypatch, change, words):
    stopped(monkeypatch, run, after=0)
    edited(**change)
    before = Path("state").read_bytes()
    status, said = run("--resume", "state")
    assert (status, said.out, said.err.count("\n")) == (1, "", 1)
    assert words in said.err
    assert Path("state").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda job: job["request"].update(prompt="a dog"), "the texts of the render in state"),
        (lambda job: job["request"].update(system_prompt="x" * 10_000), "the texts of"),
        (lambda job: job["request"].update(guidance=2.0), "the negative texts of"),
        (lambda job: job["request"].update(shift=1.5), "the sigmas of"),
        (lambda job: job["seeds"].reverse(), "the seeds of"),
        (lambda job: job["token_ids"].update({job["texts"][0]: [1, 2, 3]}), "the token ids of"),
    ],
)
def test_what_was_decided_is_what_is_decided_now(run, monkeypatch, change, words):
    """An edited request would go on from the latents of another one."""
    stopped(monkeypatch, run, after=0)
    with safe_open("state", "pt") as file:
        job = json.loads(file.metadata()["state"])["job"]
    change(job)
    edited(job=job)
    status, said = run("--resume", "state")
    assert (status, words in said.err, Path("state").exists()) == (2, True, True), said.err


def test_a_state_of_any_size_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "state"
    path.write_bytes(b"x")
    os.truncate(path, 17 << 30)
    with pytest.raises(CheckpointError, match="bytes; such a file has at most"):
        load_state(path)


def test_mutated_states(tmp_path, monkeypatch, capsys):
    import zimage.cli

    reached = []
    monkeypatch.setattr(zimage.cli, "unexpected", lambda error, verbose: reached.append(error) or 1)
    count = int(os.environ.get("ZIMAGE_FUZZ", "60"))
    for name, call in itertools.islice(states.cases(random.Random(3), tmp_path), count):
        call()
        assert not reached, name
        said = capsys.readouterr().err
        assert said.count("error: ") <= 1, name
        assert all(len(line) <= 2010 for line in said.splitlines()), name


# ---------------------------------------------------------------------- states and jobs


@pytest.fixture(scope="module")
def pipe():
    return zimage.ZImage.load(device="cpu", dtype="fp32")


def state_of(pipe, **settings):
    """A job, and its states after every event."""
    job = pipe.prepare(zimage.Request("a cat", seed=1, width=32, height=32, steps=3, **settings))
    state, seen = RenderState(), []
    for event in pipe.run(job):
        state.update(event)
        seen.append(state.snapshot())
    return job, seen


@pytest.mark.parametrize("settings", [{"images": 3, "batch_size": 2}, {"hires": 2.0}], ids=str)
def test_every_state_of_a_render_is_one_of_its_job(pipe, settings):
    job, seen = state_of(pipe, **settings)
    for state in seen:
        pipe.check_state(state, job)


BAD = {
    "another rank": ("latents", torch.zeros(16, 4, 4)),
    "another size": ("latents", torch.zeros(1, 16, 4, 8)),
    "other channels": ("latents", torch.zeros(1, 8, 4, 4)),
    "more images": ("latents", torch.zeros(2, 16, 4, 4)),
    "NaN": ("latents", torch.full((1, 16, 4, 4), float("nan"))),
    "no latents": ("latents", None),
    "too many steps": ("step", 3),
    "no step": ("step", 0),
    "decoded too early": ("decoded", 1),
    "a first pass": ("small", [torch.zeros(1, 16, 4, 4)]),
    "more finished than there are": ("finished", [torch.zeros(1, 16, 4, 4)] * 3),
    "finished of another size": ("finished", [torch.zeros(1, 16, 4, 8)]),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_state_that_the_job_cannot_have_led_to(pipe, kind):
    job, seen = state_of(pipe, images=2)
    state = copy.copy(next(state for state in seen if state.step == 1))
    name, value = BAD[kind]
    setattr(state, name, value)
    with pytest.raises(RequestError, match="the state is that of another render"):
        pipe.run(job, state)


JOBS = [
    ("texts", "x"),
    ("texts", [3]),
    ("texts", ["unknown"]),
    ("token_ids", {"x": ["y"]}),
    ("token_ids", {"x": [2**70]}),
    ("passes", [[1, 2]]),
    ("passes", []),
    ("sigmas", [float("inf")]),
    ("sigmas", [10**400]),
    ("seeds", [True]),
    ("loras", [{}]),
    ("loras", [{"name": "x", "scale": "1", "hash": "", "path": ""}]),
    ("plan", {}),
    ("model", 3),
    ("request", {"image": {"hash": 3}}),
    ("request", {"image": "x.png"}),
]


@pytest.mark.parametrize(("name", "value"), JOBS, ids=lambda x: f"{x!r:.30}")
def test_a_job_is_typed(pipe, name, value):
    plain = json.loads(json.dumps(pipe.prepare(zimage.Request("a cat", seed=1, width=32, height=32)).to_dict()))
    assert Job.from_dict(plain).to_dict() == plain
    value = {**plain["request"], **value} if name == "request" else value
    with pytest.raises(RequestError, match="these values are not a job"):
        Job.from_dict({**plain, name: value})


def test_every_value_of_a_job_is_typed(pipe):
    """Whatever stands in a plan or a pass: another kind of value is refused, or the job it makes is whole."""
    plain = json.loads(json.dumps(pipe.prepare(zimage.Request("a cat", seed=1, width=32, height=32)).to_dict()))
    places = [path for path in states._places(plain) if path[0] != "request"]
    chance = random.Random(5)
    for path in places:
        spoilt = copy.deepcopy(plain)
        holder = spoilt
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = copy.deepcopy(chance.choice(states.VALUES))
        try:
            job = Job.from_dict(spoilt)
            assert job.count == len(job.token_counts) == 1
            pipe.run(job).close()
        except RequestError:
            pass


def test_kinds_of_plain_values():
    assert mistake({"a": [1, 2.5], "b": None}, {"a": list[float], "b": str | None}, "x") == ""
    assert mistake({"a": 1}, {"a": str}, "x") == "x.a should be text, not 1"
    assert mistake({}, {"a": str}, "x") == "x lacks 'a'"
    assert mistake([1, "a"], list[int], "x") == "x[1] should be a whole number, not 'a'"
    assert mistake([1], tuple[int, int], "x") == "x has 1 items; it should have 2"
    assert mistake(True, int, "x") == "x should be a whole number, not True"
    assert mistake(1.0, int, "x") == "x should be a whole number, not 1.0"
    assert mistake(float("nan"), float, "x") == "x should be a number, not nan"
    assert mistake({3: 1}, dict[str, int], "x") == "x should be a table of named values, not dict"
    assert mistake("\ud800", str, "x") == "x should be text, not '\\ud800'"


# ---------------------------------------------------------------------- one state, one render


HOLDING = """
import sys, time
from pathlib import Path
from zimage.formats.lock import Lock
lock = Lock.of(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_two_that_are_started_together_do_not_keep_one_state(run, monkeypatch):
    stopped(monkeypatch, run, after=1)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDING, "state"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    before = Path("state").read_bytes()
    status, said = run("--resume", "state")
    assert (status, said.err) == (2, "error: state: another render is using state; wait until it ends\n")
    assert Path("state").read_bytes() == before
    other.kill()
    other.wait()
    assert run("--resume", "state")[0] == 0, "who is gone holds nothing"


def test_two_new_ones_do_not_keep_one_state(tmp_path):
    path = tmp_path / "state"
    first = StateFile(path, {})
    with pytest.raises(RequestError, match="exists already: another render is using it"):
        StateFile(path, {})
    with pytest.raises(RequestError, match="another render is using"):
        StateFile(path, {}, RenderState())
    first.update(Event("denoise", 1, 1, latents=torch.zeros(1, 16, 2, 2)))
    with pytest.raises(BlockingIOError):
        Lock.of(path)  # it was passed on to the file that was written meanwhile
    first.remove()
    assert os.listdir(tmp_path) == []
    StateFile(path, {}).remove()


def test_a_render_goes_on_when_its_state_cannot_be_written_any_more(tmp_path, monkeypatch, caplog):
    import zimage.render.state

    logging.getLogger("zimage").propagate = True
    kept = StateFile(tmp_path / "state", {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zimage.render.state, "save_state", full)
    for _ in range(3):
        kept.update(Event("denoise", 1, 1, latents=torch.zeros(1, 16, 2, 2)))
    (said,) = {record.getMessage() for record in caplog.records}
    assert "cannot be written: No space left on device; the render goes on" in said
    assert len(kept.state.finished) == 3
    with pytest.raises(OutputError, match=r"state: .* cannot be written: No space left"):
        StateFile(tmp_path / "other", {})
