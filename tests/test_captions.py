"""From prompts to captions: chat parts and templates, layers and blends, long prompts, the cache, saved embeddings."""

import itertools
import logging
import os
import shutil

import pytest
import torch

import zimage
from zimage.errors import CheckpointError, RequestError
from zimage.text.chat import format_chat
from zimage.text.compress import compress
from zimage.text.embeddings import save_embeddings

SIZE = {"width": 64, "height": 48, "steps": 1, "seed": 1}
OPEN = "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
LONG = "a cat on a mat " * 40

TEMPLATE = """---
name: noir
description: Hard light
category: photo
{keys}
---
Black and white, hard light.
"""


@pytest.fixture
def own(tiny_folder, tmp_path):
    """A pipeline with one template of the user's."""

    def load(keys="model: z-image", **settings):
        (tmp_path / "noir.md").write_text(TEMPLATE.format(keys=keys))
        return zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", templates=tmp_path, **settings)

    return load


def text_of(pipe, **text) -> str:
    return pipe.model.tokenizer.decode(pipe.tokenize("a cat", **text))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, OPEN),
        ({"system_prompt": "Be dark."}, "<|im_start|>system\nBe dark.<|im_end|>\n" + OPEN),
        ({"force_think_block": True}, OPEN + "<think>\n\n</think>\n\n"),
        ({"thinking_content": "Hm."}, OPEN + "<think>\nHm.\n</think>\n\n"),
        ({"thinking_content": "Hm.", "force_think_block": True}, OPEN + "<think>\nHm.\n</think>\n\n"),
        ({"assistant_content": "Here:"}, OPEN + "Here:<|im_end|>"),
        (
            {"thinking_content": "Hm.", "assistant_content": "Here:"},
            OPEN + "<think>\nHm.\n</think>\n\nHere:<|im_end|>",
        ),
        ({"force_think_block": True, "assistant_content": "Here:"}, OPEN + "<think>\n\n</think>\n\nHere:<|im_end|>"),
        ({"force_think_block": False, "system_prompt": ""}, OPEN),
    ],
)
def test_chat_parts_are_written_as_qwen_does(pipe, parts, expected):
    assert text_of(pipe, **parts) == expected


def test_a_think_block_that_is_off_takes_no_content(pipe):
    with pytest.raises(RequestError, match="needs a think block"):
        pipe.encode("a cat", thinking_content="Hm.", force_think_block=False)
    with pytest.raises(ValueError, match="needs a think block"):
        format_chat("a cat", thinking_content="Hm.")


def test_quotes_are_stripped_from_every_part(pipe):
    quoted = {"system_prompt": 'a "b"', "thinking_content": '"c"', "assistant_content": '"d" e'}
    plain = {name: text.replace('"', "") for name, text in quoted.items()}
    assert pipe.tokenize('say "hi"', strip_quotes=True, **quoted) == pipe.tokenize("say hi", **plain)
    assert pipe.tokenize('say "hi"', **quoted) != pipe.tokenize("say hi", **plain)


def test_user_goes_before_template_before_default(own):
    pipe = own("thinking_content: Low key.\nassistant_content: Here it is.")
    system = "<|im_start|>system\nBlack and white, hard light.<|im_end|>\n"
    think = "<think>\nLow key.\n</think>\n\n"
    assert text_of(pipe, template="noir") == system + OPEN + think + "Here it is.<|im_end|>"
    assert text_of(pipe, template="noir", force_think_block=False) == system + OPEN + "Here it is.<|im_end|>"
    assert text_of(pipe, template="noir", assistant_content="") == system + OPEN + think
    assert text_of(pipe, template="noir", system_prompt="", assistant_content="") == OPEN + think
    mine = text_of(pipe, template="noir", system_prompt="Mine.", thinking_content="Own.", assistant_content="")
    assert mine == "<|im_start|>system\nMine.<|im_end|>\n" + OPEN + "<think>\nOwn.\n</think>\n\n"


