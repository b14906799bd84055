"""References and controls over HTTP: entries and files become pieces; names, limits, what is kept, what is refused."""

import asyncio
import base64
import json
import os

import pytest
from fake import FakeService, app_of
from fastapi.testclient import TestClient
from hostile import BOMBS, picture

from zimage.errors import RequestError
from zimage.serve.asking import Asked, asked
from zimage.serve.attached import attached
from zimage.serve.conditions import Piece
from zimage.serve.forms import own
from zimage.serve.refusals import TooLarge
from zimage.serve.schema import drawing_schema
from zimage.serve.shelf import CONTROL_ENDINGS, names_in
from zimage.serve.uploads import Uploads
from zimage.settings.serving import ServeSettings

LIMITS = ServeSettings(max_conditions=4)
PNG = base64.b64encode(picture()).decode()


def ask(values, files=None):
    return asked(values, files or {}, "own", LIMITS).conditions


def test_entries_hold_their_pictures_or_take_the_files_in_order():
    entries = [{"alpha": 0.1}, {"picture": PNG, "alpha": 0.2}, {}]
    assert ask({"reference": entries}, {"reference": [b"first", b"second"]}) == {
        "reference": (Piece(b"first", {"alpha": 0.1}), Piece(picture(), {"alpha": 0.2}), Piece(b"second", {}))
    }


def test_files_alone_are_entries():
    assert ask({}, {"reference": [b"a", b"b"]}) == {"reference": (Piece(b"a", {}), Piece(b"b", {}))}


def test_null_and_an_empty_list_are_nothing():
    assert ask({"reference": None, "control": []}) == {}


WRONG = {
    "reference": ("a.png", ["a.png"], [{"picture": "/etc/passwd"}], [{"picture": 7}], [{}], [{"alpha": 0.5}], 7, {},
                  [{"picture": PNG, "alpha": 2}], [{"picture": PNG, "alpha": "0.5"}], [{"picture": PNG, "alpha": True}],
                  [{"picture": PNG, "scale": 1}], [{"picture": PNG, "picture_hash": "0"}],
                  [{"picture": "http://169.254.169.254/"}], [{"picture": PNG}] * 101, [[PNG]], [None]),
    "control": ([{"picture": PNG}], [{"picture": PNG, "model": ""}], [{"picture": PNG, "model": 7}],
                *([{"picture": PNG, "model": name}] for name in ("../x", "/etc/passwd", "a\\b", "C:x", ".x", "\0")),
                [{"picture": PNG, "model": "union", "scale": 11}], [{"picture": PNG, "model": ["union"]}],
                [{"picture": PNG, "model": "union", "model_hash": "0"}]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, some in WRONG.items() for value in some])
def test_what_cannot_be_used_is_one_line_that_names_the_field(name, value):
    with pytest.raises(RequestError) as caught:
        ask({name: value})
    assert caught.value.fields == (name,)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_files_have_to_be_as_many_as_the_entries_without_one():
    for files in ([b"a"], [b"a", b"b", b"c"]):
        with pytest.raises(RequestError, match=f"{len(files)} files came for 2 entries") as caught:
            ask({"reference": [{}, {"alpha": 0.5}]}, {"reference": files})
        assert caught.value.fields == ("reference",)
    with pytest.raises(RequestError, match="101 are too many; this server takes at most 4"):
        ask({}, {"reference": [b"a"] * 101})


# ---------------------------------------------------------------------- over HTTP


@pytest.fixture
def service(tmp_path):
    return FakeService(tmp_path, max_conditions=4)


@pytest.fixture
def client(service):
    return TestClient(app_of(own, service))


def test_several_parts_of_one_name_are_the_files_of_a_list(client, service):
    request = json.dumps(
        {"prompt": "a", "control": [{"model": "union", "scale": 1}, {"model": "union", "picture": PNG}]}
    )
    parts = [("request", (None, request)), ("reference", ("a.png", b"a")), ("control", ("../x", b"b"))]
    assert client.post("/api/jobs", files=[*parts, ("reference", ("a.png", b"c"))]).status_code == 202
    (sent,) = service.asked
    assert sent.conditions == {
        "reference": (Piece(b"a", {}), Piece(b"c", {})),
        "control": (Piece(b"b", {"model": "union", "scale": 1}), Piece(picture(), {"model": "union"})),
    }


