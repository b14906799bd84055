"""What every form shares: bodies read and checked, values split, limits, and the description."""

import asyncio
import base64

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.testclient import TestClient

from zimage.errors import RequestError
from zimage.serve.about import About
from zimage.serve.asking import NAMES, asked, check_limits, from_base64
from zimage.serve.bodies import FormRoute, read_object
from zimage.serve.openapi import answers, content, describe, takes
from zimage.serve.refusals import NotFound, TooMany
from zimage.serve.schema import PRESETS, described, drawing_body, drawing_parts, text_body
from zimage.settings.declared import MAX_SIDE, SIZE_MULTIPLE
from zimage.settings.serving import ServeSettings

LIMITS = ServeSettings(max_pixels=1 << 20, max_images=4, max_steps=50)


def ask(values, attachments=None):
    return asked(values, attachments or {}, "own", LIMITS)


def fields_at_fault(values, attachments=None):
    with pytest.raises(RequestError) as caught:
        ask(values, attachments)
    return caught.value.fields


def test_values_go_to_whom_they_concern():
    values = {"prompt": "a cat", "steps": 4, "temperature": 0.5, "rewriter": "rewrite-photo", "lora": ["style:0.8"]}
    found = ask({**values, "image": base64.b64encode(b"png").decode()}, {"mask": [b"mask"]})
    assert found.values == {"prompt": "a cat", "steps": 4}
    assert found.rewrite == {"temperature": 0.5, "rewriter": "rewrite-photo"}
    assert (found.lora, found.attachments, found.form) == (("style:0.8",), {"image": b"png", "mask": b"mask"}, "own")


def test_null_leaves_open_what_may_be_open():
    assert ask({"template": None, "steps": None, "rewriter": None}) == ask({})
    assert fields_at_fault({"images": None}) == ("images",)


def test_layer_weights_stay_plain():
    assert ask({"layer_weights": "-2:0.7,-8:0.3"}).values == {"layer_weights": {"-2": 0.7, "-8": 0.3}}


@pytest.mark.parametrize("name", ["rewriter_url", "rewriter_model", "rewriter_timeout", "model", "memory", "promt"])
def test_settings_of_the_server_are_not_asked_for(name):
    assert name not in NAMES
    assert fields_at_fault({name: "http://elsewhere"}) == (name,)


@pytest.mark.parametrize(
    "values",
    [
        {"width": 2048, "height": 1024},
        {"width": 1024, "height": 1040},
        {"steps": 51},
        {"images": 5},
        {"images": 3, "prompt": ["a", "b"]},
        {"prompt": ["a"] * 5},
    ],
)
def test_more_than_the_server_draws_is_refused_by_name(values):
    assert set(fields_at_fault(values)) <= set(values)


def test_limits_hold_for_what_was_decided_too():
    check_limits({"width": 1024, "height": 1024, "steps": 50, "images": 2, "prompt": ["a", "b"], "seed": 7}, LIMITS)
    with pytest.raises(RequestError, match="1,048,576 pixels"):
        check_limits({"width": 1040, "height": 1024}, LIMITS)
    check_limits({"width": None, "height": None, "steps": None}, LIMITS)


@pytest.mark.parametrize(
    "name", ["../style", "/etc/passwd", "a\\b", "C:style", ".hidden", "", ":0.5", "style:101", "\0"]
)
def test_loras_go_by_name(name):
    assert fields_at_fault({"lora": [name]}) == ("lora",)


@pytest.mark.parametrize("value", [7, [7], {"style": 1}, ["a"] * 33])
def test_loras_are_a_list_of_names(value):
    assert fields_at_fault({"lora": value}) == ("lora",)


def test_an_existing_file_does_not_change_how_a_lora_is_read(tmp_path, monkeypatch):
    """Whether a file is there must not be told by an answer."""
    (tmp_path / "style:2").touch()
    monkeypatch.chdir(tmp_path)
    assert ask({"lora": "style:2"}).lora == ("style:2",)
    assert fields_at_fault({"lora": "style:2:x"}) == ("lora",)


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "http://example.com/a.png", "cat.png", "", "data:image/png;base64,", 7]
)
def test_attachments_are_bytes_never_places(text):
    assert fields_at_fault({"image": text}) == ("image",)


def test_base64_and_data_urls_are_read():
    text = base64.b64encode(b"\x89PNG").decode()
    assert from_base64("image", text) == from_base64("image", f"data:image/png;base64,{text[:3]}\n{text[3:]}")


def test_a_mask_may_lie_in_its_image():
    found = ask({"image": "YWJj", "mask": "alpha"})
    assert (found.values, found.attachments) == ({"mask": "alpha"}, {"image": b"abc"})
    assert fields_at_fault({"image": "alpha"}) == ("image",)
    assert fields_at_fault({"mask": "alpha"}, {"mask": [b"abc"]}) == ("mask",)


def test_a_file_and_base64_of_one_name_are_a_contradiction():
    assert fields_at_fault({"image": "YWJj"}, {"image": [b"abc"]}) == ("image",)


# ---------------------------------------------------------------------- bodies


