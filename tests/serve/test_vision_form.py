"""/api/vl: whether the server can look, what it saw as a file, renders with references, its cache."""

import base64
import json
from dataclasses import replace

import pytest
from fake import FakeService, app_of
from fastapi.testclient import TestClient
from hostile import BOMBS, picture

from zimage.serve.conditions import Piece
from zimage.serve.forms import vision
from zimage.settings.captions import VISION_BLENDS

PNG = base64.b64encode(picture()).decode()


@pytest.fixture
def blind(tmp_path):
    return FakeService(tmp_path)


@pytest.fixture
def service(blind):
    blind.about = replace(blind.about, vision={"name": "Qwen3-VL-4B-Instruct", "mode": "full", "fingerprint": "0"})
    return blind


@pytest.fixture
def client(blind):
    return TestClient(app_of(vision, blind), base_url="http://testserver/api/vl/")


LOOKS = [("post", "extract"), ("post", "generate"), ("get", "cache"), ("delete", "cache")]


@pytest.mark.parametrize(("method", "path"), LOOKS)
def test_a_server_that_cannot_look_says_so_in_one_line(client, blind, method, path):
    answer = client.request(method, path, **({"json": {"picture": PNG}} if method == "post" else {}))
    assert answer.status_code == 409
    assert answer.json()["error"]["message"] == "this server has no vision model; start it with --vision-model"
    assert blind.asked == blind.computed == []
    assert blind.cleared == 0


def test_it_says_whether_it_can(client, blind):
    told = client.get("status").json()
    assert told == {"available": False, "loaded": False, "model": None, "mode": None, "reason": told["reason"]}
    assert "--vision-model" in told["reason"]


def test_it_says_with_what(client, service):
    told = client.get("status").json()
    assert told == {"available": True, "loaded": True, "model": "Qwen3-VL-4B-Instruct", "mode": "full", "reason": ""}
    config = client.get("config").json()
    assert config["modes"] == list(VISION_BLENDS)
    assert config["defaults"]["alpha"] == 0.3
    assert config["defaults"]["vision_layer"] == -2


def test_the_settings_of_the_server_are_its_defaults(client, service):
    service.launch = replace(service.launch, defaults={"vision_blend": VISION_BLENDS[-1], "vision_layer": -6})
    defaults = client.get("config").json()["defaults"]
    assert (defaults["vision_blend"], defaults["vision_layer"]) == (VISION_BLENDS[-1], -6)


def test_what_is_seen_comes_as_a_file(client, service):
    parts = {"request": (None, json.dumps({"vision_layer": -6})), "picture": ("../cat.png", picture())}
    for sent in ({"json": {"picture": PNG, "vision_layer": -6}}, {"files": parts}):
        answer = client.post("extract", **sent)
        assert (answer.status_code, answer.content) == (200, b"seen")
        assert answer.headers["content-disposition"] == 'attachment; filename="f00d.safetensors"'
        (kept,) = service.uploads.folder.iterdir()
        assert service.computed.pop() == (
            "see",
            {"form": "sight", "picture": str(kept), "settings": {"vision_layer": -6}},
        )


WRONG = {
    "picture": ({}, {"picture": None}, {"picture": "/etc/passwd"}, {"picture": 7}, {"picture": "aGVsbG8="}),
    "vision_layer": ({"picture": PNG, "vision_layer": 3}, {"picture": PNG, "vision_layer": "x"}),
    "vision_tokens": ({"picture": PNG, "vision_tokens": "some"},),
    "steps": ({"picture": PNG, "steps": 3},),
}


@pytest.mark.parametrize(("field", "body"), [(field, body) for field, some in WRONG.items() for body in some])
def test_what_cannot_be_looked_at_is_refused_by_its_field(client, service, field, body):
    answer = client.post("extract", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["fields"] == [field]
    assert not service.computed


def test_one_picture_at_a_time(client, service):
    both = {"request": (None, json.dumps({"picture": PNG})), "picture": ("a.png", picture())}
    assert client.post("extract", files=both).json()["error"]["fields"] == ["picture"]
    twice = [("picture", ("a.png", picture()))] * 2
    assert client.post("extract", files=twice).json()["error"]["fields"] == ["picture"]
    other = {"picture": ("a.png", picture()), "image": ("a.png", picture())}
    assert client.post("extract", files=other).json()["error"]["fields"] == ["image"]


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_not_looked_at(client, service, kind):
    answer = client.post("extract", files={"picture": ("a.png", BOMBS[kind])})
    assert answer.status_code in (413, 422)
    assert answer.json()["error"]["fields"] == ["picture"]
    assert not service.computed


def test_a_render_with_references(client, service, tmp_path):
    service.open = lambda id: (tmp_path / f"{id}.png").open("rb")
    answer = client.post("generate", json={"prompt": "a", "seed": 7, "reference": [{"picture": PNG, "alpha": 0.5}]})
    assert (answer.status_code, answer.headers["x-seed"]) == (200, "7")
    assert service.asked[0].conditions == {"reference": (Piece(picture(), {"alpha": 0.5}),)}
    answer = client.post("generate", json={"prompt": "a"})
    assert answer.json()["error"]["fields"] == ["reference"]


def test_the_cache_is_counted_over_all_workers_and_emptied(client, service):
    told = client.get("cache").json()
    assert (told["hits"], told["size"], told["bytes"], told["hit_rate"]) == (6, 2, 128, 0.75)
    assert service.cleared == 0
    assert client.delete("cache").status_code == 200
    assert service.cleared == 1
