"""Texts over HTTP: counting, templates, rewriting, captions, each as the library has it."""

import dataclasses
import io
import json

import pytest
from fake import FakeService, app_of
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import load

import zimage
from zimage.serve.forms import texts
from zimage.settings.rewriting import DEFAULT_REWRITER
from zimage.text.templates import REWRITER, Templates


@pytest.fixture(scope="module")
def pipe():
    return zimage.ZImage.load()


def post(server, path, **body):
    return server.http.post(f"/api/{path}", json=body)


def test_the_formatted_text_and_its_tokens(server, pipe):
    told = post(server, "format-prompt", prompt="a cat", template="photo-overcast").json()
    count = pipe.count_tokens("a cat", template="photo-overcast")
    assert (told["tokens"], told["limit"], told["outcome"]) == count
    assert len(pipe.tokenize("a cat", template="photo-overcast")) == told["tokens"]
    assert "a cat" in told["text"]
    assert Templates.open().get("photo-overcast").system_prompt in told["text"]
    assert post(server, "format-prompt", prompt="").json()["tokens"] == len(pipe.tokenize(""))


def test_a_text_past_the_limit_says_what_becomes_of_it(server):
    told = post(server, "format-prompt", prompt="cat " * 2000, long_prompt="truncate").json()
    assert told["tokens"] > told["limit"]
    assert "truncate" in told["outcome"] or str(told["limit"]) in told["outcome"]


WRONG = {
    "prompt": {},
    "prompt of another kind": {"prompt": ["a"]},
    "prompt of no text": {"prompt": "a\0b"},
    "template": {"prompt": "a", "template": "no-such"},
    "hidden_layer": {"prompt": "a", "hidden_layer": 3},
    "width": {"prompt": "a", "width": 64},
}


@pytest.mark.parametrize("path", ["format-prompt", "encode", "save-embeddings"])
@pytest.mark.parametrize("case", WRONG)
def test_a_value_at_fault_is_named(server, path, case):
    answer = post(server, path, **WRONG[case])
    assert answer.status_code == 422
    assert answer.json()["error"]["fields"][0] == case.split()[0]


def test_templates_are_listed_and_searched(server):
    listed = server.http.get("/api/templates").json()["templates"]
    known = Templates.open()
    assert [one["name"] for one in listed] == [one.name for one in known.list()]
    overcast = next(one for one in listed if one["name"] == "photo-overcast")
    assert overcast["system_prompt"] == known.get("photo-overcast").system_prompt
    assert overcast["tokens"] == known.stored_count("photo-overcast")
    assert not {"path", "model"} & set(overcast), "a server's folders are nobody's business"
    found = server.http.get("/api/templates", params={"q": "overcast"}).json()["templates"]
    assert found[0]["name"] == "photo-overcast"
    assert server.http.get("/api/templates", params={"q": "x" * 201}).status_code == 422


def test_rewriters_are_templates_of_their_own(server):
    listed = server.http.get("/api/rewriters").json()["templates"]
    assert [one["name"] for one in listed] == [one.name for one in Templates.open().list(REWRITER)]
    config = server.http.get("/api/rewriter-config").json()
    assert config["default"] == DEFAULT_REWRITER
    assert config["remote"] is False
    assert config["settings"]["max_tokens"] == 512
    assert "rewriter_url" not in config["settings"]


@pytest.mark.parametrize("elsewhere", ["encoder_url", "rewriter_url"])
def test_prompts_that_are_sent_elsewhere_are_said_to_be(tmp_path, elsewhere):
    service, url = FakeService(tmp_path), {elsewhere: "http://elsewhere"}
    loading, defaults = (url, {}) if elsewhere == "encoder_url" else ({}, url)
    service.launch = dataclasses.replace(service.launch, loading=loading, defaults=defaults)
    with TestClient(app_of(texts, service)) as client:
        assert client.get("/api/rewriter-config").json()["remote"] is True


def test_a_prompt_is_rewritten_as_the_library_does_it(server, pipe):
    writing = {"temperature": 2.0, "top_k": 0, "top_p": 1.0}  # at lower ones the demo model writes nothing
    asked = {"rewriter": "rewrite-photo", "max_tokens": 8, "rewrite_seed": 1, **writing}
    told = post(server, "rewrite", prompt="a cat", **asked).json()
    written = pipe.rewrite("a cat", **asked)
    assert told == {"prompt": written.prompt, "thinking": written.thinking, **written.describe()}


def test_a_rewriter_that_writes_nothing_is_the_request_s_fault(server):
    answer = post(server, "rewrite", prompt="a cat", temperature=0)
    assert answer.status_code == 422
    assert "wrote nothing" in answer.json()["error"]["message"]
    drawing = post(server, "generate", prompt="a cat", rewriter="rewrite-photo", temperature=0, steps=1)
    assert (drawing.status_code, drawing.json()["error"]["fields"][0]) == (422, "rewriter")
    assert post(server, "rewrite", prompt="a", rewriter="photo-overcast").json()["error"]["fields"] == ["rewriter"]
    assert post(server, "rewrite", prompt="a", rewriter_url="http://elsewhere.example").status_code == 422


def test_a_caption_travels_as_a_file(server, pipe, tmp_path):
    told = post(server, "encode", prompt="a cat").json()
    (caption,) = pipe.encode("a cat")
    assert (told["tokens"], told["shape"]) == (len(caption), list(caption.shape))
    answer = post(server, "save-embeddings", prompt="a cat")
    assert answer.headers["content-disposition"] == f'attachment; filename="{told["hash"]}.safetensors"'
    assert load(answer.content)["embeddings"].equal(caption)
    files = {"request": (None, json.dumps({"seed": 1}), "application/json"), "embeddings": ("a", answer.content)}
    job = server.wait(server.http.post("/api/jobs", files=files).json()["id"])
    drawn = server.http.get(job["images"][0]["url"]).content
    (tmp_path / "drawn.png").write_bytes(drawn)
    expected = pipe.generate(embeddings=caption, seed=1).images[0]
    assert Image.open(io.BytesIO(drawn)).tobytes() == expected.tobytes()


def test_nothing_is_left_of_captions_that_were_sent(server):
    post(server, "encode", prompt="a cat")
    post(server, "save-embeddings", prompt="a dog")
    assert list((server.folder / "captions").iterdir()) == []


def test_it_cannot_see(server):
    told = server.http.get("/api/vl/status").json()
    assert told["available"] is False
    assert told["reason"]


def test_a_server_s_own_settings_lie_under_the_request_s(new_server):
    server = new_server("--template", "photo-overcast", "--rewrite", "rewrite-photo").start()
    with_template = post(server, "format-prompt", prompt="a cat").json()
    assert Templates.open().get("photo-overcast").system_prompt in with_template["text"]
    other = post(server, "format-prompt", prompt="a cat", template="photo-aerial-drone").json()
    assert other["text"] != with_template["text"]
    config = server.http.get("/api/rewriter-config").json()
    assert config["default"] == "rewrite-photo"
