"""Prompts rewritten: by the text encoder with its template, by a server; what comes back, and what is refused."""

import chat_server
import pytest
import tiny

import zimage
from zimage.dit import ZImageDiT
from zimage.errors import RemoteError, RequestError, RewriteError
from zimage.render.rewriting import _unquoted
from zimage.settings.rewriting import DEFAULT_REWRITER, RewriteSettings
from zimage.text import Qwen3, generate
from zimage.vae import AutoencoderKL

SHORT = {"max_tokens": 12, "rewrite_seed": 5}


@pytest.fixture
def says(monkeypatch):
    """Put words into the model's mouth; returns what it was asked."""
    asked = []

    def put(text):
        def write(model, tokenizer, chat, sampling, max_tokens, seed):
            asked.append(chat)
            yield from (text[i : i + 5] for i in range(0, len(text), 5))

        monkeypatch.setattr(generate, "write", write)
        return asked

    return put


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A pipeline whose encoder has more to say than one token."""
    parts = (Qwen3.from_config(tiny.QWEN), ZImageDiT.from_config(tiny.DIT), AutoencoderKL.from_config(tiny.KL))
    encoder, *others = (tiny.randomised(part, seed) for seed, part in enumerate(parts))
    states = [part.state_dict() for part in (tiny.talkative(encoder), *others)]
    folder = tiny.write_model(tmp_path_factory.mktemp("models") / "writer", *states, tiny.KL)
    return zimage.ZImage.load(folder, device="cpu", dtype="fp32")


def test_the_encoders_own_weights_write(writer):
    pipe = writer
    one, two = (pipe.rewrite("a cat", **SHORT) for _ in range(2))
    assert one == two
    assert one.prompt
    assert one.describe() == {"original": "a cat", "rewriter": DEFAULT_REWRITER, "seed": 5}
    others = [
        pipe.rewrite("a cat", **{**SHORT, **change}).prompt
        for change in ({"rewrite_seed": 9}, {"rewriter": "rewrite-photo"}, {"temperature": 0.0}, {"max_tokens": 3})
    ]
    assert len({one.prompt, *others}) == 5
    drawn = pipe.rewrite("a cat", max_tokens=5)
    assert pipe.rewrite("a cat", max_tokens=5, rewrite_seed=drawn.seed) == drawn
    pieces = list(pipe.rewriter.pieces("a cat", RewriteSettings(**SHORT)))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == one.prompt


def test_later_stages_are_not_planned_as_for_writing(writer):
    before = writer.prepare(zimage.Request("a cat", seed=0)).plan
    writer.rewrite("a cat", **SHORT)
    after = writer.prepare(zimage.Request("a cat", seed=0)).plan
    assert {n: s.activations for n, s in after.stages.items()} == {n: s.activations for n, s in before.stages.items()}


def test_the_chat_has_the_rewriters_words_and_a_closed_think_block(pipe, says):
    asked = says("A fine cat.")
    assert pipe.rewrite("a cat").prompt == "A fine cat."
    system = pipe.texts.templates.get(DEFAULT_REWRITER).system_prompt
    head = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    pipe.rewrite("a cat", rewrite_thinking=True)
    assert asked == [head + "<think>\n\n</think>\n\n", head]


def test_thoughts_are_split_off_and_never_leak(pipe, says):
    says("<think>\nA cat? Fur.\n</think>\n\nA fine cat.")
    result = pipe.rewrite("a cat", rewrite_thinking=True)
    assert (result.thinking, result.prompt) == ("A cat? Fur.", "A fine cat.")
    says("<think>\nA cat? Fur")
    with pytest.raises(RewriteError, match="still thinking after 7 tokens; raise max_tokens"):
        pipe.rewrite("a cat", rewrite_thinking=True, max_tokens=7)
    says("  \n")
    with pytest.raises(RewriteError, match="wrote nothing"):
        pipe.rewrite("a cat")


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [('"A cat."', "A cat."), ('A "cat".', 'A "cat".'), ('"A" and "B"', '"A" and "B"'), ('"', '"'), ("", "")],
)
def test_quotes_around_the_whole_are_not_drawn(answer, prompt):
    assert _unquoted(answer) == prompt


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rewriter": "photo-overcast"}, "is not a rewriter; use one of rewrite-"),
        ({"rewriter": "rewrite-foto"}, "did you mean 'rewrite-photo'"),
        ({"temperature": -1.0}, "too small"),
        ({"presence_penalty": 2.5}, "too large"),
        ({"rewriter_url": "nonsense"}, "should look like"),
        ({"rewriter_timeout": 0.0}, "above 0"),
        ({"rewriter_url": "http://127.0.0.1:9", "rewrite_thinking": True}, "the server at the rewriter_url decides"),
    ],
)
def test_what_cannot_be_used_is_refused(pipe, settings, words):
    with pytest.raises(RequestError, match=words):
        pipe.rewrite("a cat", **settings)


def test_a_server_writes_without_the_encoder(tiny_folder, monkeypatch):
    pipe = zimage.ZImage.load(tiny_folder)
    monkeypatch.setenv("ZIMAGE_REWRITER_KEY", "sesame")
    with chat_server.serving(chat_server.said("<think>Hm.</think>A fine cat.")) as server:
        result = pipe.rewrite("a cat", rewriter_url=server.url, rewriter_model="big", rewrite_seed=3, top_k=7)
    assert (result.prompt, result.thinking) == ("A fine cat.", "Hm.")
    (body,) = server.asked
    assert (body["model"], body["seed"], body["top_k"], body["messages"][1]["content"]) == ("big", 3, 7, "a cat")
    assert server.keys == ["Bearer sesame"]
    assert not pipe.loaded
    with pytest.raises(RemoteError):
        pipe.rewrite("a cat", rewriter_url="http://127.0.0.1:9")


def test_the_plan_reckons_with_what_writing_takes(tiny_folder):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32")
    little, much = (pipe.planner.plan_writing(tokens).stages["text_encoder"] for tokens in (10, 10_000))
    config = pipe.model.skeleton("text_encoder").config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert much.activations - little.activations >= 9_990 * cache
    tight = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", memory=0.01)
    with pytest.raises(RequestError, match="writing a text of"):
        tight.rewrite("a cat")
