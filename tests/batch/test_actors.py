"""What becomes of a row in its process: attempts, errors of every kind, captions that come along. Without Ray."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import zimage
from zimage.batch import actors
from zimage.batch.actors import Encoder, Tools, Worker, facts
from zimage.batch.attempts import MOST, Attempts
from zimage.batch.index import BATCH
from zimage.errors import CheckpointError, OutOfMemory, RequestError
from zimage.formats import own_folder
from zimage.pictures.opening import opened_bytes

LOADING = {"device": "cpu", "dtype": "fp32"}
REQUEST = {"prompt": "a cat", "seed": 3, "steps": 2, "width": 64, "height": 48}


class Died(BaseException):
    """The process ended."""


@pytest.fixture
def tools(tiny_folder, monkeypatch):
    """As a cluster gives them, in this process; a process that ends raises Died."""
    counts = Attempts()
    remote = SimpleNamespace(**{name: SimpleNamespace(remote=getattr(counts, name)) for name in ("begin", "failed")})

    def ended(status):
        raise Died

    monkeypatch.setattr(actors.cluster, "get", lambda value: value)
    monkeypatch.setattr(actors.os, "_exit", ended)
    return Tools({**LOADING, "model": str(tiny_folder)}, {}, remote)


def packed(**request):
    text = json.dumps({**REQUEST, **request})
    return {"id": "a", "request": text, "asked": "hash", "captions": b"", "png": b"", "told": ""}


def failing(monkeypatch, *errors):
    """Let the attempts of workers fail with these errors, one after the other, and then succeed."""
    left, work = list(errors), Worker.work

    def failing_work(self, row, attempt):
        if left:
            raise left.pop(0)
        return work(self, row, attempt)

    monkeypatch.setattr(Worker, "work", failing_work)


@pytest.mark.parametrize("error", [RequestError("it is wrong"), CheckpointError("it is damaged")])
def test_what_would_fail_again_is_tried_once(tools, monkeypatch, error):
    failing(monkeypatch, *[error] * 3)
    told = json.loads(Worker(tools)(packed())["told"])
    assert (told["error"], told["attempts"], told["path"]) == (str(error), 1, None)


def test_memory_that_is_short_is_tried_again(tools, monkeypatch):
    failing(monkeypatch, *[OutOfMemory("full")] * (MOST - 1))
    told = json.loads(Worker(tools)(packed())["told"])
    assert (told["error"], told["attempts"]) == (None, MOST)


def test_after_the_last_attempt_its_error_stays(tools, monkeypatch):
    failing(monkeypatch, *[OutOfMemory("full")] * MOST)
    told = json.loads(Worker(tools)(packed())["told"])
    assert (told["error"], told["attempts"]) == ("full", MOST)


def test_what_nobody_foresaw_ends_the_process_and_after_three_the_row(tools, monkeypatch):
    failing(monkeypatch, *[KeyError("a wire came off")] * MOST)
    for _ in range(MOST):
        with pytest.raises(Died):
            Worker(tools)(packed())
    told = json.loads(Worker(tools)(packed())["told"])
    assert (told["error"], told["attempts"]) == ("KeyError: 'a wire came off'", MOST)


@pytest.mark.parametrize("actor", [Encoder, Worker])
def test_a_row_that_kills_without_a_word_ends_after_three(tools, monkeypatch, actor):
    def work(self, row, attempt):
        raise Died

    monkeypatch.setattr(actor, "work", work)
    for _ in range(MOST):
        with pytest.raises(Died):
            actor(tools)(packed())
    told = json.loads(actor(tools)(packed())["told"])
    assert told["error"] == f"its process died in {actor.STAGE}"


def test_attempts_of_one_stage_are_not_those_of_the_other(tools):
    row = Worker(tools)(Encoder(tools)(packed()))
    assert json.loads(row["told"])["attempts"] == 1


def test_a_row_that_failed_in_encoding_is_not_drawn(tools, monkeypatch):
    row = Encoder(tools)(packed(hidden_layer=-99))
    assert "hidden layer -99 does not exist" in json.loads(row["told"])["error"]
    monkeypatch.setattr(Worker, "work", lambda *_: pytest.fail("it was drawn"))
    assert Worker(tools)(row) == row


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("more", [{}, {"guidance": 2.0, "negative": "fur"}], ids=["plain", "guided"])
def test_captions_from_another_process_give_the_same_bits(tools, tiny_folder, monkeypatch, dtype, more):
    tools.loading["dtype"] = dtype
    encoder, worker = Encoder(tools), Worker(tools)
    row = encoder(packed(**more))
    assert row["captions"]
    assert encoder.pipe.loaded == ("text_encoder",)
    drawn = worker(row)
    assert "text_encoder" not in worker.pipe.loaded
    assert drawn["captions"] == b""  # they need not travel on
    alone = zimage.ZImage.load(tiny_folder, device="cpu", dtype=dtype).generate(**REQUEST, **more)
    with opened_bytes("it", drawn["png"]) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(alone.images[0]))
    line = json.loads(drawn["told"])
    assert line["request"] == alone.metadata[0]["request"]


def test_a_picture_carries_its_settings_and_its_row(tools, tmp_path):
    row = Worker(tools)(packed())
    (tmp_path / "a.png").write_bytes(row["png"])
    record = zimage.pictures.files.read_metadata(tmp_path / "a.png")
    own, line = record[BATCH], json.loads(row["told"])
    assert (own["id"], own["asked"], own["attempts"]) == ("a", "hash", 1)
    assert own["timings"] == line["timings"]
    assert set(own["timings"]) == {"load", "encode", "denoise", "decode"}


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_nothing_of_a_rows_pictures_stays_at_its_worker(tools, tmp_path, monkeypatch, content):
    """Ray ends its processes without letting them tidy up."""
    monkeypatch.setattr(own_folder.tempfile, "tempdir", str(tmp_path))
    if content is None:
        stream = io.BytesIO()
        Image.new("RGB", (64, 48)).save(stream, "PNG")
        content = stream.getvalue()
    tools.contents["ab"] = content
    worker = Worker(tools)
    told = [json.loads(worker(packed(image="ab/cat.png", width=None, height=None))["told"]) for _ in range(2)]
    fault = "image: cat.png cannot be read" if content == b"no picture" else "None"
    assert [str(line["error"]).startswith(fault) for line in told] == [True, True], told
    assert list(tmp_path.iterdir()) == []


def test_warnings_stand_in_the_line(tools):
    row = Worker(tools)(packed(prompt="cat " * 2000))
    (note,) = json.loads(row["told"])["notes"]
    assert "the model was trained for at most" in note


def test_facts_tell_models_from_one_another(tiny_folder, seeing_folder):
    found = [facts({**LOADING, "model": str(folder)}, []) for folder in (tiny_folder, seeing_folder)]
    assert found[0] != found[1]
    assert facts({**LOADING, "dtype": "bf16", "model": str(tiny_folder)}, []) != found[0]
    assert facts({**LOADING, "model": str(tiny_folder)}, []) == found[0]


def test_facts_tell_a_template_from_what_it_was(tiny_folder, tmp_path):
    told = []
    for text in ("In oil.", "In ink."):
        head = "---\nname: mine\ndescription: Mine\ncategory: photo\n---\n"
        (tmp_path / "mine.md").write_text(head + text)
        loading = {**LOADING, "model": str(tiny_folder), "templates": str(tmp_path)}
        told.append(facts(loading, ["mine", "nowhere"])["templates"])
    assert told[0]["mine"] != told[1]["mine"]
    assert told[0]["nowhere"] == ""