def app() -> FastAPI:
    router = APIRouter(route_class=FormRoute)

    async def echo(request: Request):
        return await read_object(request)

    async def refuse(request: Request):
        raise TooMany("the queue is full", retry_after=2.4)

    async def missing(number: int):
        raise NotFound(f"there is no {number}")

    body = drawing_body(LIMITS)
    for form in ("/api", "/v1", "/sdapi/v1"):
        documented = answers(
            content("What was sent.", {"type": "object"}), 422, form=f"/{form.split('/')[1]}/", body=True
        )
        router.add_api_route(
            f"{form}/echo",
            echo,
            methods=["POST"],
            responses=documented,
            openapi_extra=takes("Anything.", json=body, parts=drawing_parts(body)),
        )
        router.add_api_route(f"{form}/refuse", refuse, methods=["POST"])
        router.add_api_route(f"{form}/missing/{{number}}", missing)
    found = FastAPI()
    found.include_router(router)
    describe(found, {})
    return found


@pytest.fixture(scope="module")
def client():
    return TestClient(app())


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"a": 1}', 200),
        (b"", 400),
        (b"{", 400),
        (b'{"a": 1, "a": 2}', 400),
        (b'{"a": NaN}', 400),
        (b'{"a": [1e999]}', 400),
        (b'{"a": "\\ud800"}', 400),
        (b'{"\\udfff": 1}', 400),
        (b'{"a": ' + b"9" * 5000 + b"}", 400),
        (b"[" * 1000 + b"]" * 1000, 400),
        (b'{"a": "\xff"}', 400),
        (b"[1]", 422),
        (b"null", 422),
    ],
)
def test_bodies_that_are_no_json_object(client, body, status):
    answer = client.post("/api/echo", content=body, headers=JSON)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["message"].startswith("the body")


def test_long_bodies_are_read_too(client):
    assert client.post("/api/echo", json={"image": "A" * 200_000}).json() == {"image": "A" * 200_000}


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_another_media_type_is_not_read(client, media):
    """Pages of other sites can send these without asking the browser first."""
    answer = client.post("/api/echo", content=b"{}", headers={"Content-Type": media})
    assert answer.status_code == 415


def test_each_form_has_errors_of_its_own(client):
    own = client.post("/api/echo", content=b"[]", headers=JSON)
    openai = client.post("/v1/echo", content=b"[]", headers=JSON)
    a1111 = client.post("/sdapi/v1/echo", content=b"[]", headers=JSON)
    assert [own.status_code, openai.status_code, a1111.status_code] == [422, 400, 400]
    assert own.json()["error"]["fields"] == []
    assert openai.json()["error"]["type"] == "invalid_request_error"
    assert a1111.json()["detail"] == own.json()["error"]["message"]


def test_who_is_refused_for_now_learns_when_to_come_back(client):
    answer = client.post("/v1/refuse")
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "2")


def test_a_parameter_of_the_path_is_named(client):
    answer = client.get("/api/missing/x")
    assert (answer.status_code, answer.json()["error"]["fields"]) == (422, ["number"])
    assert client.get("/api/missing/7").status_code == 404


def test_a_client_that_is_gone_is_no_fault():
    async def gone():
        return {"type": "http.disconnect"}

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/api/echo", "raw_path": b"/api/echo", "query_string": b""}
    headers = [(b"content-type", b"application/json")]
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "", "client": None}
    asyncio.run(app()({**scope, "server": ("127.0.0.1", 80)}, gone, send))
    assert sent[0]["status"] == 499


# ---------------------------------------------------------------------- the description


MODEL = {"name": "demo", "fingerprint": "f", "is_demo": True}
DEFAULTS = {"width": 128, "height": 128, "steps": 8, "guidance": 0.0, "shift": 3.0}
ABOUT = About(MODEL, DEFAULTS, 512, "bfloat16", "cpu", [])


def test_the_schema_tells_all_that_a_page_needs():
    found = described(ABOUT, LIMITS, {"steps": 6, "template": None}, ["style"], ["union"])
    assert set(found["request"]["properties"]) | set(found["rewrite"]["properties"]) | {"lora"} == set(NAMES)
    assert found["defaults"] == {**DEFAULTS, "steps": 6}
    assert found["request"]["properties"]["steps"]["maximum"] == found["limits"]["max_steps"] == 50
    assert found["request"]["properties"]["images"]["maximum"] == 4
    assert found["lora"] == {"names": ["style"]}
    assert found["request"]["properties"]["image"]["x-attachment"]


def test_presets_can_be_rendered():
    assert len(PRESETS) == len(set(PRESETS)) == 14
    assert all(side % SIZE_MULTIPLE == 0 and side <= MAX_SIDE for size in PRESETS for side in size)


def test_bodies_hold_every_field():
    assert set(drawing_body(LIMITS)["properties"]) == set(NAMES)
    assert set(drawing_parts(drawing_body(LIMITS))["properties"]) == {
        *("request", "image", "mask", "embeddings"),
        *("reference", "control"),
    }
    assert {"prompt", "template", "hidden_layer"} <= set(text_body("Text")["properties"])
    assert "width" not in text_body("Text")["properties"]


def test_the_description_names_errors_with_examples(client):
    found = client.get("/openapi.json").json()
    echo = found["paths"]["/v1/echo"]["post"]["responses"]
    assert {"200", "400", "401", "403", "408", "413", "415", "422", "429", "500", "503"} <= set(echo)
    shown = echo["422"]["content"]["application/json"]
    assert shown["schema"] == {"$ref": "#/components/schemas/OpenAIError"}
    assert shown["example"]["error"]["param"] == "width"
    assert {"Job", "Image", "Error", "OpenAIError", "A1111Error"} <= set(found["components"]["schemas"])
