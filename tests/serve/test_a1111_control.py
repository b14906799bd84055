"""Units of the ControlNet extension, as its clients send them, and what they ask of it before they draw."""

import base64

import pytest
from fake import FakeService, app_of
from fastapi.testclient import TestClient
from hostile import picture

from zimage.errors import RequestError
from zimage.serve.conditions import Piece
from zimage.serve.forms import a1111, controlnet
from zimage.serve.forms.a1111_control import controls

PNG = base64.b64encode(picture()).decode()
UNIT = {"image": PNG, "model": "union [f00dcafe]", "weight": 0.5}
# A unit as the web UI's own page writes it, with everything that it has.
WHOLE = {
    **UNIT,
    "enabled": True,
    "module": "none",
    "resize_mode": "Crop and Resize",
    "low_vram": False,
    "processor_res": 512,
    "threshold_a": -1,
    "threshold_b": -1,
    "guidance_start": 0.0,
    "guidance_end": 1.0,
    "control_mode": "Balanced",
    "pixel_perfect": True,
    "hr_option": "Both",
    "mask": None,
}


def translated(*units, started=None):
    return controls({"controlnet": {"args": list(units)}}, started)


def test_a_unit_becomes_a_control():
    values = {"control": [{"model": "union", "picture": PNG, "scale": 0.5}]}
    assert translated(WHOLE) == (values, [])
    assert controls({"ControlNet": {"args": [UNIT]}}, None) == (values, [])


@pytest.mark.parametrize("image", [{"image": PNG, "mask": None}, f"data:image/png;base64,{PNG}"])
def test_a_picture_may_come_in_other_forms(image):
    (entry,) = translated({**UNIT, "image": image})[0]["control"]
    assert entry["picture"].endswith(PNG)
    (entry,) = translated({"input_image": PNG, "model": "union"})[0]["control"]
    assert entry["picture"] == PNG


def test_the_picture_to_start_from_is_the_usual_one():
    (entry,) = translated({"model": "union"}, started="AAAA")[0]["control"]
    assert entry["picture"] == "AAAA"


def test_units_that_are_off_are_not_read():
    assert translated({"enabled": False, "model": "None"}, {"enabled": False, "weight": "many"}) == ({}, [])


def test_when_it_counts_and_what_makes_its_picture():
    values, _ = translated({**UNIT, "guidance_start": 0.1, "guidance_end": 0.8, "module": "canny"})
    assert {name: values[name] for name in ("control_start", "control_end", "control_preprocess")} == {
        "control_start": 0.1,
        "control_end": 0.8,
        "control_preprocess": "canny",
    }


def test_what_has_no_meaning_here_is_named():
    unit = {**WHOLE, "control_mode": "ControlNet is more important", "threshold_a": 30, "x\ny": 1}
    _, ignored = controls({"controlnet": {"args": [unit, unit]}, "dynamic thresholding": {"args": [1]}}, None)
    assert ignored == [
        *("alwayson_scripts.dynamic thresholding", "controlnet.control_mode", "controlnet.threshold_a"),
        "controlnet.x y",
    ]


WRONG = {
    "no list": ({"controlnet": {"args": {}}}, "should be a list"),
    "no object": ([], "should be an object"),
    "a text as a unit": ({"controlnet": {"args": ["union"]}}, "list of objects"),
    "many": ({"controlnet": {"args": [UNIT] * 11}}, "11 units are too many"),
    "no picture": ({"controlnet": {"args": [{"model": "union"}]}}, "unit 0: image"),
    "no model": ({"controlnet": {"args": [UNIT, {**UNIT, "model": "None"}]}}, "unit 1: model"),
    "another module": ({"controlnet": {"args": [{**UNIT, "module": "depth_midas"}]}}, "module 'depth_midas' is not"),
    "a weight that is no number": ({"controlnet": {"args": [{**UNIT, "weight": "1"}]}}, "weight '1'"),
    "two beginnings": (
        {"controlnet": {"args": [UNIT, {**UNIT, "guidance_start": 0.5}]}},
        "guidance_start has to be the same",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_units_that_cannot_be_used(case):
    scripts, words = WRONG[case]
    with pytest.raises(RequestError, match=words) as caught:
        controls(scripts, None)
    assert caught.value.fields == ("alwayson_scripts",)


# ---------------------------------------------------------------------- over HTTP


@pytest.fixture
def service(tmp_path):
    return FakeService(tmp_path)


@pytest.fixture
def client(service):
    app = app_of(a1111, service)
    app.include_router(controlnet.routes(service))
    return TestClient(app)


def test_a_request_with_a_unit_is_drawn_by_it(client, service):
    scripts = {"controlnet": {"args": [WHOLE, {"enabled": False}]}}
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a", "alwayson_scripts": scripts})
    assert answer.status_code == 200, answer.text
    assert "X-Warning" not in answer.headers
    assert service.asked[-1].conditions == {"control": (Piece(picture(), {"model": "union", "scale": 0.5}),)}
    assert "alwayson_scripts" not in answer.json()["parameters"]


def test_a_unit_at_fault_is_named_as_the_client_calls_it(client):
    for unit in ({**UNIT, "image": "/etc/passwd"}, {**UNIT, "model": "../union"}, {**UNIT, "weight": 50}):
        scripts = {"controlnet": {"args": [unit]}}
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a", "alwayson_scripts": scripts})
        assert answer.status_code == 400
        assert answer.json()["detail"].startswith("alwayson_scripts: ")


def test_what_clients_ask_of_the_extension(client):
    assert client.get("/controlnet/model_list").json() == {"model_list": ["union"]}
    modules = client.get("/controlnet/module_list?alias_names=true").json()
    assert modules["module_list"] == list(modules["module_detail"]) == ["none", "canny"]
    assert client.get("/controlnet/version").json() == {"version": 2}
    assert client.get("/controlnet/settings").json() == {"control_net_unit_count": 10}
