"""The encoder on another machine, as the machine that draws sees it: what is asked, and every fault of a server."""

import _thread
import base64
import dataclasses
import re
import shutil
import subprocess
import sys
import threading
import time

import chat_server
import pytest
import torch
from chat_server import Reply
from PIL import Image
from safetensors.torch import save

import zimage
from zimage.cli import main
from zimage.errors import CheckpointError, RemoteError, RequestError
from zimage.loading.registry import DIT, TEXT_ENCODER, VAE
from zimage.text import remote
from zimage.text.embeddings import load_embeddings
from zimage.text.wire import ids_hash, packed, to_base64
from zimage.weights import DEMO

TIMEOUT = 1.0
PATIENCE = 2.0  # seconds that a busy machine may take besides; without an end of its own all would take more
TOKEN = "sesame-0123456789"
LAYERS = {-2: 1.0}
PROMPT = "a red circle"
RENDER = {"width": 32, "height": 32, "steps": 1, "seed": 3}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def here():
    """The demo with its own text encoder."""
    return zimage.ZImage.load(device="cpu", dtype="bf16")


@pytest.fixture(scope="module")
def caption(here):
    return here.encode(PROMPT)[0]


def opened(url, path=None, **settings):
    settings = {"encoder_timeout": TIMEOUT, "device": "cpu", "dtype": "bf16", **settings}
    return zimage.ZImage.load(path, encoder_url=url, **settings)


def without_encoder(tmp_path, config=True):
    """The demo's folder on a machine that has no text encoder, but what describes it, or not even that."""
    folder = tmp_path / "model"
    hidden = shutil.ignore_patterns("*.safetensors" if config else "*")
    shutil.copytree(DEMO, folder, ignore=lambda at, names: hidden(at, names) if "text_encoder" in at else ())
    return folder


def answer(here, captions, layers=LAYERS, encoder="", **changed) -> Reply:
    """What an encoder server sends, with metadata changed afterwards, in texts of the same length."""
    body = packed(captions, layers, encoder or here.captions_from.fingerprint)
    for old, new in changed.values():
        assert body.count(old) == 1
        assert len(old) == len(new)
        body = body.replace(old, new)
    return Reply(body)


def refused(reply, **settings):
    """The error on an answer, and how many times the server was asked; it comes within the time-out."""
    with chat_server.serving(*[reply] if isinstance(reply, Reply) else reply) as server:
        pipe, start = opened(server.url, **settings), time.monotonic()
        with pytest.raises(RemoteError) as error:
            pipe.encode(PROMPT)
        assert time.monotonic() - start < TIMEOUT + PATIENCE
        text = str(error.value)
        assert text.startswith(server.url)
        assert len(text.splitlines()) == 1
        return text, len(server.asked)


# ---------------------------------------------------------------------- what is sent, and when


def test_a_text_its_tokens_and_layers_are_asked_for_once(here, caption):
    with chat_server.serving(answer(here, [caption])) as server:
        pipe = opened(server.url)
        assert torch.equal(pipe.encode(PROMPT)[0], caption)
        assert torch.equal(pipe.encode(PROMPT)[0], caption)
        pipe.generate([PROMPT, PROMPT], **RENDER)
        pipe.generate(PROMPT, **RENDER)
    assert server.paths == ["/api/captions"]
    (text,) = server.asked[0].pop("texts")
    assert server.asked == [{"layers": {"-2": 1.0}, "dtype": "bfloat16"}]
    assert text["text"] == here.texts.parts(zimage.Request(prompt=PROMPT)).format(PROMPT)
    assert text["ids"] == ids_hash(here.tokenize(PROMPT))


def test_pixels_and_metadata_are_those_of_the_model_here(here, caption):
    ours = here.generate(PROMPT, **RENDER)
    with chat_server.serving(answer(here, [caption])) as server:
        theirs = opened(server.url).generate(PROMPT, **RENDER)
    assert theirs.images[0].tobytes() == ours.images[0].tobytes()
    assert theirs.metadata == ours.metadata


@pytest.mark.parametrize("config", [True, False])
def test_the_text_encoders_weights_need_not_be_here(here, caption, tmp_path, config):
    folder = without_encoder(tmp_path, config)
    with pytest.raises(CheckpointError):
        zimage.ZImage.load(folder, device="cpu")
    with chat_server.serving(answer(here, [caption])) as server:
        pipe = opened(server.url, folder)
        job = pipe.prepare(zimage.Request(prompt=PROMPT, **RENDER))
        assert set(job.plan.stages) == {DIT, VAE}
        picture = [event.image for event in pipe.run(job)][-1]
        assert TEXT_ENCODER not in pipe.loaded
    assert picture.tobytes() == here.generate(PROMPT, **RENDER).images[0].tobytes()
    with pytest.raises(RequestError, match="on another machine"):
        _ = pipe.text_encoder


