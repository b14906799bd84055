"""`tokens`, `encode` and `rewrite`, and renders from what they made."""

import io
import json

import chat_server
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from zimage.cli import main

GEN = ["--steps", "1", "--width", "64", "--height", "48", "--seed", "1"]
LOAD = ["--dtype", "fp32", "--device", "cpu"]


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(command, *arguments):
        status = main([command, *LOAD, "--model", str(tiny_folder), *(GEN if command == "gen" else []), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def server():
    with chat_server.serving(chat_server.said('<think>Fur?</think>"A fine cat."')) as chat:
        yield chat


def pixels(name):
    with Image.open(name) as image:
        return image.tobytes()


# ------------------------------------------------------------------ tokens


def test_tokens_are_counted_with_the_limit_and_what_will_happen(run, pipe):
    count = len(pipe.tokenize("a cat"))
    assert run("tokens", "a cat") == (0, f"{count} of at most {pipe.texts.limit} tokens\n", "")
    long = "a cat on a mat " * 20
    past = len(pipe.tokenize(long)) - pipe.texts.limit
    for mode, words in (("none", "kept"), ("pool", "averaged"), ("truncate", "dropped")):
        out = run("tokens", long, "--long-prompt", mode)[1]
        assert f"{past} past the limit: " in out
        assert words in out, out
    facts = json.loads(run("tokens", "a cat", "--json", "--show")[1])
    assert (facts["tokens"], facts["limit"], facts["ids"]) == (count, pipe.texts.limit, pipe.tokenize("a cat"))


def test_words_without_quotes_are_one_prompt(run, monkeypatch):
    assert run("tokens", "a", "cat", "--show") == run("tokens", "a cat", "--show")
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n"))
    assert run("tokens", "-", "--show") == run("tokens", "a cat", "--show"), "as gen does"
    written = [run("encode", *words, "-o", "caption.safetensors")[2] for words in (["a", "cat"], ["a cat"])]
    assert written[0].endswith(" tokens × 64, float32\n")
    assert written[1].endswith(written[0])
    assert "pass it alone" in run("rewrite", "a", "-")[2]


def test_the_text_is_shown_as_the_encoder_reads_it(run):
    bare = "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    assert bare + "\n'<|im_start|>':" in run("tokens", "a cat", "--show")[1], "no think block unless asked for"
    assert bare + "<think>\n\n</think>\n\n\n" in run("tokens", "a cat", "--show", "--force-think-block")[1]
    assert "hard light" in run("tokens", "a cat", "--show", "--system-prompt", "hard light")[1]
    assert "user\n猫 👩‍👩‍👧 שלום<|im_end|>" in run("tokens", "猫 👩‍👩‍👧 שלום", "--show")[1], "several tokens each"


# ------------------------------------------------------------------ encode


def test_a_caption_in_a_file_draws_what_its_prompt_draws(run):
    text = ["--system-prompt", "In oil.", "--hidden-layer", "-3"]
    status, out, err = run("encode", "a cat", "-o", "cat.safetensors", *text)
    assert (status, out) == (0, "cat.safetensors\n")
    assert "tokens × 64, float32" in err
    with safe_open("cat.safetensors", "pt") as file:
        assert file.get_tensor("embeddings").dtype == torch.float32
        record = json.loads(file.metadata()["request"])
    assert (record["prompt"], record["system_prompt"], record["hidden_layer"]) == ("a cat", "In oil.", -3)
    assert run("gen", "--embeddings", "cat.safetensors", "-o", "one.png")[0] == 0
    run("gen", "a cat", *text, "-o", "two.png")
    run("gen", "a cat", "-o", "three.png")
    assert pixels("one.png") == pixels("two.png") != pixels("three.png")
    assert "replacing cat.safetensors" in run("encode", "a dog", "-o", "cat.safetensors")[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encode", "a", "-o", "a.pt"], "should end in .safetensors"),
        (["encode", "a", "-o", "nowhere/a.safetensors"], "does not exist"),
        (["encode", "a", "-o", "a.safetensors", "--hidden-layer", "-99"], "does not exist; use"),
        (["tokens", "a", "--template", "nothing-like-it"], "there is no template"),
        (["gen", "a", "--embeddings", "a.safetensors"], "pass only one of them"),
        (["gen", "--embeddings", "a.safetensors"], "is missing"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, tmp_path, arguments, words):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ rewrite


def test_a_prompt_is_rewritten_without_thoughts_and_quotes(run, server):
    ask = ["--rewriter-url", server.url, "--rewrite-seed", "3"]
    assert run("rewrite", "a cat", *ask) == (0, "A fine cat.\n", "rewrite-expand, seed 3\n")
    assert run("rewrite", "a cat", *ask, "-q", "--show-thinking") == (0, "A fine cat.\n", "Fur?\n")
    record = {"original": "a cat", "rewriter": "rewrite-photo", "seed": 3}
    found = json.loads(run("rewrite", "a cat", *ask, "--json", "--rewriter", "rewrite-photo")[1])
    assert found == {"prompt": "A fine cat.", "thinking": "Fur?", **record}


def test_what_is_drawn_is_what_was_written(run, server):
    """The picture tells the original, and renders again without asking anybody."""
    ask = ["--rewriter-url", server.url, "--rewrite-seed", "3"]
    status, _, err = run("gen", "a cat", *ask, "--rewrite", "rewrite-photo", "-o", "one.png")
    assert status == 0
    assert "rewritten (rewrite-photo, seed 3): A fine cat." in err
    run("gen", "A fine cat.", "-o", "two.png")
    assert pixels("one.png") == pixels("two.png")
    with Image.open("one.png") as image:
        record = json.loads(image.info["zimage"])
    assert record["request"]["prompt"] == "A fine cat."
    assert record["rewritten"] == {"original": "a cat", "rewriter": "rewrite-photo", "seed": 3}
    assert run("gen", "--from", "one.png", "-o", "three.png")[0] == 0
    assert pixels("one.png") == pixels("three.png")
    assert len(server.asked) == 1


@pytest.mark.parametrize("plan", [[], ["-v"]], ids=["", "-v"])
def test_nothing_is_written_for_a_picture_that_cannot_be_drawn(run, server, plan):
    ask = ["--rewrite", "rewrite-photo", "--rewriter-url", server.url, "--memory", "0.000001"]
    status, out, err = run("gen", "a cat", *ask, *plan)
    assert (status, out) == (2, "")
    assert "no size fits" in err.splitlines()[-1]
    assert not server.asked


def test_an_unfinished_thought_is_never_drawn(run, tmp_path):
    with chat_server.serving(chat_server.said("<think>Fur, or")) as chat:
        ask = ["--rewrite", "rewrite-photo", "--rewriter-url", chat.url]
        status, out, err = run("gen", "a cat", *ask)
    assert (status, out) == (1, "")
    assert "still thinking after 512 tokens" in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_options_of_a_rewriting_that_does_not_happen_are_refused(run):
    status, _, err = run("gen", "a cat", "--top-k", "3")
    assert (status, err) == (2, "error: top_k: it has no effect without --rewrite; pass that too or leave it out\n")
