"""`zimage weights fetch` against a hub on this machine: resumed, verified, and nothing half-written under a name."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
from hub_server import COMMIT, FakeHub, repository_of, serving

import zimage
from zimage.cli import main

pytest.importorskip("huggingface_hub")

DIT = "transformer/diffusion_pytorch_model.safetensors"
NOT_NEEDED = {"README.md", "text_encoder/pytorch_model.bin", "assets/a.png", "../evil.json"}


@pytest.fixture
def hub(tiny_folder):
    with serving(FakeHub("Tongyi-MAI/Z-Image-Turbo", repository_of(tiny_folder))) as hub:
        yield hub


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch, tmp_path):
    monkeypatch.setattr("zimage.weights.hub.PAUSES", (0.0,) * 5)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(hub, capsys):
    """Fetch into the folder `model`; returns (status, stderr)."""

    def call(*arguments, to="model"):
        status = main(["weights", "fetch", "turbo", "--to", to, "--endpoint", hub.url, *arguments])
        return status, capsys.readouterr().err

    return call


def visible(folder):
    """Files under their final names."""
    files = (f.relative_to(folder) for f in folder.rglob("*") if f.is_file())
    return {str(f) for f in files if not any(part.startswith(".") for part in f.parts)}


def test_a_model_is_fetched_and_renders(run, hub, tmp_path):
    status, err = run()
    assert status == 0, err
    folder = tmp_path / "model"
    assert visible(folder) == set(hub.files) - NOT_NEEDED
    assert all((folder / path).read_bytes() == hub.files[path] for path in visible(folder))
    assert not (folder / ".zimage-partial").exists()
    record = json.loads((folder / ".zimage-manifest.json").read_text())
    assert (record["repository"], record["revision"]) == (hub.repository, COMMIT)
    assert set(record["files"]) == visible(folder)
    pipe = zimage.ZImage.load(folder, dtype="fp32", device="cpu")
    assert pipe.generate("a cat", steps=1, width=64, height=48, seed=1).images


def test_a_login_is_told_to_the_hub_alone(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)  # as HF_ENDPOINT sets it
    assert run()[0] == 0
    assert set(hub.told) == {("api", "Bearer hf_secret"), ("hub", "Bearer hf_secret"), ("storage", None)}


def test_a_complete_folder_transfers_nothing(run, hub):
    assert run()[0] == 0
    hub.log.clear()
    status, err = run()
    assert status == 0
    assert hub.log == []
    assert "0 bytes transferred" in err


def test_an_interrupted_transfer_goes_on_where_it_broke_off(run, hub, tmp_path):
    hub.break_after[DIT] = 20_000
    status, err = run()
    assert status == 1
    assert err.count("\n") == len(err.splitlines())
    assert DIT not in visible(tmp_path / "model")
    assert "answered 503" in err.splitlines()[-1]
    assert "again to resume" in err.splitlines()[-1]

    hub.status.clear()
    hub.log.clear()
    assert run()[0] == 0
    (begin,) = (int(wanted[len("bytes=") : -1]) for _, path, wanted in hub.log if path == DIT)
    assert 0 < begin <= 20_000
    assert (tmp_path / "model" / DIT).read_bytes() == hub.files[DIT]


def test_a_hub_that_cannot_go_on_sends_all_again(run, hub, tmp_path):
    hub.break_after[DIT] = 20_000
    run()
    hub.status.clear()
    hub.ranges = False
    assert run()[0] == 0
    assert (tmp_path / "model" / DIT).read_bytes() == hub.files[DIT]


def test_a_hub_that_falls_silent_is_left_after_some_tries(run, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.stall_after[DIT] = 20_000
    status, err = run()
    assert (status, "cannot be reached" in err.splitlines()[-1]) == (1, True)


def test_a_short_break_is_bridged_at_once(run, hub, tmp_path):
    hub.break_after[DIT] = 20_000
    hub.status = type("Forgetful", (dict,), {"__setitem__": lambda *_: None})()
    assert run()[0] == 0
    assert hub.transfers().count(DIT) == 2


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_arrived(hub, tmp_path, sent):
    hub.stall_after[DIT] = 200_000
    process = _fetching(hub, tmp_path)
    deadline = time.monotonic() + 60
    while _partial_size(tmp_path) < 100_000:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("error: interrupted; what has arrived is kept")
    assert DIT not in visible(tmp_path / "model")
    assert _partial_size(tmp_path) >= 100_000


def _fetching(hub, folder):
    """A process that fetches. A shell's background jobs ignore SIGINT, and what they start does: not this one."""
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from zimage.cli import main; sys.exit(main())"
    arguments = ["weights", "fetch", "turbo", "--to", "model", "--endpoint", hub.url]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True, cwd=folder)


def _partial_size(tmp_path):
    return sum(f.stat().st_size for f in (tmp_path / "model" / ".zimage-partial").glob("*diffusion_pytorch_model*"))