def test_loose_files_need_no_text_encoder_either(here, caption):
    with chat_server.serving(answer(here, [caption])) as server:
        loose = {"dit": DEMO / "transformer", "vae": DEMO / "vae", "tokenizer": DEMO / "tokenizer"}
        assert len(opened(server.url, **loose, variant="turbo").generate(PROMPT, **RENDER).images) == 1
    with pytest.raises(RequestError, match="text_encoder is missing"):
        zimage.ZImage.load(**loose)


def test_a_device_for_an_encoder_that_is_elsewhere_is_refused():
    with pytest.raises(RequestError, match="on another machine") as error:
        opened("http://127.0.0.1:9", text_encoder_device="cpu")
    assert error.value.fields == ("text_encoder_device", "encoder_url")


def test_a_wrong_layer_is_refused_here_where_the_config_says_so(tmp_path):
    pipe = opened("http://127.0.0.1:9", without_encoder(tmp_path))
    with pytest.raises(RequestError, match="hidden layer -5 does not exist"):
        pipe.encode(PROMPT, hidden_layer=-5)


def test_fp16_on_the_dit_asks_for_fp32_as_the_text_encoder_would(here):
    fp32 = zimage.ZImage.load(device="cpu", dtype="fp32").encode(PROMPT)[0]
    with chat_server.serving(answer(here, [fp32])) as server:
        assert opened(server.url, dtype="fp16").encode(PROMPT)[0].dtype == torch.float32
        assert opened(server.url, dtype="bf16", encoder_dtype="fp32").encode(PROMPT)[0].dtype == torch.float32
    assert [asked["dtype"] for asked in server.asked] == ["float32", "float32"]


def test_the_token_is_sent_and_never_shown(monkeypatch, here, caption):
    monkeypatch.setenv("ZIMAGE_ENCODER_TOKEN", TOKEN)
    with chat_server.serving(answer(here, [caption])) as server:
        opened(server.url).encode(PROMPT)
    assert server.keys == [f"Bearer {TOKEN}"]
    text, _ = refused(Reply({"error": {"message": f"no such token {TOKEN}"}}, status=500))
    assert TOKEN not in text
    assert "check ZIMAGE_ENCODER_TOKEN" in refused(Reply({}, status=401))[0]


@pytest.mark.parametrize("url", ["ftp://h", "http://u:p@h", "h:80", "http://h?x=1", "http://h\n"])
def test_an_address_that_cannot_be_used_is_refused_on_loading(url):
    with pytest.raises(RequestError, match="encoder_url: the server's url") as error:
        opened(url)
    assert error.value.fields == ("encoder_url",)


def test_captions_of_an_unknown_text_encoder_stay_in_memory(here, caption, tmp_path, caplog):
    folder, kept = without_encoder(tmp_path), tmp_path / "captions"
    with chat_server.serving(answer(here, [caption])) as server:
        opened(server.url, folder, cache_folder=kept).encode(PROMPT)
        assert "kept in memory only" in caplog.text
        assert not kept.exists()
        opened(server.url, cache_folder=kept).encode(PROMPT)
        opened(server.url, cache_folder=kept).encode(PROMPT)  # of the known one, which the server must have
    assert len(server.asked) == 2


def test_captions_from_elsewhere_and_from_here_are_not_mixed(here):
    here_too, there = here.captions_from.identity, opened("http://127.0.0.1:9").captions_from.identity
    assert there != opened("http://127.0.0.1:9", encoder_dtype="fp32").captions_from.identity
    assert there != opened("http://127.0.0.1:10").captions_from.identity
    assert here_too != there


# ---------------------------------------------------------------------- what goes wrong


def test_what_never_comes_ends_in_time():
    assert "did not answer within 1 seconds" in refused(Reply(silent=True))[0]


def test_a_body_that_trickles_ends_in_time(here, caption):
    reply = dataclasses.replace(answer(here, [caption]), drip=0.05)
    assert "did not answer within 1 seconds" in refused(reply)[0]


@pytest.mark.parametrize("kind", ["headers", "chunks"])
def test_what_trickles_otherwise_ends_in_time(kind):
    with chat_server.dripping(*chat_server.DRIPS[kind]) as address:
        start = time.monotonic()
        with pytest.raises(RemoteError, match=r"within|more than|cannot be reached"):
            opened(f"http://{address}").encode(PROMPT)
        assert time.monotonic() - start < TIMEOUT + PATIENCE


