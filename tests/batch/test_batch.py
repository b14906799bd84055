"""`batch` as users meet it: rows to pictures with `gen`'s bits, rows that fail, workers that die, resuming."""

import json
import os

import numpy as np
import processes
import pytest
from PIL import Image

from zimage import cluster
from zimage.batch.index import BATCH, NAME, read_index
from zimage.cli import main
from zimage.cli.pace import Pace
from zimage.pictures.files import read_metadata
from zimage.settings.declared import Request

SMALL = {"steps": 2, "width": 64, "height": 48}
POISON = [
    {"id": "kills", "prompt": "kill the process"},
    {"id": "wrong", "prompt": "a", "image": "picture.txt"},
    {"id": "gone", "prompt": "a", "image": "gone.png"},
]
ROWS = [
    *({"id": f"plain-{i}", "prompt": f"a cat on {i} chairs"} for i in range(20)),
    *({"id": f"guided-{i}", "prompt": "a dog", "negative": "fur", "guidance": 2.0, "seed": i} for i in range(3)),
    {"id": "pair", "prompt": "a fox", "images": 2, "seed": 8},
    {"id": "from-picture", "prompt": "a bird", "image": "start.png", "strength": 0.7},
]
COUNT = len(ROWS) + 1  # one row is two pictures


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save("start.png")
    (tmp_path / "picture.txt").write_text("no picture")
    return tmp_path


@pytest.fixture
def batch(tiny_folder, here, capfd):
    """Runs the command on rows; returns its status and what it said on both streams."""

    def call(rows, *options):
        (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
        model = ["--model", str(tiny_folder), "--device", "cpu", "--dtype", "fp32"]
        status = main(["batch", "rows.jsonl", "-o", "out", *model, *small, "--workers", "2", *options])
        return status, *capfd.readouterr()

    return call


def lines(folder):
    found = read_index(folder / "out" / NAME)
    assert len({line["id"] for line in found}) == len(found)
    return {line["id"]: line for line in found}


def check_pictures(pipe, folder, ids):
    """The pictures of these rows: the bits that the pipeline draws for the request in their line and in their file."""
    told = lines(folder)
    for id in ids:
        line, path = told[id], folder / "out" / told[id]["path"]
        record = read_metadata(path)
        assert (line["error"], record["request"], record[BATCH]["id"]) == (None, line["request"], id)
        request = {name: value for name, value in line["request"].items() if value is not None}
        if "image" in request:
            request["image"] = str(folder / request["image"]["name"])
        (drawn,) = pipe.generate(**request).images
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), np.asarray(drawn)), id


def test_a_batch(batch, here, pipe, monkeypatch):
    """Workers are killed on the way, some rows fail, and the folder is taken up with captions from elsewhere."""
    ended = Pace.ended
    killed = []

    def and_kill(self, line):
        ended(self, line)
        if self._done == 6:
            killed.append(processes.workers(os.getpid())[-1])
            processes.kill(killed[-1])

    monkeypatch.setattr(Pace, "ended", and_kill)
    status, out, err = batch([*POISON, *ROWS])
    assert (status, out) == (1, f"out/{NAME}\n"), err
    assert f"3 rows of {COUNT + 3} failed" in err
    assert [line for line in err.splitlines() if not line.startswith(("error: ", f"{COUNT} pictures in"))] == []
    assert killed
    told = lines(here)
    assert told["kills"]["error"] == "its process died in drawing"
    assert told["wrong"]["error"].startswith("image: picture.txt cannot be read as a picture")
    assert "gone.png is not a file" in told["gone"]["error"]
    assert [told[row["id"]]["attempts"] for row in POISON] == [3, 1, 0]
    check_pictures(pipe, here, set(told) - {row["id"] for row in POISON})
    assert sorted(path.name for path in here.glob("out/*")) == sorted(
        [NAME, *(line["path"] for line in told.values() if line["path"])]
    )

    monkeypatch.setattr(Pace, "ended", ended)
    _check_taken_up(batch, here, pipe, told)


