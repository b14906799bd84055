"""The index after kills and damage: whole, written anew from pictures, and never by two at once."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from zimage.batch.index import BATCH, NAME, Index, failed_line, read_index
from zimage.batch.parquet import read_parquet, write_parquet
from zimage.errors import RequestError
from zimage.pictures.files import save
from zimage.settings.declared import Request

REQUEST = Request(prompt="a", seed=5, width=16, height=16, steps=1, guidance=0.0, shift=3.0).to_mapping()
RECORD = {"request": REQUEST, "model": {"name": "tiny", "fingerprint": "0"}, "dtype": "float32", "version": "0"}

FULL = """
import resource, signal, sys
from pathlib import Path
from zimage.batch.index import Index

index = Index(Path(sys.argv[1]))
index.lines["b"] = line = {"id": "b", "notes": ["y" * 1000]}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try:
    index.add(line) if sys.argv[2] == "add" else index.settle("ab")
except OSError as error:
    print(error.filename)
"""


def line(id, **more):
    return {"id": id, "path": f"{id}.png", "error": None, **more}


def picture(folder, id, **more):
    record = {
        **RECORD,
        BATCH: {"id": id, "timings": {"decode": 1.0}, "attempts": 2, **more},
    }
    save(Image.new("RGB", (16, 16)), folder / f"{id}.png", record, replace=True)


@pytest.mark.parametrize("torn", range(0, 40, 3))
def test_a_torn_line_is_dropped_and_the_rest_stays(tmp_path, torn):
    index = Index(tmp_path)
    for id in "abc":
        index.add(line(id))
    index.close()
    content = index.path.read_bytes()
    index.path.write_bytes(content[: len(content) - torn])
    del index
    again = Index(tmp_path)
    assert list(again.lines) == list("abc")[: 3 - (torn > 1) - (torn > 41)]
    again.settle("abc")
    again.add(line("d"))
    again.close()
    lines = again.path.read_text().splitlines()
    assert [json.loads(one)["id"] for one in lines] == [*again.lines]


def test_it_is_settled_in_the_rows_order_with_the_last_line_of_each(tmp_path):
    index = Index(tmp_path)
    for id, error in (("b", "x"), ("other", None), ("a", None), ("b", None)):
        index.add(line(id, error=error))
    index.settle(["a", "b", "never drawn"])
    assert [(one["id"], one["error"]) for one in read_index(index.path)] == [("a", None), ("b", None), ("other", None)]


@pytest.mark.parametrize("write", ["add", "settle"])
def test_a_full_disk_tears_no_line_and_its_error_names_the_index(tmp_path, write):
    """The system cuts the file where the disk would be full; a process of its own has that limit."""
    index = Index(tmp_path)
    index.add(line("a", notes=["x" * 1000]))
    path = index.path
    del index  # and its lock
    before = path.read_bytes()
    told = subprocess.run([sys.executable, "-c", FULL, tmp_path, write], capture_output=True, text=True, timeout=60)
    assert told.stdout == f"{path}\n", told.stderr
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_picture_tells_its_line(tmp_path):
    index = Index(tmp_path)
    picture(tmp_path, "a", asked="hash", notes=["long"])
    found = index.picture("a", "a.png")
    told = (found["path"], found["seed"], found["asked"], found["attempts"], found["timings"], found["notes"])
    assert told == ("a.png", 5, "hash", 2, {"decode": 1.0}, ["long"])


@pytest.mark.parametrize("kind", ["gone", "another id", "of no batch", "empty", "a folder"])
def test_what_is_not_the_rows_picture_tells_none(tmp_path, kind):
    index = Index(tmp_path)
    match kind:
        case "another id":
            picture(tmp_path, "a")
            (tmp_path / "a.png").rename(tmp_path / "b.png")
        case "of no batch":
            save(Image.new("RGB", (16, 16)), tmp_path / "b.png", RECORD, replace=True)
        case "empty":
            (tmp_path / "b.png").touch()
        case "a folder":
            (tmp_path / "b.png").mkdir()
    assert index.picture("b", "b.png") is None


def test_a_second_batch_in_the_folder_is_refused(tmp_path):
    index = Index(tmp_path)
    index.add(line("a"))
    code = "import sys; from pathlib import Path; from zimage.batch.index import Index; Index(Path(sys.argv[1]))"
    for _ in range(2):
        told = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
        assert "another batch writes there" in told.stderr
        index.settle("a")  # the lock passes on to the new file
    del index
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 0


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_taken_for_the_index(tmp_path, kind):
    path = tmp_path / NAME
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(RequestError, match="name a regular file"):
        Index(tmp_path)


def test_a_failed_row_has_a_line_without_a_picture():
    row = {"id": "a", "request": json.dumps({"prompt": "a", "seed": 3}), "asked": "hash"}
    told = failed_line(row, "it broke", 3)
    assert (told["path"], told["error"], told["attempts"], told["seed"]) == (None, "it broke", 3, 3)


def test_the_index_as_parquet(tmp_path):
    lines = [line("a", timings={"decode": 1.5}, seed=2**40), line("b", timings={}, seed=1)]
    write_parquet(tmp_path / "index.parquet", lines)
    first, second = read_parquet(tmp_path / "index.parquet")
    assert (first["seed"], json.loads(first["timings"]), second["id"]) == (2**40, {"decode": 1.5}, "b")