@pytest.mark.parametrize(("key", "block"), [("true", True), ("false", False)])
def test_a_template_may_ask_for_an_empty_think_block_and_the_user_decides(own, key, block):
    pipe, empty = own(f"add_think_block: {key}"), "<think>\n\n</think>\n\n"
    assert text_of(pipe, template="noir").endswith(empty) == block
    assert text_of(pipe, template="noir", force_think_block=True).endswith(empty)
    assert not text_of(pipe, template="noir", force_think_block=False).endswith(empty)
    with_thought = text_of(pipe, template="noir", thinking_content="Hm.")
    assert with_thought.endswith("<think>\nHm.\n</think>\n\n"), "a template never turns off what was asked for"


def test_an_unknown_template_is_an_error_with_the_nearest(own):
    with pytest.raises(RequestError, match="noir"):
        own().generate("a cat", template="nior", **SIZE)


def test_the_picture_follows_the_template_and_renders_again_without_its_file(own, tmp_path):
    pipe = own()
    plain, styled = (pipe.generate("a cat", template=t, **SIZE) for t in (None, "noir"))
    assert plain.images[0].tobytes() != styled.images[0].tobytes()
    assert styled.metadata[0]["template"] == "noir"
    (tmp_path / "noir.md").unlink()
    again = pipe.generate(**styled.metadata[0]["request"])
    assert again.images[0].tobytes() == styled.images[0].tobytes()


def test_a_negative_prompt_takes_no_parts(own):
    pipe = own()
    job = pipe.prepare(zimage.Request(prompt="a cat", template="noir", guidance=2.0, negative="dogs", **SIZE))
    (negative,) = job.negative_texts
    assert "hard light" in job.texts[0]
    assert negative == "<|im_start|>user\ndogs<|im_end|>\n<|im_start|>assistant\n"


# ------------------------------------------------------------------ layers


def states(pipe):
    ids = torch.tensor([pipe.tokenize("a cat")])
    with torch.no_grad():
        return [state[0] for state in pipe.text_encoder.hidden_states(ids)]


def test_each_layer_is_that_hidden_state(pipe):
    expected = states(pipe)
    for layer in range(-len(expected), 0):
        torch.testing.assert_close(pipe.encode("a cat", hidden_layer=layer)[0], expected[layer], rtol=0, atol=0)
    assert torch.equal(pipe.encode("a cat")[0], expected[-2])
    with pytest.raises(RequestError, match=f"use −{len(expected)} to −1"):
        pipe.generate("a cat", hidden_layer=-len(expected) - 1, **SIZE)


def test_a_blend_is_the_weighted_mean_of_the_plain_states(pipe):
    expected = states(pipe)
    weights = {-1: 3.0, -2: 1.0, -4: -0.5}
    mean = sum(weight * expected[layer] for layer, weight in weights.items()) / 3.5
    torch.testing.assert_close(pipe.encode("a cat", layer_weights=weights)[0], mean)
    as_json = {str(layer): weight for layer, weight in weights.items()}
    torch.testing.assert_close(pipe.encode("a cat", layer_weights=as_json)[0], mean)
    torch.testing.assert_close(pipe.encode("a cat", layer_weights={-3: 0.2})[0], expected[-3])


def test_layers_above_the_highest_one_needed_are_not_run(pipe, monkeypatch):
    ran = []
    for i, layer in enumerate(pipe.text_encoder.model.layers):
        monkeypatch.setattr(layer, "forward", lambda *a, i=i, f=layer.forward: ran.append(i) or f(*a))
    pipe.cache.clear()
    pipe.encode("a dog", layer_weights={-4: 1.0, -3: 1.0})
    assert ran == list(range(len(pipe.text_encoder.model.layers) - 2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"layer_weights": {-2: 1.0}, "hidden_layer": -2}, "pass only one of them"),
        ({"layer_weights": {-2: 1.0, -3: -1.0}}, "add up to 0"),
        ({"layer_weights": {2: 1.0}}, "negative integer"),
        ({"layer_weights": {}}, "table of layers"),
        ({"layer_weights": {-2: "much"}}, "should be a number"),
        ({"layer_weights": "x"}, "write LAYER:WEIGHT"),
        ({"layer_weights": {-99: 1.0}}, "does not exist"),
        ({"hidden_layer": 0}, "too large"),
    ],
)
def test_impossible_layers_are_refused(pipe, text, words):
    with pytest.raises(RequestError, match=words):
        pipe.encode("a cat", **text)