def _check_taken_up(batch, here, pipe, told):
    """Half of the index is lost, a picture too, some rows are changed; all others stay as they are."""
    path = here / "out" / NAME
    path.write_bytes(path.read_bytes()[:3000])
    (here / "out" / "plain-3.png").unlink()
    changed = {"plain-4": {"steps": 3}, "guided-1": {"negative": "hair"}}
    rows = [{**row, **changed.get(row["id"], {})} for row in ROWS]
    before = {file.name: file.stat().st_mtime_ns for file in here.glob("out/*.png")}
    status, _, err = batch(rows, "--encoders", "1", "--parquet")
    assert (status, "3 pictures in" in err, f"{COUNT - 3} were drawn before" in err) == (0, True, True), err
    after = {file.name: file.stat().st_mtime_ns for file in here.glob("out/*.png")}
    assert {name for name in after if after[name] != before.get(name)} == {"plain-3.png", "plain-4.png", "guided-1.png"}
    now = lines(here)
    kept = set(told) - {"plain-3", "plain-4", "guided-1"} - {row["id"] for row in POISON}
    assert {id: now[id] for id in kept} == {id: told[id] for id in kept}
    for id in ("plain-3", "plain-4", "guided-1"):
        assert "encode" not in now[id]["timings"]  # no worker had a text encoder
    check_pictures(pipe, here, now.keys() - {row["id"] for row in POISON})
    assert (here / "out" / "index.parquet").is_file()


# ------------------------------------------------------------------ what is refused before anything starts

REFUSED = {
    "": "pass a file of rows, or prompts with --file: one of them",
    "rows.jsonl --file prompts.txt": "one of them",
    "nowhere.jsonl": "nowhere.jsonl cannot be read",
    "empty.jsonl": "empty.jsonl holds no rows",
    "rows.jsonl --steps 0": "steps 0 is too small",
    "rows.jsonl --vary steps=0": "rows.jsonl line 1: steps 0 is too small",
    "rows.jsonl --vary stepz=1": "vary 'stepz=1' names no setting of a row; did you mean 'steps'?",
    "rows.jsonl --vary steps": "vary 'steps' should be NAME=VALUE,VALUE,…",
    "rows.jsonl --vary steps=a": "steps 'a' should be of type int",
    'rows.jsonl --vary negative="a': "a value with a comma stands in double quotes, as in CSV",
    "rows.jsonl --workers 0": "workers 0 is too small",
    "rows.jsonl -o rows.jsonl": "rows.jsonl is not a folder",
    "rows.jsonl -o no/where": "the folder 'no' does not exist",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(words, here, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "connected", lambda *_: pytest.fail("Ray was started"))
    (here / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (here / "empty.jsonl").write_text("\n")
    (here / "prompts.txt").write_text("a\n")
    assert main(["batch", "-o", "out", *words.split()]) == 2
    said = capsys.readouterr().err
    assert (REFUSED[words] in said, said.count("\n")) == (True, 1), said


def test_a_file_that_merely_lies_there_names_no_cluster(here, monkeypatch, capsys):
    """Its processes would run code here."""
    monkeypatch.delenv("ZIMAGE_CONFIG")
    (here / "zimage.toml").write_text('[default]\naddress = "ray://elsewhere:10001"\n')
    (here / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert main(["batch", "rows.jsonl", "-o", "out"]) == 2
    assert "pass --address to use it" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense", "ray://127.0.0.1:9"])
def test_a_cluster_that_does_not_answer(address, here, capsys):
    (here / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert main(["batch", "rows.jsonl", "-o", "out", "--address", address]) == 1
    said = capsys.readouterr().err
    assert (said.count("\n"), f"error: no Ray cluster answers at '{address}'" in said) == (1, True), said


def test_a_model_that_is_not_there_is_one_line(here, capfd):
    (here / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert main(["batch", "rows.jsonl", "-o", "out", "--model", "nowhere", "--device", "cpu"]) == 1
    said = capfd.readouterr().err
    assert (said.count("\n"), "nowhere" in said) == (1, True), said


def test_a_request_is_checked_as_its_row_is(here):
    """The rows' settings are those of a request: none is left out, none is new."""
    from zimage.batch.sources import NAMES

    assert set(NAMES) == {"id", *Request.names()}
