"""`weights verify` and `convert` on folders that somebody else packed: links that lead out, pipes, foreign records."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from zimage.cli import main
from zimage.errors import CheckpointError
from zimage.formats.files import is_inside, require_inside
from zimage.weights.writer import placing

DIT = "transformer/diffusion_pytorch_model.safetensors"
SECRET = b'{"_class_name": "secret", "vocab": "words that nobody else may read"}'


@pytest.fixture
def folder(tiny_folder, tmp_path, monkeypatch):
    """A model folder beside a file that is not part of it."""
    (tmp_path / "secret.json").write_bytes(SECRET)
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def run(capsys):
    """Run a command on weights; returns (status, all that it printed). Nothing printed steers a terminal or tells."""

    def call(*arguments):
        status = main(["weights", *map(str, arguments)])
        captured = capsys.readouterr()
        text = captured.out + captured.err
        assert all(line.isprintable() for line in text.split("\n"))
        assert "nobody" not in text
        return status, text

    return call


def moved(path, to):
    """Move what is at `path` and leave a link to it."""
    shutil.move(path, to)
    path.symlink_to(to)


LINKS = {
    "a file of the tokenizer": lambda model: (model / "tokenizer" / "notes.txt").symlink_to("../../secret.json"),
    "an absolute one": lambda model: (model / "tokenizer" / "notes.txt").symlink_to(model.parent / "secret.json"),
    "a config": lambda model: (
        (model / "vae/config.json").unlink(),
        (model / "vae/config.json").symlink_to("/etc/passwd"),
    ),
    "weights": lambda model: moved(model / DIT, model.parent / "moved.safetensors"),
    "a folder": lambda model: moved(model / "vae", model.parent / "moved"),
    "the tokenizer's folder": lambda model: moved(model / "tokenizer", model.parent / "moved"),
    "over another link": lambda model: (
        (model / "a").symlink_to(model.parent / "secret.json"),
        (model / "tokenizer" / "notes.txt").symlink_to(model / "a"),
    ),
    "the index of the model": lambda model: (model / "model_index.json").symlink_to("../secret.json"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_that_lead_out_are_not_followed(folder, run, tmp_path, kind):
    assert run("verify", folder)[0] == 0
    LINKS[kind](folder)
    status, err = run("convert", folder, "out")
    assert (status, "leads out of" in err) == (1, True)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    status, said = run("verify", folder)
    assert (status, "leads out of the folder, which is not followed" in said) == (1, True)


def test_configs_are_taken_from_within_their_folder(folder, run, tmp_path):
    assert run("convert", folder, "dit.safetensors", "--layout", "native")[0] == 0
    assert run("convert", "dit.safetensors", "sound", "--layout", "diffusers", "--configs", folder)[0] == 0
    moved(folder / "transformer" / "config.json", tmp_path / "config.json")
    status, err = run("convert", "dit.safetensors", "out", "--layout", "diffusers", "--configs", folder)
    assert (status, "leads out of" in err) == (1, True)


def test_links_within_the_folder_are_followed(folder, run):
    moved(folder / DIT, folder / "dit.safetensors")
    assert run("verify", folder)[0] == 0
    assert run("convert", folder, "out")[0] == 0
    assert load_file(Path("out") / DIT).keys() == load_file(folder / DIT).keys()


def test_a_folder_may_itself_be_a_link(folder, run):
    Path("link").symlink_to(folder)
    assert run("verify", "link")[0] == 0
    assert run("convert", "link", "out")[0] == 0


def test_the_hubs_cache_is_a_folder_of_links(folder, run, tmp_path):
    """The library's own downloads: snapshots/COMMIT/FILE → ../../blobs/HASH."""
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "c0ffee", cache / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    for number, file in enumerate([file for file in snapshot.rglob("*") if file.is_file()]):
        moved(file, blobs / str(number))
    assert run("verify", snapshot)[0] == 0
    assert run("convert", snapshot, "out")[0] == 0
    assert run("verify", snapshot / "vae")[0] == 0
    (snapshot / "tokenizer" / "notes.txt").symlink_to(tmp_path / "secret.json")
    assert run("convert", snapshot, "again")[0] == 1
    (blobs / "x").symlink_to(tmp_path / "secret.json")
    assert not is_inside(snapshot, blobs / "x")
    assert is_inside(snapshot / "vae", blobs / "1")
    assert not is_inside(tmp_path / "snapshots" / "x", tmp_path / "blobs" / "1")