# ------------------------------------------------------------------ long prompts


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def short_limit(tiny_folder, request):
    """A pipeline whose captions may have 64 tokens."""
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype=request.param)
    pipe.texts.limit = 64
    return pipe


@pytest.mark.parametrize("mode", ["truncate", "interpolate", "pool", "attention_pool"])
def test_long_prompts_are_shortened_in_every_dtype(short_limit, mode, caplog):
    whole = short_limit.encode(LONG)[0]
    caplog.clear()
    assert len(whole) == len(short_limit.tokenize(LONG)) > 64
    with caplog.at_level(logging.WARNING, "zimage"):
        short = short_limit.encode(LONG, long_prompt=mode)[0]
    assert short.shape == (64, whole.shape[1])
    assert short.dtype == whole.dtype
    assert torch.equal(short, compress(whole, 64, mode))
    assert not caplog.records
    image = short_limit.generate(LONG, long_prompt=mode, **SIZE).images[0]
    assert image.tobytes() != short_limit.generate(LONG, **SIZE).images[0].tobytes()


def test_by_default_everything_is_kept_with_a_warning(short_limit, caplog):
    with caplog.at_level(logging.WARNING, "zimage"):
        short_limit.encode(LONG)
    assert (
        f"the prompt has {len(short_limit.tokenize(LONG))} tokens; the model was trained for at most 64" in caplog.text
    )


@pytest.mark.parametrize("mode", ["none", "interpolate", "pool", "attention_pool"])
def test_nothing_is_cut_before(pipe, mode):
    """The last of 3,000 tokens counts."""
    assert len(pipe.encode("x" * 3000, long_prompt="none")[0]) > 3000
    ends = [pipe.encode("x" * 2999 + last, long_prompt=mode)[0] for last in "xy"]
    assert not torch.equal(*ends)
    assert len(ends[0]) == (len(pipe.tokenize("x" * 3000)) if mode == "none" else pipe.texts.limit)


def test_tokens_are_counted_before_anything_is_loaded(tiny_folder):
    pipe = zimage.ZImage.load(tiny_folder)
    count = pipe.count_tokens("a cat", long_prompt="pool")
    assert (count.tokens, count.limit) == (len(pipe.tokenize("a cat")), pipe.texts.limit)
    pipe.texts.limit = 4
    assert "past the limit: averaged to 4" in pipe.count_tokens("a cat", long_prompt="pool").outcome
    assert not pipe.loaded


# ------------------------------------------------------------------ cache


def test_a_prompt_is_encoded_once_and_the_encoder_not_even_loaded(tiny_folder):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", residency="stage")
    loads = []
    for prompt in ("a cat", "a cat", "a dog"):
        events = list(pipe.run(zimage.Request(prompt=prompt, **SIZE)))
        loads.append([e.detail for e in events if e.stage == "load" and e.step == 1])
        pictures = [e.image for e in events if e.image]
    assert loads == [["text_encoder", "dit", "vae"], ["dit", "vae"], ["text_encoder", "dit", "vae"]]
    stats = pipe.cache.stats
    assert (stats.hits, stats.misses, stats.size) == (1, 2, 2)
    uncached = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", cache_entries=0)
    assert uncached.generate("a dog", **SIZE).images[0].tobytes() == pictures[0].tobytes()
    assert uncached.generate("a dog", **SIZE).images[0].tobytes() == pictures[0].tobytes()
    assert uncached.cache.stats.hits == 0


