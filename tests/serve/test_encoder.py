"""Captions and hidden states over HTTP: a server that has a text encoder only, and a machine that has none."""

import asyncio
import base64
import contextlib
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import zimage
from zimage.captioner import Captioner
from zimage.errors import CheckpointError, RequestError
from zimage.loading.registry import DIT, TEXT_ENCODER
from zimage.serve.encoding import encode
from zimage.serve.forms import encoder, hidden_states
from zimage.settings.captions import MAX_TEXT_TOKENS
from zimage.settings.declared import Request
from zimage.settings.rewriting import RewriteSettings
from zimage.text.embeddings import caption_hash, load_embeddings
from zimage.text.wire import Wanted, ids_hash, unpacked
from zimage.weights import DEMO

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import uvicorn
from fastapi import FastAPI

RENDER = {"width": 32, "height": 32, "steps": 2, "seed": 3}
PROMPTS = ["a red circle", "a blue square on the left"]
BODY = {"texts": [{"text": "a", "ids": "0" * 32}], "layers": {"-2": 1.0}, "dtype": "float32"}


class Machine:
    """A machine that encodes: the two forms over a Captioner; `calls` are the tasks that it was given."""

    def __init__(self, pipe: Captioner, folder: Path):
        self.pipe, self.folder, self.calls = pipe, folder, list[dict]()
        self.app = FastAPI()
        for form in (encoder, hidden_states):
            self.app.include_router(form.routes(SimpleNamespace(compute=self.compute)))

    async def compute(self, op: str, **asked) -> dict:
        """As the service has a worker do it: what passes is JSON."""
        assert op == "encode"
        self.calls.append(asked)
        path = self.folder / f"{len(self.calls)}.safetensors"
        told = await asyncio.to_thread(encode, self.pipe, json.loads(json.dumps(asked)), path)
        return json.loads(json.dumps(told))

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        # A configuration of logs would close all handlers; absl's, which a reference brings, closes its stream with it.
        config = uvicorn.Config(self.app, port=0, log_level="error", log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def folder_of(tmp_path, *components) -> Path:
    """A folder that holds these of the demo's folders."""
    folder = tmp_path / "-".join(components)
    for name in components:
        shutil.copytree(DEMO / name, folder / name)
    return folder


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def machine(request, tmp_path_factory):
    """(URL, Machine, dtype) of one that has the text encoder and the tokenizer, and nothing else of the model."""
    folder = folder_of(tmp_path_factory.mktemp("encoder"), "text_encoder", "tokenizer")
    found = Machine(Captioner.load(folder, device="cpu", dtype=request.param), tmp_path_factory.mktemp("captions"))
    with found.served() as url:
        yield url, found, request.param
    assert list(found.folder.iterdir()) == []  # nothing is left of what was sent


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A client of a server that computes in fp32."""
    found = Machine(Captioner.load(DEMO, device="cpu", dtype="fp32"), tmp_path_factory.mktemp("captions"))
    with found.served() as url, httpx.Client(base_url=url, timeout=30) as client:
        client.machine = found
        yield client


# ---------------------------------------------------------------------- both machines


@pytest.mark.parametrize("form", ["zimage", "hidden_states"])
def test_pixels_are_those_of_one_machine(machine, tmp_path, form, monkeypatch):
    url, other, dtype = machine
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    settings = {**RENDER, "guidance": 2.0, "negative": "blue"}
    ours = zimage.ZImage.load(device="cpu", dtype=dtype).generate(PROMPTS, **settings)
    pipe = zimage.ZImage.load(
        folder_of(tmp_path, "transformer", "vae", "scheduler", "tokenizer"),
        device="cpu",
        dtype=dtype,
        encoder_url=url,
        encoder_form=form,
    )
    other.calls.clear()
    theirs = pipe.generate(PROMPTS, **settings)
    assert [image.tobytes() for image in theirs.images] == [image.tobytes() for image in ours.images]
    assert len(other.calls) == 3
    pipe.generate(PROMPTS[::-1], **settings)
    assert len(other.calls) == 3  # a repeated prompt costs no call


@pytest.mark.parametrize(
    "text", [{"hidden_layer": -3}, {"layer_weights": {-2: 0.7, -3: 0.3}}, {"long_prompt": "pool"}, {"template": "none"}]
)
def test_settings_of_the_text_count_as_they_do_here(machine, text, monkeypatch):
    url, _, dtype = machine
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if "template" in text:
        text = {"system_prompt": "be brief", "thinking_content": "hm", "assistant_content": "ok"}
    here = zimage.ZImage.load(device="cpu", dtype=dtype).encode(PROMPTS, **text)
    there = zimage.ZImage.load(device="cpu", dtype=dtype, encoder_url=url).encode(PROMPTS, **text)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_several_texts_travel_in_one_body(machine):
    url, other, _ = machine
    formatted = [other.pipe.texts.parts(Request(prompt=p)).format(p) for p in PROMPTS]
    ids = [other.pipe.texts.tokenize(text) for text in formatted]
    dtype = other.pipe.places[TEXT_ENCODER].dtype
    body = {"texts": [{"text": t, "ids": ids_hash(i)} for t, i in zip(formatted, ids, strict=True)]}
    body |= {"layers": {"-2": 1}, "dtype": str(dtype).removeprefix("torch.")}
    answer = httpx.post(f"{url}/api/captions", json=body, trust_env=False)
    assert answer.status_code == 200, answer.text
    wanted = Wanted(tuple(map(len, ids)), 128, {-2: 1.0}, dtype)
    captions, fingerprint = unpacked(answer.content, wanted)
    assert all(torch.equal(a, b) for a, b in zip(captions, other.pipe.encode(PROMPTS), strict=True))
    assert fingerprint == other.pipe.captions_from.fingerprint


# ---------------------------------------------------------------------- what the server refuses


REFUSED = {
    "other ids": ({}, "ids"),
    "another dtype": ({"dtype": "bfloat16"}, "dtype"),
    "no such dtype": ({"dtype": "int8"}, "dtype"),
    "no dtype": ({"dtype": None}, "dtype"),
    "no such layer": ({"layers": {"-9": 1}}, "layers"),
    "no layers": ({"layers": {}}, "layers"),
    "layers of another kind": ({"layers": [1]}, "layers"),
    "null layers": ({"layers": None}, "layers"),
    "no texts": ({"texts": []}, "texts"),
    "many texts": ({"texts": BODY["texts"] * 65}, "texts"),
    "bare texts": ({"texts": ["a"]}, "texts"),
    "an empty text": ({"texts": [{"text": "", "ids": "0"}]}, "texts"),
    "a null character": ({"texts": [{"text": "\0", "ids": "0"}]}, "texts"),
    "a text without ids": ({"texts": [{"text": "a"}]}, "texts"),
    "another field": ({"prompt": "a"}, "prompt"),
    "a book": ({"texts": [{"text": "a " * 40_000, "ids": "0"}]}, "texts"),
    "several long ones": ({"texts": [{"text": "a " * 9_000, "ids": "0"}] * 4}, "texts"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_encoded_is_refused_by_name(asked, kind):
    changed, field = REFUSED[kind]
    answer = asked.post("/api/captions", json=BODY | changed)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["fields"][:1] == ([field])
    assert len(error["message"].splitlines()) == 1


def test_what_is_not_a_body_is_refused(asked):
    assert asked.post("/api/captions", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert asked.post("/api/captions", content=b"{}").status_code == 415
    assert asked.post("/api/captions", json=[]).status_code == 422


def test_a_server_that_has_others_encode_does_not_pass_texts_on(tmp_path):
    pipe = zimage.ZImage.load(device="cpu", dtype="fp32", encoder_url="http://127.0.0.1:9")
    with pytest.raises(RequestError, match="on another machine"):
        encode(pipe, {"form": "captions", **BODY}, tmp_path / "a.safetensors")


# ---------------------------------------------------------------------- hidden states


def read_states(answer: httpx.Response) -> np.ndarray:
    """As a client of such servers reads them."""
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["dtype"] == "float32"
    if found["encoding_format"] == "float":
        return np.array(found["hidden_states"], np.float32)
    return np.frombuffer(base64.b64decode(found["hidden_states"]), "<f4").reshape(found["shape"])


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_hidden_states_are_the_layers_values(asked, encoding):
    pipe = asked.machine.pipe
    text = pipe.texts.parts(Request(prompt="")).format(PROMPTS[0])
    body = {"input": text, "model": "any", "layer": -3, "encoding_format": encoding, "return_attention_mask": False}
    answer = asked.post("/v1/hidden_states", json=body)
    (wanted,) = pipe.encode(PROMPTS[0], hidden_layer=-3)
    assert np.array_equal(read_states(answer), wanted.numpy())
    assert answer.json()["shape"] == list(wanted.shape)
    assert answer.json()["model"] == pipe.model.name
    assert (answer.json()["layer"], answer.json()["fingerprint"]) == (-3, pipe.captions_from.fingerprint)


def test_hidden_states_of_several_texts_are_lists(asked):
    answer = asked.post("/v1/hidden_states", json={"input": ["a", "a b"], "encoding_format": "base64"}).json()
    assert [len(base64.b64decode(text)) // 4 for text in answer["hidden_states"]] == [
        rows * width for rows, width in answer["shape"]
    ]


def test_max_length_cuts_and_leaves_the_rest_as_it_was(asked):
    """Also in the cache: what is asked for next is whole again."""
    body = {"input": "a red circle and a blue square"}
    cut, whole = (
        read_states(asked.post("/v1/hidden_states", json={**body, **more})) for more in ({"max_length": 2}, {})
    )
    assert len(cut) == 2
    assert len(whole) > 2
    assert np.array_equal(cut, whole[:2])


STATES_REFUSED = {
    "no input": ({"input": None}, "input"),
    "an empty input": ({"input": ""}, "input"),
    "no inputs": ({"input": []}, "input"),
    "numbers": ({"input": [1, 2]}, "input"),
    "another format": ({"encoding_format": "hex"}, "encoding_format"),
    "a layer from the front": ({"layer": 3}, "layer"),
    "a layer that is none": ({"layer": "last"}, "layer"),
    "no such layer": ({"layer": -9}, "layer"),
    "no room": ({"max_length": 0}, "max_length"),
    "no length": ({"max_length": True}, "max_length"),
}


@pytest.mark.parametrize("kind", STATES_REFUSED)
def test_hidden_states_that_cannot_be_had_are_refused_as_openais_clients_read_it(asked, kind):
    changed, field = STATES_REFUSED[kind]
    answer = asked.post("/v1/hidden_states", json={"input": "a", **changed})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_the_description_has_bodies_and_answers(asked):
    paths = asked.get("/openapi.json").json()["paths"]
    for path, media in (("/api/captions", encoder.MEDIA), ("/v1/hidden_states", "application/json")):
        described = paths[path]["post"]
        assert described["requestBody"]["content"]["application/json"]["schema"]["example"]
        assert media in described["responses"]["200"]["content"]
        assert {"400", "401", "413", "503"} <= set(described["responses"])


def test_what_nobody_waits_for_any_more_is_given_up(tmp_path):
    """A client that was cancelled, or ran out of time, must not keep the machine from others."""
    given_up, begun = threading.Event(), threading.Event()

    class Busy(Machine):
        async def compute(self, op: str, **asked) -> dict:
            begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                given_up.set()
                raise
            return {}

    with Busy(Captioner.load(DEMO, device="cpu"), tmp_path).served() as url:
        text = json.dumps(BODY).encode()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
            head = f"POST /api/captions HTTP/1.1\r\nHost: h\r\nContent-Length: {len(text)}\r\n"
            line.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + text)
            assert begun.wait(20)
        assert given_up.wait(20)


# ---------------------------------------------------------------------- embeddings, and the half of a pipeline


def test_a_prompt_becomes_a_file_of_embeddings(tmp_path):
    pipe, path = Captioner.load(DEMO, device="cpu", dtype="fp32"), tmp_path / "a.safetensors"
    told = encode(pipe, {"prompt": PROMPTS[0], "text": {"system_prompt": "be brief"}}, path)
    saved, (wanted,) = load_embeddings(path), pipe.encode(PROMPTS[0], system_prompt="be brief")
    assert torch.equal(saved.caption, wanted)
    assert saved.request["system_prompt"] == "be brief"
    assert told == {
        "path": str(path),
        "tokens": len(wanted),
        "shape": list(wanted.shape),
        "dtype": "float32",
        "hash": caption_hash(wanted),
    }


def test_encoding_needs_nothing_but_the_text_encoder(tmp_path):
    folder = folder_of(tmp_path, "text_encoder", "tokenizer")
    with pytest.raises(CheckpointError):
        zimage.ZImage.load(folder, device="cpu")
    pipe = Captioner.load(folder, device="cpu", dtype="fp32")
    assert torch.equal(pipe.encode("a")[0], zimage.ZImage.load(device="cpu", dtype="fp32").encode("a")[0])
    assert pipe.loaded == (TEXT_ENCODER,)
    assert pipe.texts.limit == MAX_TEXT_TOKENS
    shutil.copytree(DEMO / "transformer", folder / "transformer", ignore=shutil.ignore_patterns("*.safetensors"))
    assert Captioner.load(folder).texts.limit == zimage.ZImage.load().texts.limit
    loose = Captioner.load(text_encoder=folder / "text_encoder", tokenizer=folder / "tokenizer")
    assert loose.tokenize("a") == pipe.tokenize("a")


def test_prompts_are_rewritten_by_the_text_encoder_alone(tmp_path):
    """The demo's writes nothing of use; the words are those that it writes beside a DiT."""
    settings = RewriteSettings(max_tokens=6, rewrite_seed=1)

    def written(pipe) -> list[str]:
        pieces = pipe.rewriter.pieces("a cat", settings)
        return [next(pieces, "") for _ in range(3)]

    alone = Captioner.load(folder_of(tmp_path, "text_encoder", "tokenizer"), device="cpu", dtype="fp32")
    assert written(alone) == written(zimage.ZImage.load(device="cpu", dtype="fp32"))


def test_encoding_for_others_needs_an_encoder_of_ones_own():
    with pytest.raises(RequestError, match="encoder_url") as error:
        Captioner.load(DEMO, encoder_url="http://127.0.0.1:9")
    assert error.value.fields == ("encoder_url",)
    assert DIT not in Captioner.load(DEMO).places


# ---------------------------------------------------------------------- real servers


def test_two_machines_draw_what_one_does(new_server, tmp_path, monkeypatch):
    """A server that only encodes, with its token; one that draws with it; and no server at all."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    secret = "sesame-0123456789-0123456789-0123456789"
    (tmp_path / "token").write_text(secret)
    halves = (("text_encoder", "tokenizer"), ("transformer", "vae", "scheduler", "tokenizer"))
    encoding, drawing = (str(folder_of(tmp_path, *half)) for half in halves)
    options = ("--device", "cpu", "--dtype", "fp32")
    there = new_server("--encoder-only", "--model", encoding, "--token-file", str(tmp_path / "token"), *options)
    there.http.headers["Authorization"] = f"Bearer {secret}"
    there.start()
    pair = ("--model", drawing, "--encoder-url", there.url)
    here = new_server(*pair, *options, name="here", environment={"ZIMAGE_ENCODER_TOKEN": secret}).start()
    image = here.draw(prompt=PROMPTS[0], **RENDER)["images"][0]
    picture = Image.open(io.BytesIO(here.http.get(image["url"]).content))
    alone = zimage.ZImage.load(device="cpu", dtype="fp32")
    assert picture.tobytes() == alone.generate(PROMPTS[0], **RENDER).images[0].tobytes()
    writing = {"prompt": "a cat", "max_tokens": 6, "rewrite_seed": 1}
    written = here.http.post("/api/rewrite", json=writing).json()
    assert written["prompt"] == alone.rewrite(**writing).prompt
    assert there.http.post("/api/jobs", json={"prompt": "a"}).status_code == 404
    there.kill()
    assert here.draw(prompt=PROMPTS[0], **RENDER)["state"] == "done"
    failed = here.wait(here.submit(prompt=PROMPTS[1], **RENDER)["id"])
    assert failed["state"] == "failed"
    assert "cannot be reached" in failed["error"]["message"]
    with socket.create_server(("127.0.0.1", there.port)):  # one that never answers
        waiting, begun = here.submit(prompt=PROMPTS[1], **RENDER), time.monotonic()
        while here.http.get(f"/api/jobs/{waiting['id']}").json()["stage"] != "encode":
            assert time.monotonic() - begun < 60
        begun = time.monotonic()
        here.http.delete(f"/api/jobs/{waiting['id']}")
        assert here.wait(waiting["id"])["state"] == "cancelled"
        assert time.monotonic() - begun < 5  # and not the time-out of two minutes
    assert secret not in here.said() + there.said() + json.dumps(failed)
