"""Weights in prompts: their notation, the tokens that they belong to, and what they do to every caption."""

import json

import pytest
import tiny
import torch
from PIL import Image

import zimage
from zimage.errors import RequestError
from zimage.render.conditioning import ChatParts
from zimage.settings.declared import Request
from zimage.text.emphasis import Emphasis, Without, emphases, emphasised, weighed

SIZE = {"width": 64, "height": 48, "steps": 2, "seed": 1}
ON = {"weights_in_prompt": True}
WITHOUT = "a  sits"  # of "a cat sits": the tiny tokenizer's spaces are tokens of their own


# ------------------------------------------------------------------ the notation


def marked(prompt: str) -> str:
    """Each run of characters with its weight, to three digits."""
    text, weights = weighed(prompt)
    runs = list[tuple[str, float]]()
    for character, weight in zip(text, weights or [1.0] * len(text), strict=True):
        if runs and runs[-1][1] == weight:
            runs[-1] = (runs[-1][0] + character, weight)
        else:
            runs.append((character, weight))
    return "|".join(run if weight == 1 else f"{run}={weight:.3f}" for run, weight in runs)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", "a cat"),
        ("a (cat:1.2) sits", "a |cat=1.200| sits"),
        ("a (cat) sits", "a |cat=1.100| sits"),
        ("a [cat] sits", "a |cat=0.909| sits"),
        ("((cat))", "cat=1.210"),
        ("[(cat)]", "cat"),
        ("(a (cat:2) sits:0.5)", "a =0.500|cat=1.000| sits=0.500".replace("cat=1.000", "cat")),
        ("(cat:0)", "cat=0.000"),
        ("(cat : 1.5 )", "cat =1.500"),
        ("(a cat: black)", "a cat: black=1.100"),
        ("ratio 16:9 and 10:30", "ratio 16:9 and 10:30"),
        (r"a cat \(asleep\) \[1\] \\", r"a cat (asleep) [1] \ ".strip()),
        (r"(cat \(asleep\):1.5)", "cat (asleep)=1.500"),
        (r"C:\cats", r"C:\cats"),
        ("(猫:1.5)在", "猫=1.500|在"),
        ("()a(:2)", "a"),
        ("(cat:1)", "cat"),
        ("", ""),
    ],
)
def test_what_is_read(prompt, expected):
    assert marked(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a (cat", r"the ( at character 3 is not closed; write \( where it is text"),
        ("a cat)", r"the ) at character 6 closes nothing; write \) where it is text"),
        ("a [cat)", "the ) at character 7 closes nothing"),
        ("ratio (16:9", "the ( at character 7 is not closed"),
        ("a cat:1.2)", "the ) at character 6 closes nothing"),
        ("[cat:1.2]", "[…:1.2] is not a weight; write (…:1.2)"),
        ("(cat:11)", "its largest weight is 11; use 10 at most"),
        ("((cat:4):4)", "its largest weight is 16"),
    ],
)
def test_what_cannot_be_read_is_one_line(prompt, told):
    with pytest.raises(RequestError) as caught:
        weighed(prompt)
    assert told in str(caught.value)
    assert caught.value.fields == ("prompt", "weights_in_prompt")


# ------------------------------------------------------------------ tokens


def words(text: str) -> list[tuple[int, int]]:
    """Spans as of a tokenizer whose tokens are words with the space before them."""
    spans, first = [], 0
    for i in range(1, len(text) + 1):
        if i == len(text) or text[i] == " ":
            spans.append((first, i))
            first = i
    return spans


def test_tokens_of_one_weight_go_together_with_the_spaces_before_them():
    text = weighed("a (big:1.5) cat and (a:0.5) (red:1.5) (un:3)happy dog")
    found = emphases(text, words(text.text))
    whole, part = text.text, (3 * 2 + 5) / 7
    assert [one.tokens for one in found] == [(1, 5), (4,), (6,)]
    assert [one.weight for one in found] == [1.5, 0.5, pytest.approx(part)]
    assert [one.without for one in found] == [
        whole.replace(" big", "").replace(" red", ""), whole.replace(" a ", " ", 1), whole.replace(" unhappy", ""),
    ]  # fmt: skip


def test_spans_of_a_tokenizer_are_characters(pipe):
    tokenizer = pipe.model.tokenizer
    for text in ("a cat, 猫 and é\u0301 😀.", "<|im_start|>user\na<|im_end|>\n"):
        spans = tokenizer.spans(text)
        assert len(spans) == len(tokenizer.encode(text))
        assert {i for span in spans for i in range(*span)} == set(range(len(text)))


@pytest.mark.parametrize(
    "parts", [{}, {"system_prompt": "A (cat)."}, {"thinking_content": "(cat)", "force_think_block": True}]
)
def test_only_the_prompt_is_read(parts):
    whole = ChatParts(**parts, weights_in_prompt=True).weigh("a (cat:2)")
    first = whole.weights.index(2.0)
    assert whole.text[first:].startswith("cat<|im_end|>\n<|im_start|>assistant")
    assert [i for i, weight in enumerate(whole.weights) if weight != 1] == [first, first + 1, first + 2]
    assert whole.text == ChatParts(**parts).format("a cat")
    quoted = ChatParts(strip_quotes=True, weights_in_prompt=True).weigh('say "hi" (x:2)')
    assert quoted.text[quoted.weights.index(2.0)] == "x"


# ------------------------------------------------------------------ the formula


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, 2, count)[:, None]


def slowly(caption, ids, withouts):
    """In float64, row by row."""
    e = caption.double()
    directions = [row / row.square().mean().sqrt() for row in e]
    mean = sum(directions) / len(e)
    result = e.clone()
    for one in withouts:
        own, behind = one.emphasis.tokens, 0
        for i, row in enumerate(e):
            without = row
            if i in own:
                without = row.square().mean().sqrt() * mean
            elif i > own[0]:
                without = one.caption[i - sum(j < i for j in own)].double()
                behind += 1
            result[i] += (one.emphasis.weight - 1) * (row - without)
        assert behind == len(ids) - own[0] - len(own)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_caption_against_the_formula_in_float64(dtype):
    caption, ids = rows(9, 1).to(dtype), [5, 1, 2, 1, 1, 3, 4, 1, 6]
    withouts = [
        Without(Emphasis(1.5, "", (2, 5)), rows(7, 2).to(dtype), [5, 1, 1, 1, 4, 1, 6]),
        Without(Emphasis(0.3, "", (4,)), rows(8, 3).to(dtype), [5, 1, 2, 1, 3, 4, 1, 6]),
    ]
    found, expected = emphasised(caption, ids, withouts), slowly(caption, ids, withouts)
    limit = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype]
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() / expected.abs().max(1, keepdim=True).values).max() <= limit
    assert torch.equal(found[:2], caption[:2])
    assert torch.equal(emphasised(caption, ids, []), caption)