def test_what_a_caption_depends_on_is_part_of_its_key(own):
    pipe = own()
    variants = [
        {},
        {"template": "noir"},
        {"system_prompt": "x"},
        {"thinking_content": "x"},
        {"assistant_content": "x"},
        {"force_think_block": True},
        {"hidden_layer": -3},
        {"layer_weights": {-2: 1.0, -3: 1.0}},
        {"layer_weights": {-2: 1.0, -3: 2.0}},
    ]
    captions = [pipe.encode("a cat", **text)[0] for text in variants]
    assert pipe.cache.stats.misses == len(variants)
    for one, other in itertools.combinations(captions, 2):
        assert one.shape != other.shape or not torch.equal(one, other)
    again = [pipe.encode("a cat", **text)[0] for text in variants]
    assert all(torch.equal(a, b) for a, b in zip(captions, again, strict=True))
    assert pipe.cache.stats.hits == len(variants)
    again[0].zero_()
    assert torch.equal(pipe.encode("a cat")[0], captions[0]), "what is kept cannot be changed from outside"


def test_a_folder_keeps_captions_between_pipelines(tiny_folder, tmp_path):
    for dtype, disk_hits in (("fp32", 0), ("fp32", 1), ("bf16", 0)):
        pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype=dtype, cache_folder=tmp_path / "captions")
        caption = pipe.encode("a cat")[0]
        assert pipe.cache.stats.disk_hits == disk_hits
        assert bool(pipe.loaded) == (disk_hits == 0)
        assert caption.dtype == pipe.dtype


def test_a_changed_encoder_is_another_even_where_its_samples_are_the_same(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    kept = {"device": "cpu", "dtype": "fp32", "cache_folder": tmp_path / "captions"}
    zimage.ZImage.load(folder, **kept).encode("a cat")
    file = next((folder / "text_encoder").glob("*.safetensors"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))
    pipe = zimage.ZImage.load(folder, **kept)
    pipe.encode("a cat")
    assert pipe.cache.stats.disk_hits == 0


# ------------------------------------------------------------------ saved embeddings


def test_embeddings_give_the_pixels_of_their_prompt(pipe, tmp_path):
    expected = pipe.generate("a cat", **SIZE)
    (caption,) = pipe.encode("a cat")
    save_embeddings(tmp_path / "cat.safetensors", caption, {"prompt": "a cat"}, "1234")
    for given in (tmp_path / "cat.safetensors", str(tmp_path / "cat.safetensors"), caption):
        result = pipe.generate(embeddings=given, **SIZE)
        assert result.images[0].tobytes() == expected.images[0].tobytes()
        assert set(result.metadata[0]["request"]["embeddings"]) == {"name", "hash"}
    guided = pipe.generate(embeddings=caption, guidance=2.0, negative="a dog", **SIZE)
    assert (
        guided.images[0].tobytes() == pipe.generate("a cat", guidance=2.0, negative="a dog", **SIZE).images[0].tobytes()
    )


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ({"embeddings": "nowhere.safetensors"}, RequestError, "is missing"),
        ({"embeddings": torch.zeros(4, 7)}, RequestError, "7 wide"),
        ({"embeddings": torch.zeros(4, 4, 4)}, RequestError, "tokens, width"),
        ({"embeddings": torch.full((4, 64), torch.nan)}, RequestError, "NaN"),
        ({"embeddings": 3}, RequestError, "the path of a file"),
        ({"embeddings": torch.zeros(4, 64), "prompt": "a"}, RequestError, "pass only one of them"),
        ({"embeddings": torch.zeros(4, 64), "template": "noir"}, RequestError, "the whole text"),
        ({"embeddings": __file__}, CheckpointError, "not a whole safetensors file"),
        ({}, RequestError, "a value is needed"),
    ],
)
def test_embeddings_that_cannot_be_used(pipe, request_, error, words):
    with pytest.raises(error, match=words):
        pipe.generate(**request_, **SIZE)
