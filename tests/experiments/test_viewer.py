"""The viewer over HTTP: what it says of a folder, pictures that lie in it, differences, votes, renders once more."""

import dataclasses
import io
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sweeps import folder_of, picture, records

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from viewing import PATIENCE, viewer

import zimage
from zimage.cli import main
from zimage.experiments.difference import difference
from zimage.experiments.record import RECORDS, facts, write_records
from zimage.experiments.votes import VOTES
from zimage.pictures.files import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = folder_of(tmp_path_factory.mktemp("viewer") / "sweep", made := records(prompts=("a fox", "<b>a dog</b>")))
    made[3] = dataclasses.replace(made[3], path=None, error="out of memory")
    made[6] = dataclasses.replace(made[6], seed=2**63 - 1, scores={"psnr": 31.5})
    (folder / "c005.png").rename(folder.parent / "outside.png")
    (folder / "c005.png").symlink_to(folder.parent / "outside.png")
    write_records(folder, made)
    return folder


@pytest.fixture(scope="module")
def http(folder):
    with viewer(folder) as client:
        yield client


def pixels(answer):
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content)).convert("RGB")


def test_the_grid_has_every_cell_in_its_place(http):
    known = http.get("/api/grid", params={"rows": "shift"}).json()
    assert known["sides"] == {"columns": ["steps"], "rows": ["shift"], "pages": ["prompt", "seed"]}
    ids = [id for page in known["pages"] for row in page["places"] for id in row if id]
    assert sorted(ids) == sorted(known["cells"]) == [f"c{k:03d}" for k in range(12)]
    assert known["pages"][0]["title"] == "prompt a fox · seed 0"
    assert known["pages"][0]["columns"] == ["steps 4", "steps 8", "steps 16"]
    cells = known["cells"]
    assert cells["c003"]["fault"] == "out of memory"
    assert cells["c005"]["fault"] == "not rendered"
    assert (cells["c006"]["seed"], cells["c006"]["facts"]) == (str(2**63 - 1), ["psnr 31.5"])
    assert (cells["c000"]["width"], cells["c000"]["height"]) == (48, 32)


def test_filters_and_their_faults(http):
    known = http.get("/api/grid", params={"only": ["steps=4", "shift=3"]}).json()
    assert (len(known["cells"]), known["total"]) == (2, 12)
    for wrong in (
        {"only": "steps=5"},
        {"rows": "nothing"},
        {"only": ["steps=4", "seed=9223372036854775807", "shift=3"]},
    ):
        answer = http.get("/api/grid", params=wrong)
        assert answer.status_code == 422, wrong
        assert set(answer.json()["error"]) == {"message", "fields"}


def test_pictures_are_the_files_and_thumbnails_small(http, folder):
    answer = http.get("/api/cells/c001/picture")
    assert answer.content == (folder / "c001.png").read_bytes()
    assert answer.headers["content-type"] == "image/png"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    picture(1, (1600, 800)).save(folder / "c002.png")
    thumbnail = http.get("/api/cells/c002/thumbnail")
    assert pixels(thumbnail).size == (320, 160)
    assert len(thumbnail.content) < 60_000
    picture(2).save(folder / "c002.png")
    assert pixels(http.get("/api/cells/c002/thumbnail")).size == (48, 32)  # the one that is there now


@pytest.mark.parametrize("id", ["c003", "c005", "nothing", "..%2fsecret", "%2e%2e/outside.png"])
def test_what_is_not_a_picture_of_the_folder_is_not_found(http, id):
    for kind in ("picture", "thumbnail"):
        assert http.get(f"/api/cells/{id}/{kind}").status_code in (400, 404)


def test_a_file_that_is_no_picture_is_not_sent(http, folder):
    content = (folder / "c011.png").read_bytes()
    (folder / "c011.png").write_text("<script>alert(1)</script>")
    assert http.get("/api/cells/c011/picture").status_code == 422
    assert http.get("/api/cells/c011/thumbnail").status_code == 422
    assert http.get("/api/grid").json()["cells"]["c011"]["fault"]
    (folder / "c011.png").write_bytes(content)