TRIES = {
    "500": (Reply({"error": {"message": "out of memory"}}, status=500), "answered with status 500: out of memory", 3),
    "429": (Reply({"error": {"message": "queue is full"}}, status=429), "answered with status 429: queue is full", 3),
    "503": (Reply(b"<html>", status=503), "answered with status 503", 3),
    "broken off": (Reply(hang_up=True), "cannot be reached", 3),
    "422": (Reply({"error": {"message": "ids: other tokens", "fields": ["ids"]}}, status=422), "422: ids: other", 1),
    "404": (Reply({}, status=404), r"does not know this page or model \(404\)", 1),
    "403": (Reply({}, status=403), "refused the key", 1),
    "redirect": (Reply(b"", status=307, location="http://elsewhere/api/captions"), r"has moved \(307\)", 1),
}


@pytest.mark.parametrize("kind", TRIES)
def test_three_tries_where_a_later_one_may_succeed(kind):
    reply, pattern, tries = TRIES[kind]
    text, asked = refused(reply)
    assert asked == tries
    assert_matches(pattern, text)


def assert_matches(pattern, text):
    assert re.search(pattern, text), text


FAULTS = {
    "another model": (lambda h, c: answer(h, [c], encoder="0" * 12), "another model"),
    "no model": (lambda h, c: Reply(packed([c], LAYERS, "")), "without a fingerprint"),
    "another layer": (lambda h, c: answer(h, [c], {-1: 1.0}), "layers .*-1"),
    "a blend": (lambda h, c: answer(h, [c], {-2: 0.5, -1: 0.5}), "the layers"),
    "another dtype": (lambda h, c: answer(h, [c.float()]), "computed in 'float32' instead of bfloat16"),
    "a dtype that is not the stated one": (
        lambda h, c: answer(h, [c], dtype=(b'"dtype":"BF16"', b'"dtype": "F16"')),
        "sent float16 instead of bfloat16",
    ),
    "fewer tokens": (lambda h, c: answer(h, [c[:-1]]), "tokens instead of"),
    "tokens that are not the stated ones": (
        lambda h, c: answer(h, [c[:-1]], tokens=(b'"tokens":"[%d]"' % (len(c) - 1), b'"tokens":"[%d]"' % len(c))),
        "caption of",
    ),
    "another width": (lambda h, c: answer(h, [c[:, :64].contiguous()]), "is it the same model"),
    "NaN": (lambda h, c: answer(h, [c * torch.nan]), "NaN"),
    "two captions": (lambda h, c: answer(h, [c, c.clone()]), "tokens instead of"),
    "a caption of another name": (lambda h, c: answer(h, [c], name=(b'"0":{', b'"x":{')), "asked for"),
    "half a file": (lambda h, c: Reply(answer(h, [c]).body[:-10]), "truncated"),
    "nothing": (lambda h, c: Reply(b""), "something other than captions"),
    "garbage": (lambda h, c: Reply(b"\x93\x10garbage" * 50), "something other than captions"),
    "a page": (lambda h, c: Reply(b"<html>welcome</html>"), "something other than captions"),
    "JSON": (lambda h, c: Reply({"hidden_states": []}), "something other than captions"),
    "another safetensors": (lambda h, c: Reply(embeddings(c)), "instead of zimage-captions"),
    "too much": (lambda h, c: Reply(b"x" * 2_000_000), "more than"),
    "a header too long": (lambda h, c: Reply((1 << 40).to_bytes(8, "little") + b"{}"), "something other than captions"),
}


def embeddings(caption) -> bytes:
    return save({"embeddings": caption}, {"format": "zimage-embeddings"})


@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_not_the_caption_is_refused_by_name(kind, here, caption):
    reply, pattern = FAULTS[kind]
    text, asked = refused(reply(here, caption))
    assert asked == 1
    assert_matches(pattern, text)


def test_a_server_that_changes_its_model_is_refused(here, caption, tmp_path):
    """Where the model's own text encoder is not known, the first answer says which one it is."""
    replies = [answer(here, [caption], encoder="1" * 12), answer(here, [caption], encoder="2" * 12)]
    with chat_server.serving(*replies) as server:
        pipe = opened(server.url, without_encoder(tmp_path), cache_entries=0)
        pipe.encode(PROMPT)
        with pytest.raises(RemoteError, match=r"another model.*2222.*1111"):
            pipe.encode(PROMPT)


def test_what_breaks_off_is_asked_again(here, caption):
    good = answer(here, [caption])
    with chat_server.serving(dataclasses.replace(good, cut=True), Reply(hang_up=True), good) as server:
        assert torch.equal(opened(server.url).encode(PROMPT)[0], caption)
    assert len(server.asked) == 3