def test_of_equal_words_the_weighed_one_is_left_out():
    caption, one = rows(4, 1), Without(Emphasis(0.0, "", (1,)), rows(3, 2), [7, 8, 9])
    found = emphasised(caption, [7, 8, 8, 9], [one])
    torch.testing.assert_close(found[2:], one.caption[1:])  # at weight 0 what follows is the other caption's


def test_tokens_that_become_others_keep_their_rows_and_what_follows_is_found_again():
    """Where a word stood, its neighbours 2 and 4 are one token, 9, in the text without it."""
    caption, one = rows(6, 1), Without(Emphasis(0.0, "", (2,)), rows(4, 2), [1, 9, 5, 6])
    found = emphasised(caption, [1, 2, 3, 4, 5, 6], [one])
    assert torch.equal(found[:2], caption[:2])
    torch.testing.assert_close(found[3], caption[3])
    torch.testing.assert_close(found[4:], one.caption[2:])


# ------------------------------------------------------------------ renders


def job_of(pipe, prompt, **settings):
    return pipe.prepare(Request.from_mapping({"prompt": prompt, **SIZE, **settings}))


def conditions(pipe, job):
    events = pipe.conditions(job)
    try:
        while True:
            next(events)
    except StopIteration as ended:
        return ended.value


def by_hand(pipe, plain, without, weight, **settings):
    """The caption of a prompt in which "cat" has a weight, from the captions of two texts."""
    texts = [ChatParts().format(prompt) for prompt in (plain, without)]
    ids, first = [pipe.texts.tokenize(text) for text in texts], texts[0].index("cat")
    spans = enumerate(pipe.model.tokenizer.spans(texts[0]))
    own = tuple(i for i, (begin, end) in spans if begin < first + 3 and end > first)
    one = Without(Emphasis(weight, texts[1], own), pipe.encode([without], **settings)[0], ids[1])
    return emphasised(pipe.encode([plain], **settings)[0], ids[0], [one])


def test_brackets_are_text_unless_asked(pipe):
    text = ChatParts().format("a (cat:1.5)")
    assert pipe.tokenize("a (cat:1.5)") == pipe.model.tokenizer.encode(text)
    assert pipe.tokenize("a (cat:1.5)", **ON) == pipe.tokenize("a cat")
    assert pipe.count_tokens("a (cat:1.5)", **ON).tokens == len(pipe.tokenize("a cat"))