def test_the_whole_record_is_told(http):
    known = http.get("/api/cells/c006").json()
    assert known["request"]["steps"] == 4
    assert known["seed"] == 2**63 - 1


@pytest.mark.parametrize("kind", ["absolute", "highlight", "heatmap"])
def test_differences_are_those_of_sheets(http, folder, kind):
    answer = http.get("/api/difference", params={"left": "c000", "right": "c001", "kind": kind, "gain": 2})
    wanted = difference(Image.open(folder / "c001.png"), Image.open(folder / "c000.png"), kind, 2)
    assert pixels(answer).tobytes() == wanted.tobytes()
    assert answer.headers["x-distance"].startswith("mean ")


@pytest.mark.parametrize("wrong", [{"kind": "x"}, {"gain": 0}, {"gain": "nan"}, {"right": "c003"}, {"left": "c999"}])
def test_differences_that_cannot_be(http, wrong):
    asked = {"left": "c000", "right": "c001", "kind": "absolute", "gain": 2, **wrong}
    assert http.get("/api/difference", params=asked).status_code in (404, 422)


def test_votes_are_blind_and_stored(http, folder):
    for count in range(1, 4):
        asked = http.post("/api/pairs", json={"axis": "steps"})
        assert asked.status_code == 201
        told = asked.json()
        token = told.pop("token")
        assert set(told) == {"prompt", "shared", "sizes", "votes"}
        assert not any(word in str(told) for word in ("c0", "steps", "16"))
        sides = [http.get(f"/api/pairs/{token}/{side}") for side in ("left", "right")]
        assert all(not pixels(answer).info for answer in sides)  # nor do the files say what they are
        assert http.post(f"/api/pairs/{token}", json={"choice": "tie"}).json() == {"votes": count}
        assert http.post(f"/api/pairs/{token}", json={"choice": "tie"}).status_code == 422
        assert http.get(f"/api/pairs/{token}/left").status_code == 404
        vote = json.loads((folder / VOTES).read_text().splitlines()[-1])
        own = [(folder / f"{vote[side]}.png").read_bytes() for side in ("left", "right")]
        assert [pixels(a).tobytes() for a in sides] == [Image.open(io.BytesIO(b)).tobytes() for b in own]
    counted = http.get("/api/votes").json()
    assert (counted["votes"], counted["unread"]) == (3, 0)
    assert sum(row["ties"] for row in counted["standings"]["steps"]) == 6
    for wrong in ({"axis": "size"}, {"axis": 3}, {}):
        assert http.post("/api/pairs", json=wrong).status_code == 422


def test_strangers_and_other_pages_are_refused(http):
    assert http.get("/api/grid", headers={"Host": "evil.example"}).status_code == 403
    assert http.post("/api/pairs", json={"axis": "steps"}, headers={"Origin": "http://evil.example"}).status_code == 403
    assert http.get("/page/..%2findex.html").status_code in (400, 404)
    assert http.get("/page/nothing.js").status_code == 404
    assert http.get("/api/nothing").status_code == 404


def test_a_token_is_asked_for(folder, tmp_path):
    token = tmp_path / "token"
    token.write_text("a-token-of-some-length")
    token.chmod(0o600)
    with viewer(folder, "--token-file", str(token)) as client:
        assert client.get("/").status_code == 200
        assert client.get("/api/grid").status_code == 401
        assert client.get("/api/cells/c000/picture").status_code == 401
        bearer = {"Authorization": "Bearer a-token-of-some-length"}
        assert client.get("/api/grid", headers=bearer).status_code == 200


def test_a_host_beyond_this_computer_needs_a_token(folder, capsys, monkeypatch):
    monkeypatch.delenv("ZIMAGE_TOKEN", raising=False)
    assert main(["view", str(folder), "--host", "0.0.0.0"]) == 2
    assert "clients need a token" in capsys.readouterr().err