@pytest.mark.parametrize("path", [DIT, "vae/config.json"])
def test_a_corrupted_file_is_named_and_dropped(run, hub, tmp_path, path):
    hub.corrupt.add(path)
    status, err = run()
    assert status == 1
    assert f"error: {path} arrived damaged (its " in err.splitlines()[-1]
    assert path not in visible(tmp_path / "model")
    hub.corrupt.clear()
    assert run()[0] == 0
    assert path in visible(tmp_path / "model")


def test_a_partial_file_that_is_too_long_or_wrong_is_not_trusted(run, hub, tmp_path):
    hub.break_after[DIT] = 20_000
    run()
    hub.status.clear()
    (partial,) = (tmp_path / "model" / ".zimage-partial").iterdir()
    partial.write_bytes(b"x" * (len(hub.files[DIT]) + 1))
    assert run()[0] == 0
    assert (tmp_path / "model" / DIT).read_bytes() == hub.files[DIT]


def test_damage_after_the_fetch_is_repaired_by_another(run, hub, tmp_path):
    assert run()[0] == 0
    (tmp_path / "model" / DIT).write_bytes(b"spoilt")
    hub.log.clear()
    assert run()[0] == 0
    assert hub.transfers() == [DIT]


def test_files_of_another_revision_are_not_mixed_in(run, hub, tmp_path):
    assert run()[0] == 0
    hub.files["transformer/diffusion_pytorch_model-00001-of-00001.safetensors"] = hub.files.pop(DIT)
    status, err = run()
    assert (status, "was fetched at revision c0ffee" in err) == (2, True)
    (tmp_path / "model" / DIT).unlink()
    assert run()[0] == 0


def test_files_of_others_are_never_replaced(run, hub, tmp_path):
    (tmp_path / "model" / "vae").mkdir(parents=True)
    (tmp_path / "model" / "vae" / "config.json").write_text("mine")
    status, err = run()
    assert status == 2
    assert "is in the way" in err
    assert (tmp_path / "model" / "vae" / "config.json").read_text() == "mine"


def test_files_that_came_another_way_are_adopted(run, hub, tmp_path):
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / DIT).write_bytes(hub.files[DIT])
    assert run()[0] == 0
    assert DIT not in hub.transfers()


def test_too_little_room_is_said_before_anything_comes(run, hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 100_000_000 >> 1))
    status, err = run()
    assert status == 1
    assert "GB are to be fetched and 0.00 GB are free" in err
    assert hub.transfers() == []


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--revision", "nowhere"], 1, "has no revision nowhere"),
        (["--endpoint", "http://127.0.0.1:9"], 1, "cannot be reached"),
        (["--endpoint", "nonsense"], 2, "endpoint 'nonsense' cannot be used"),
        (["--endpoint", "http://me:pw@h"], 2, "cannot be used"),
        (["--to", "no/such/model"], 2, "does not exist; make it first"),
        (["--to", "file"], 2, "is a file"),
    ],
)
def test_what_cannot_work_is_one_line(run, tmp_path, arguments, status, words):
    (tmp_path / "file").write_text("")
    found, err = run(*arguments)
    assert found == status
    assert words in err
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err


def test_a_missing_file_or_repository_is_one_line(run, hub):
    hub.status["vae/config.json"] = 404
    status, err = run()
    assert (status, "answered 404 for vae/config.json" in err) == (1, True)
    hub.repository = "someone/else"
    status, err = run()
    assert (status, "was not found" in err) == (1, True)


def test_a_repository_of_another_kind_is_refused(run, hub):
    del hub.files["vae/config.json"]
    assert "not a model in the published layout: it has no vae/config.json" in run()[1]
    assert hub.transfers() == []


def test_a_hub_that_gives_no_hashes_is_named_as_such(run, hub):
    hub.hashes = False
    status, err = run()
    assert status == 0
    assert "only its size verified" in err


def test_what_the_project_knows_is_held_against_the_hub(run, hub, monkeypatch):
    from zimage.weights.manifest import find_known

    known = dataclasses.replace(find_known("vae/config.json", hub.repository), size=1)
    monkeypatch.setattr("zimage.weights.fetch.find_known", lambda path, _: known if path == known.path else None)
    status, err = run()
    assert (status, "but 1 is on record" in err) == (1, True)
    assert run("--revision", COMMIT)[0] == 0


def test_without_the_library_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    status, err = run()
    assert status == 2
    assert "the extra `hub`" in err
    assert 'pip install "zimage-torch[hub]" (in a clone: pip install -e ".[hub]")' in err


def test_two_fetches_into_one_folder_do_not_mix(run, hub, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    hub.break_after[DIT] = 20_000
    run()
    hub.status.clear()
    (partial,) = (tmp_path / "model" / ".zimage-partial").iterdir()
    with partial.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        status, err = run()
    assert (status, "by another process" in err) == (2, True)
    assert os.path.getsize(partial) <= 20_000