@pytest.mark.parametrize("prompt", ["a cat", "a (cat:1)", "a [(cat)]", r"a \(cat\)"])
def test_weights_of_one_change_no_bits_and_encode_nothing_more(pipe, prompt):
    plain = weighed(prompt).text
    with_weights, without = job_of(pipe, prompt, **ON), job_of(pipe, plain)
    assert with_weights.token_ids == without.token_ids
    assert with_weights.emphasis == ((),)
    assert torch.equal(pipe.encode([prompt], **ON)[0], pipe.encode([plain])[0])


def test_a_weight_is_that_of_the_words_in_every_caption(pipe):
    expected = by_hand(pipe, "a cat sits", WITHOUT, 1.5)
    (found,) = pipe.encode(["a (cat:1.5) sits"], **ON)
    assert torch.equal(found, expected)
    job = job_of(
        pipe, ["a (cat:1.5) sits", "a cat sits", "a (cat:0.5) sits"], guidance=2.0, negative="a (cat:3) sits", **ON
    )
    captions = conditions(pipe, zimage.Job.from_dict(json.loads(json.dumps(job.to_dict()))))
    assert len(job.token_ids) == 2  # with the cat and without, of all prompts and the negative one
    weights = [1.5, None, 0.5]
    for caption, weight in zip(captions.prompts, weights, strict=True):
        wanted = pipe.encode(["a cat sits"])[0] if weight is None else by_hand(pipe, "a cat sits", WITHOUT, weight)
        assert torch.equal(caption, wanted)
    assert torch.equal(captions.negative, by_hand(pipe, "a cat sits", WITHOUT, 3.0))


def test_other_ways_to_a_caption(pipe, seeing_folder):
    """Other layers; then what shortens captions; then pictures, mixed with the weighed caption."""
    settings = {"layer_weights": {-2: 0.5, -3: 0.5}}
    found = conditions(pipe, job_of(pipe, "a (cat:1.5) sits", **settings, **ON)).prompts[0]
    assert torch.equal(found, by_hand(pipe, "a cat sits", WITHOUT, 1.5, **settings))
    long = "a (cat:1.5) " + "sits " * 200
    plain, without = weighed(long).text, weighed(long).text.replace("cat", "", 1)
    for mode in ("truncate", "pool"):
        found = conditions(pipe, job_of(pipe, long, long_prompt=mode, **ON)).prompts[0]
        assert torch.equal(
            found, pipe.texts.finished("x", (), {"x": by_hand(pipe, plain, without, 1.5)}, {"x": ()}, mode)
        )
        assert len(found) == pipe.texts.limit
    seeing = zimage.ZImage.load(seeing_folder, device="cpu", dtype="fp32", vision_model=str(seeing_folder / "vision"))
    reference = {"reference": [Image.new("RGB", (64, 64), "red")]}
    found = conditions(seeing, job_of(seeing, "a (cat:1.5) sits", **reference, **ON)).prompts[0]
    assert torch.equal(found, seeing.encode(["a (cat:1.5) sits"], **reference, **ON)[0])
    assert not torch.equal(found, seeing.encode(["a cat sits"], **reference)[0])


def test_the_cache_knows_the_plain_texts(tiny_folder):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32")
    pipe.encode(["a cat sits", WITHOUT])
    before = pipe.cache.stats.misses
    pipe.encode(["a (cat:1.5) sits", "a (cat:0.2) sits"], **ON)
    assert pipe.cache.stats.misses == before


def test_saved_embeddings_have_no_words_to_weigh():
    with pytest.raises(RequestError, match="leave out weights_in_prompt"):
        Request(embeddings=torch.zeros(4, tiny.QWEN["hidden_size"]), **ON)


def test_a_bad_weight_ends_a_request_before_anything_is_loaded(tiny_folder):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32")
    for request in ({"prompt": "a (cat"}, {"prompt": "a", "guidance": 2.0, "negative": "a (cat"}):
        with pytest.raises(RequestError, match="is not closed"):
            pipe.prepare(Request.from_mapping({**SIZE, **ON, **request}))
    assert pipe.loaded == ()


# ------------------------------------------------------------------ what it is good for


def share_of_blue(pipe, prompt: str) -> float:
    """Of a few pictures, how many have a blue border."""
    result = pipe.generate(prompt, seed=[1], images=4, **ON)
    corners = [image.convert("RGB").getpixel((2, 2)) for image in result.images]
    return sum(blue > 150 and red < 110 for red, _, blue in corners) / len(corners)


def test_on_the_demo_a_colour_goes_with_its_weight():
    pipe = zimage.ZImage.load(device="cpu", dtype="fp32")
    assert share_of_blue(pipe, "a cat on a (blue:1.5) background") == 1
    assert share_of_blue(pipe, "a cat on a (blue:0) background") <= 0.5