def test_a_server_that_is_killed_meanwhile_is_refused_in_time():
    code = """
import os, socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
listener.accept()[0].recv(100)
os.kill(os.getpid(), 9)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        pipe, start = opened(f"http://127.0.0.1:{process.stdout.readline().strip()}"), time.monotonic()
        with pytest.raises(RemoteError, match="cannot be reached"):
            pipe.encode(PROMPT)
    assert time.monotonic() - start < TIMEOUT + PATIENCE
    assert process.returncode == -9


@pytest.mark.parametrize("waiting_for", ["an answer", "the next try"])
def test_a_cancel_ends_the_waiting_at_once(waiting_for, monkeypatch):
    """As a server's worker is told: another thread interrupts the main one."""
    monkeypatch.setattr(remote, "PAUSES", (20, 20))
    reply = Reply(silent=True) if waiting_for == "an answer" else Reply(status=503)
    with chat_server.serving(reply) as server:
        pipe = opened(server.url, encoder_timeout=60.0)
        told: list[float] = []

        def cancel() -> None:
            told.append(time.monotonic())
            _thread.interrupt_main()

        timer = threading.Timer(0.3, cancel)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in pipe.run(zimage.Request(prompt=PROMPT, **RENDER)):
                pass
        assert time.monotonic() - told[0] < PATIENCE
        timer.join()


# ---------------------------------------------------------------------- hidden states


def states(caption, **changed) -> Reply:
    answer = {"hidden_states": to_base64(caption), "shape": list(caption.shape), "dtype": "float32", "layer": -2}
    return Reply({**answer, "model": "qwen", "encoding_format": "base64", **changed})


def test_hidden_states_draw_the_same_pixels(here, caption, tmp_path):
    with chat_server.serving(states(caption)) as server:
        pipe = opened(f"{server.url}/v1", without_encoder(tmp_path), encoder_form="hidden_states", encoder_model="q")
        picture = pipe.generate(PROMPT, **RENDER).images[0]
    assert picture.tobytes() == here.generate(PROMPT, **RENDER).images[0].tobytes()
    assert server.paths == ["/v1/hidden_states"]
    (asked,) = server.asked
    assert asked.pop("input").endswith("<|im_start|>assistant\n")
    assert asked == {"model": "q", "layer": -2, "max_length": len(caption) + 1, "encoding_format": "base64"}


STATE_FAULTS = {
    "another layer": (lambda c: states(c, layer=-1), "hidden layer -1 instead of -2"),
    "another model": (lambda c: states(c, fingerprint="0" * 12), "another model"),
    "another dtype": (lambda c: states(c, dtype="int8"), "dtype 'int8'"),
    "no dtype": (lambda c: states(c, dtype=None), "dtype None"),
    "fewer tokens": (lambda c: states(c[:-1]), "hidden states of"),
    "another shape than stated": (lambda c: states(c[:-1], shape=list(c.shape)), "bytes of values"),
    "half precision": (
        lambda c: states(c, hidden_states=base64.b64encode(c.half().numpy().tobytes()).decode()),
        "float32 would have",
    ),
    "numbers": (lambda c: states(c, hidden_states=c.float().tolist()[:1]), "not base64"),
    "no base64": (lambda c: states(c, hidden_states="§"), "not base64"),
    "nothing": (lambda c: Reply({}), "dtype None"),
    "NaN": (lambda c: states(c * torch.nan), "NaN"),
    "garbage": (lambda c: Reply(b"\x00\xff" * 20), "not JSON"),
    "a list": (lambda c: Reply(b"[1]"), "should hold a JSON object"),
    "too much": (lambda c: Reply(b" " * 2_000_000), "more than"),
}


@pytest.mark.parametrize("kind", STATE_FAULTS)
def test_what_is_not_the_hidden_state_is_refused_by_name(kind, caption):
    reply, pattern = STATE_FAULTS[kind]
    text, asked = refused(reply(caption), encoder_form="hidden_states")
    assert asked == 1
    assert_matches(pattern, text)


def test_hidden_states_have_one_layer_and_no_rewriting(tmp_path):
    pipe = opened("http://127.0.0.1:9", encoder_form="hidden_states")
    with pytest.raises(RequestError, match="sends one layer"):
        pipe.encode(PROMPT, layer_weights={-2: 0.5, -3: 0.5})
    with pytest.raises(RequestError, match="pass a rewriter_url"):
        pipe.rewrite(PROMPT)


# ---------------------------------------------------------------------- rewriting