def test_links_in_a_circle_lead_nowhere(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    require_inside(tmp_path, tmp_path / "a")
    with pytest.raises(CheckpointError, match="by a link"):
        require_inside(tmp_path / "x", tmp_path / "a")


PIPES = [
    "vae/config.json",
    DIT,
    "tokenizer/tokenizer.json",
    "model_index.json",
    ".zimage-manifest.json",
    "scheduler/x.json",
]


@pytest.mark.parametrize("path", PIPES)
@pytest.mark.parametrize("command", ["verify", "convert"])
def test_no_pipe_is_waited_for(folder, run, path, command):
    (folder / path).unlink(missing_ok=True)
    os.mkfifo(folder / path)
    status, _ = run("verify", folder) if command == "verify" else run("convert", folder, "out")
    needed = not path.startswith((".", "model_index", "scheduler/x", "tokenizer" if command == "convert" else "."))
    assert status in ((1,) if needed else (0, 1))


def test_a_pipe_as_the_whole(tmp_path, run):
    os.mkfifo(tmp_path / "pipe")
    for arguments in (["verify", tmp_path / "pipe"], ["convert", tmp_path / "pipe", tmp_path / "out"]):
        status, said = run(*arguments)
        assert (status, "is a named pipe" in said) == (1, True)


def test_a_record_tells_nothing_of_other_files(folder, run):
    entry = {"size": len(SECRET), "sha256": "0" * 64}
    record = {"repository": "a/b", "revision": "main", "files": {"../secret.json": entry}}
    (folder / ".zimage-manifest.json").write_text(json.dumps(record))
    status, said = run("verify", folder)
    assert (status, "in a form that a fetch never writes" in said) == (1, True)
    assert "sha256 is" not in said


def test_a_large_file_beside_the_tokenizer_is_not_copied(folder, run):
    (folder / "tokenizer" / "notes.txt").touch()
    os.truncate(folder / "tokenizer" / "notes.txt", (64 << 20) + 1)
    status, err = run("convert", folder, "out")
    assert (status, "such a file has at most" in err) == (1, True)
    assert not Path("out").exists()


def test_nothing_is_written_through_a_link_under_a_name_that_can_be_foreseen(folder, run, tmp_path):
    (tmp_path / f".o.safetensors.{os.getpid()}.part").symlink_to(tmp_path / "secret.json")
    assert run("convert", folder, "o.safetensors", "--layout", "native")[0] == 0
    assert (tmp_path / "secret.json").read_bytes() == SECRET


def test_a_temporary_name_that_is_taken_is_not_written_to(folder, run, tmp_path, monkeypatch):
    (tmp_path / "taken").symlink_to(tmp_path / "secret.json")
    monkeypatch.setattr("zimage.formats.atomic.free_name", lambda path: tmp_path / "taken")
    assert run("convert", folder, "o.safetensors", "--layout", "native")[0] == 1
    assert (tmp_path / "secret.json").read_bytes() == SECRET


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    real = os.replace

    def fails(source, target):
        if Path(target).name == "model" and (Path(source) / "new").exists():
            raise PermissionError(13, "Permission denied", str(target))
        real(source, target)

    monkeypatch.setattr("zimage.weights.writer.os.replace", fails)

    def place():
        with placing(tmp_path / "model", replace=True) as temporary:
            temporary.mkdir()
            (temporary / "new").touch()

    with pytest.raises(PermissionError):
        place()
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