def test_a_folder_without_cells_is_one_line(tmp_path, capsys):
    assert main(["view", str(tmp_path)]) == 2
    assert "holds no cells.jsonl" in capsys.readouterr().err


# ------------------------------------------------------------------ rendered again


WITH_ANOTHER = f"1 pixels differ (mean 0.00, max 1); torch is {torch.__version__!r} here and was '1.0'"


def ended(http, id):
    end = time.monotonic() + PATIENCE
    while (state := http.get(f"/api/cells/{id}/render").json())["state"] in ("queued", "running"):
        assert time.monotonic() < end, state
        time.sleep(0.1)
    return state


def test_a_cell_is_rendered_again_and_its_bits_compared(tmp_path):
    pipe = zimage.ZImage.load()
    made, jobs, start = records({"steps": [1, 2]}, prompts=("a red cup",)), [], tmp_path / "start.png"
    picture(4, (64, 64)).save(start)
    for k, record in enumerate(made):
        asked = {"prompt": record.prompt, "seed": record.seed, "width": 64, "height": 64, "steps": k + 1}
        asked |= {"image": str(start), "strength": 0.5} if k else {}
        jobs.append(pipe.prepare(zimage.Request(**asked)))
        request = json.loads(json.dumps(jobs[-1].to_dict()["request"]))  # as a sweep keeps it
        told = facts(json.loads(json.dumps(pipe.metadata(jobs[-1], 0))))
        told["machine"]["torch"] = "1.0"
        made[k] = dataclasses.replace(record, request=request, load={"device": "cpu"}, **told)
    made.append(dataclasses.replace(made[0], id="wrong", axes={"steps": 7}, request={"prompt": "x", "stepz": 1}))
    made.append(dataclasses.replace(made[0], id="away", axes={"steps": 8}, load={"encoder_url": "http://evil.example"}))
    endless = {"prompt": "a cup", "width": 256, "height": 256, "steps": 200, "seed": 1}
    made.append(dataclasses.replace(made[0], id="slow", axes={"steps": 9}, request=endless))
    folder = folder_of(tmp_path / "real", made)
    for job, record in zip(jobs, made, strict=False):
        *_, last = pipe.run(job)
        save(last.image, folder / record.path, pipe.metadata(job, 0), replace=True)
    with Image.open(folder / made[1].path) as image:
        levels = np.array(image)
    levels[5, 6, 1] ^= 1
    Image.fromarray(levels).save(folder / made[1].path)
    with viewer(folder) as http:
        assert http.get("/api/cells/c000/render").status_code == 404
        assert http.post("/api/cells/c000/render").status_code == 202
        assert ended(http, "c000") == {"state": "done", "step": 0, "total": 0, "is_equal": True, "told": "equal bits"}
        http.post("/api/cells/c001/render")
        other = ended(http, "c001")
        assert (other["is_equal"], other["told"]) == (False, WITH_ANOTHER)
        again = pixels(http.get("/api/cells/c001/render/picture"))
        assert np.abs(np.array(again, int) - levels).sum() == 1
        http.post("/api/cells/wrong/render")
        assert "there is no setting 'stepz'" in ended(http, "wrong")["told"]
        refused = http.post("/api/cells/away/render")
        assert refused.status_code == 422
        assert "encoder_url" in refused.json()["error"]["message"]
        http.post("/api/cells/slow/render")
        while http.get("/api/cells/slow/render").json()["step"] < 1:
            time.sleep(0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 15  # it is not waited for


def test_a_running_sweep_is_seen_as_it_grows(tmp_path):
    made = records()
    folder = folder_of(tmp_path / "growing", made[:2])
    with viewer(folder) as http:
        assert http.get("/api/grid").json()["total"] == 2
        picture(9).save(folder / "c002.png")
        with (folder / RECORDS).open("a") as file:
            file.write(made[2].line() + "\n" + made[3].line()[:40])  # the last is being written
        assert http.get("/api/grid").json()["total"] == 3
        assert http.get("/api/cells/c002/picture").status_code == 200