def test_prompts_are_rewritten_there():
    reply = Reply({"prompt": "A fine red circle.", "thinking": "hm", "original": PROMPT, "rewriter": "r", "seed": 7})
    with chat_server.serving(reply) as server:
        found = opened(server.url).rewrite(PROMPT, rewriter="rewrite-photo", rewrite_seed=7, temperature=0.2)
    assert (found.prompt, found.thinking, found.original, found.seed) == ("A fine red circle.", "hm", PROMPT, 7)
    assert server.paths == ["/api/rewrite"]
    (asked,) = server.asked
    assert asked["prompt"] == PROMPT
    assert (asked["rewriter"], asked["rewrite_seed"], asked["temperature"]) == ("rewrite-photo", 7, 0.2)
    assert not any(name.startswith("rewriter_") for name in asked)


def test_a_chat_server_that_is_named_rewrites_in_its_place():
    with chat_server.serving(chat_server.said("A fine cat.")) as chat:
        assert opened("http://127.0.0.1:9").rewrite(PROMPT, rewriter_url=chat.url).prompt == "A fine cat."


@pytest.mark.parametrize("body", [{}, {"prompt": 5}, {"prompt": ""}, {"prompt": "a", "thinking": 5}, [], b"\xff", None])
def test_what_is_not_a_rewritten_prompt_is_refused(body):
    with (
        chat_server.serving(Reply(body)) as server,
        pytest.raises(RemoteError, match="other than a rewritten prompt"),
    ):
        opened(server.url).rewrite(PROMPT)


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """A folder of somebody else's, whose settings file names a server."""
    monkeypatch.delenv("ZIMAGE_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def write(url):
        (tmp_path / "zimage.toml").write_text(f'[default]\nencoder_url = "{url}"\n')

    return write


RUN = ["gen", PROMPT, "-q", "--device", "cpu", "--dtype", "bf16", "--width", "32", "--height", "32"]
RUN += ["--steps", "1", "--seed", "3"]


def test_a_folders_file_gets_no_token_sent(unpacked, here, caption, capsys, monkeypatch):
    with chat_server.serving(answer(here, [caption])) as server:
        unpacked(server.url)
        monkeypatch.setenv("ZIMAGE_ENCODER_TOKEN", TOKEN)
        assert main(RUN) == 2
        said = capsys.readouterr().err
        assert f"encoder_url {server.url} comes from zimage.toml [default] line 2" in said
        assert (TOKEN in said, server.asked) == (False, [])
        assert main([*RUN, "--encoder-url", server.url]) == 0
        monkeypatch.delenv("ZIMAGE_ENCODER_TOKEN")
        capsys.readouterr()
        assert main(RUN) == 0
        assert f"prompts are sent to {server.url}, which zimage.toml [default] line 2 names" in capsys.readouterr().err
    assert server.keys == [f"Bearer {TOKEN}", None]


def test_the_profile_for_two_machines_works_as_it_stands(unpacked, here, caption, tmp_path, capsys):
    assert main(["config", "example"]) == 0
    example = capsys.readouterr().out
    url = "http://192.168.0.20:7860"
    assert url in example
    with chat_server.serving(answer(here, [caption])) as server:
        (tmp_path / "mine.toml").write_text(example.replace(url, server.url))
        assert main([*RUN, "--config", "mine.toml", "--profile", "distributed", "-o", "a.png"]) == 0
    assert len(server.asked) == 1
    assert main([*RUN, "-o", "b.png"]) == 0
    with Image.open("a.png") as elsewhere, Image.open("b.png") as local:
        assert elsewhere.tobytes() == local.tobytes()


def test_a_fault_is_one_line_and_no_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with chat_server.serving(Reply(status=500)) as server:
        assert main([*RUN, "--encoder-url", server.url]) == 1
    assert capsys.readouterr().err == f"error: {server.url}/api/captions answered with status 500: null\n"
    assert list(tmp_path.iterdir()) == []


def test_info_and_embeddings_know_of_a_text_encoder_elsewhere(here, caption, tmp_path, capsys):
    with chat_server.serving(answer(here, [caption])) as server:
        elsewhere = ["--encoder-url", server.url, "--device", "cpu", "--dtype", "bf16"]
        assert main(["info", str(DEMO), "--plan", *elsewhere]) == 0
        told = capsys.readouterr().out
        assert f"on another machine: {server.url}" in told
        model = ["--model", str(without_encoder(tmp_path)), *elsewhere]
        assert main(["encode", PROMPT, "-o", str(tmp_path / "a.safetensors"), *model]) == 0
    assert load_embeddings(tmp_path / "a.safetensors").encoder == here.captions_from.fingerprint