def test_other_parts_still_come_once(client, service):
    answer = client.post("/api/jobs", files=[("image", ("a.png", b"a")), ("image", ("a.png", b"c"))])
    assert answer.status_code == 422
    assert answer.json()["error"]["fields"] == ["image"]


def test_101_parts_are_not_even_read(client):
    answer = client.post("/api/jobs", files=[("reference", ("a.png", picture())) for _ in range(101)])
    assert answer.status_code == 400
    assert "too many parts" in answer.json()["error"]["message"]


def test_the_schema_names_the_parts_of_an_entry():
    fields = drawing_schema(LIMITS, ["union"])["properties"]
    assert fields["reference"]["maxItems"] == 4
    assert set(fields["reference"]["items"]["properties"]) == {"picture", "alpha"}
    assert fields["control"]["items"]["properties"]["model"]["enum"] == ["union"]
    assert fields["control"]["items"]["required"] == ["model"]
    assert fields["control"]["items"]["properties"]["scale"]["default"] == 0.75


# ---------------------------------------------------------------------- in their place


class Shelf:
    def __init__(self, folder):
        self.folder = folder

    async def loras(self):
        return {}

    async def controls(self):
        return names_in(str(self.folder), CONTROL_ENDINGS)


def place(tmp_path, conditions, **limits):
    uploads = Uploads(tmp_path / "uploads", ServeSettings(**limits))
    return asyncio.run(attached(Asked({}, conditions=conditions), uploads, Shelf(tmp_path / "controls")))


def some(*sizes, **values):
    return [Piece(picture(size=size), values) for size in sizes]


def test_pictures_are_kept_once_and_models_found_by_their_names(tmp_path):
    (tmp_path / "controls" / "deep").mkdir(parents=True)
    (tmp_path / "controls" / "deep" / "union.2.1.safetensors").touch()
    pieces = some((16, 16), (16, 16), model="union.2.1", scale=0.5)
    found = place(tmp_path, {"control": pieces, "reference": some((16, 16), alpha=0.1)})
    (kept,) = (tmp_path / "uploads").iterdir()
    model = str(tmp_path / "controls" / "deep" / "union.2.1.safetensors")
    assert found.values["control"] == [{"model": model, "scale": 0.5, "picture": str(kept)}] * 2
    assert found.values["reference"] == [{"alpha": 0.1, "picture": str(kept)}]
    assert set(found.hashes) == {kept.name}
    assert found.places[model] == "control"


@pytest.mark.parametrize("model", ["absent", "controls", "union.gguf.gguf"])
def test_a_model_that_is_not_there_is_named_and_its_folder_is_not(tmp_path, model):
    (tmp_path / "controls").mkdir()
    (tmp_path / "controls" / "union.gguf").touch()
    with pytest.raises(RequestError, match=r"is not on this server; (known: union|did you mean 'union'\?)") as caught:
        place(tmp_path, {"control": some((16, 16), model=model)})
    assert caught.value.fields == ("control",)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_among_references_is_refused(tmp_path, kind):
    pieces = [*some((16, 16)), Piece(BOMBS[kind], {})]
    with pytest.raises((RequestError, TooLarge)) as caught:
        place(tmp_path, {"reference": pieces})
    assert caught.value.fields == ("reference",)
    assert len(os.listdir(tmp_path / "uploads")) == 1


def test_pictures_together_are_no_more_pixels_than_one_may_be(tmp_path):
    assert place(tmp_path, {"reference": some((20, 20), (20, 20))}, max_decoded=800)
    with pytest.raises(TooLarge, match="1,200 pixels together; at most 800") as caught:
        place(tmp_path, {"reference": some((20, 20), (20, 20), (20, 20))}, max_decoded=800)
    assert caught.value.fields == ("reference",)


def test_names_on_the_shelf(tmp_path):
    (tmp_path / "canny").mkdir()
    for name in ("a.safetensors", "b.gguf", "c.txt", "canny/diffusion_pytorch_model.safetensors"):
        (tmp_path / name).touch()
    assert list(names_in(str(tmp_path), CONTROL_ENDINGS).items()) == [
        ("a", tmp_path / "a.safetensors"),
        ("b", tmp_path / "b.gguf"),
        ("canny", tmp_path / "canny"),
    ]
    assert names_in(None, CONTROL_ENDINGS) == names_in(str(tmp_path / "absent"), CONTROL_ENDINGS) == {}
