"""Writing with the text encoder's weights, without a reference: cache, penalty, filters, stops, streaming, thoughts."""

import itertools
import math

import pytest
import torch
from test_text_model import token_ids
from tiny import QWEN, VOCAB, randomised, relative_error, talkative, tokenizer

from zimage.errors import CheckpointError, NonFiniteError, RequestError
from zimage.nn.layers import TokenEmbedding, WideningLinear
from zimage.nn.packed import Blocks, PackedEmbedding, Scaled
from zimage.text import Qwen3, Tokenizer
from zimage.text.generate import Sampling, generate, split_thinking, stop_tokens, stream_text, write
from zimage.text.qwen3 import KVCache
from zimage.text.sampling import (
    choose,
    draw_noise,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    pack,
    penalised,
    probabilities,
    shortlisted,
    unpack,
)

GREEDY = Sampling(temperature=0.0)
TEXT = "A ☕ at dawn, naïve 東京 👩‍👩‍👧 and a\ufffd"


@pytest.fixture(scope="module")
def model():
    return talkative(randomised(Qwen3.from_config(QWEN), seed=4)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def words():
    return Tokenizer(tokenizer())


def tokens_of(model, seed: int = 0, sampling: Sampling = Sampling(), tokens: int = 40) -> list[int]:  # noqa: B008
    return list(generate(model, [1, 2, 3], sampling, tokens, (), torch.Generator().manual_seed(seed)))


# ------------------------------------------------------------------ cache and head


def plain_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits (L, vocabulary) after each token, all in one pass without a cache."""
    return model(ids, layer=-1)[0] @ model.model.embed_tokens.weight.T


@pytest.mark.parametrize("prompt", [1, 7, 49])
def test_cached_logits_are_those_of_the_whole_text(model, prompt):
    ids = token_ids(50)
    cache = KVCache(model.config, 50, model.model.norm.weight)
    steps = [model.next_logits(part, cache) for part in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1))]
    assert cache.length == 50
    assert relative_error(torch.cat(steps), plain_logits(model, ids)[prompt - 1 :]) <= 1e-5


def test_texts_of_one_length_share_a_cache(model):
    ids = torch.cat((token_ids(9), token_ids(9).flip(1)))
    cache = KVCache(model.config, 9, model.model.norm.weight, batch=2)
    model.next_logits(ids[:, :8], cache)
    both = model.next_logits(ids[:, 8:], cache)
    for row, text in zip(both, ids, strict=True):
        assert relative_error(row, plain_logits(model, text[None])[-1]) <= 1e-5


def test_a_cache_holds_what_it_was_made_for(model):
    cache = KVCache(model.config, 5, model.model.norm.weight)
    per_token = 2 * QWEN["num_hidden_layers"] * QWEN["num_key_value_heads"] * QWEN["head_dim"]
    assert cache.nbytes == 5 * per_token * 4
    model.next_logits(token_ids(4), cache)
    with pytest.raises(ValueError, match="2 tokens cannot follow 4 in a cache for 5"):
        model.next_logits(token_ids(2), cache)
    model.next_logits(token_ids(1), cache)
    with pytest.raises(ValueError, match="1 tokens cannot follow 5"):
        model.next_logits(token_ids(1), cache)


def test_encoding_is_the_same_bits_after_writing(model):
    before = model(token_ids(9))
    tokens_of(model)
    assert torch.equal(model(token_ids(9)), before)


def test_a_head_of_another_dtype_is_never_widened_as_a_whole(monkeypatch):
    """Weights stored in bf16, computed with in fp32; rows come in pieces, the last one smaller."""
    monkeypatch.setattr("zimage.nn.layers.PIECE", 64 * 10)
    table, x = TokenEmbedding(VOCAB, 64).bfloat16().requires_grad_(False), torch.randn(1, 64)
    widened = []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: widened.append(len(w)) or x @ w.T)
    logits = table.logits(x)
    assert logits.dtype == torch.float32
    assert relative_error(logits, x.double() @ table.weight.double().T) <= 1e-6
    assert sum(widened) == VOCAB
    assert max(widened) == 10


PACKED = {
    "fp8": Scaled(torch.randn(VOCAB, 64).to(torch.float8_e4m3fn), torch.tensor(0.25)),
    "int8 rows": Scaled(torch.randint(-127, 127, (VOCAB, 64), dtype=torch.int8), torch.rand(VOCAB, 1)),
    "blocks": Blocks(torch.randint(255, (VOCAB, 32), dtype=torch.uint8), 64, lambda b: torch.cat((b, b), 1) / 100.0),
}


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_head(kind, monkeypatch):
    monkeypatch.setattr("zimage.nn.layers.PIECE", 64 * 10)
    table, x = PackedEmbedding(PACKED[kind]), torch.randn(1, 64)
    assert relative_error(table.logits(x), x.double() @ PACKED[kind].decode().double().T) <= 1e-6
    assert table.logits(x.bfloat16()).dtype == torch.bfloat16


def test_packed_and_late_widened_models_write_what_plain_ones_do():
    plain = talkative(randomised(Qwen3.from_config(QWEN), seed=5)).eval().requires_grad_(False)
    expected = tokens_of(plain, sampling=GREEDY)
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = WideningLinear
            module.weight.data = module.weight.data.bfloat16()  # exact
    embedding = plain.model.embed_tokens
    embedding.weight.data = embedding.weight.data.bfloat16()
    assert tokens_of(plain, sampling=GREEDY) == expected
    plain.model.embed_tokens = PackedEmbedding(Scaled(embedding.weight.data, torch.ones(())))
    assert tokens_of(plain, sampling=GREEDY) == expected


# ------------------------------------------------------------------ from logits to a token


def test_the_presence_penalty_is_its_formula():
    logits, generated = torch.randn(20, generator=torch.Generator().manual_seed(1)), [3, 7, 3, 3, 19]
    result = penalised(logits, generated, 1.5)
    for i, value in enumerate(logits.tolist()):
        assert result[i].item() == pytest.approx(value - 1.5 * (i in (3, 7, 19)), abs=1e-6)
    assert torch.equal(penalised(logits, generated, 0.0), logits)
    assert torch.equal(penalised(logits, [], 2.0), logits)


def test_the_penalty_sees_what_was_generated_and_not_the_prompt(model):
    free, sampling = tokens_of(model, sampling=GREEDY, tokens=60), Sampling(temperature=0.0, presence_penalty=2.0)
    assert len(set(tokens_of(model, sampling=sampling, tokens=60))) > 2 * len(set(free)), "it repeats itself less"
    prompt = [1, 2, 3, *range(VOCAB)]  # holds every token
    first = next(generate(model, prompt, sampling, 1, (), torch.Generator()))
    assert first == int(plain_logits(model, torch.tensor([prompt]))[-1].argmax())


def test_filters_by_hand():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04]).log()
    inf = math.inf
    assert keep_top_k(logits, 2).isneginf().tolist() == [False, False, False, True, True], "ties stay"
    assert keep_top_k(logits, 99).equal(logits)
    assert keep_top_p(logits, 0.95).isneginf().tolist() == [False, False, False, False, True]
    assert keep_top_p(logits, 0.91).isneginf().tolist() == [False, False, False, False, True]
    assert keep_top_p(logits, 0.01).isneginf().tolist() == [False, True, True, True, True], "the likeliest stays"
    assert keep_min_p(logits, 0.1).isneginf().tolist() == [False, False, False, False, True]
    assert keep_min_p(logits, 1.0).isneginf().tolist() == [False, True, True, True, True]
    assert keep_top_p(torch.tensor([-inf, 0.0, -inf]), 0.5).tolist() == [-inf, 0.0, -inf]


def test_penalty_temperature_top_k_top_p_min_p_in_this_order():
    """Each order of the five gives something else on these logits; ours is the documented one."""
    logits = torch.tensor([2.6, 2.4, 2.0, 1.9, 1.2, 0.5, 0.0, -1.0])
    sampling = Sampling(temperature=2.0, top_k=5, top_p=0.75, min_p=0.62, presence_penalty=0.9)
    steps = [
        lambda x: penalised(x, [0, 3], 0.9),
        lambda x: x / 2.0,
        lambda x: keep_top_k(x, 5),
        lambda x: keep_top_p(x, 0.75),
        lambda x: keep_min_p(x, 0.62),
    ]

    def run(order):
        x = logits
        for step in order:
            x = step(x)
        return x.softmax(-1)

    ours = probabilities(logits, [0, 3], sampling)
    assert torch.allclose(ours, run(steps))
    others = [order for order in itertools.permutations(steps) if not torch.allclose(run(order), ours)]
    assert len(others) > 60, "the settings tell most orders apart"


def wide_logits(seed: int) -> torch.Tensor:
    """Logits of 5000 tokens of several widths, every other time with ties, as a bf16 model gives them."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * (0.3, 2.0, 6.0, 30.0)[seed % 4]
    return logits.bfloat16().float() if seed // 4 % 2 else logits


EVERY_FILTER = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m, presence_penalty=penalty)
    for t, k, p, m, penalty in itertools.product(
        (0.05, 0.6, 1.7), (0, 1, 20, 600, 9999), (0.01, 0.5, 0.95, 0.9999, 1.0), (0.0, 0.1, 1.0), (0.0, 1.5)
    )
]


def test_the_shortlist_gives_the_token_of_the_whole_vocabulary(monkeypatch):
    """For every setting, with ties, penalties, shortlists too short: what multinomial draws, as many numbers."""
    taken = []

    def counting(*arguments):
        taken.append(shortlisted(*arguments))
        return taken[-1]

    monkeypatch.setattr("zimage.text.sampling.shortlisted", counting)
    for case, sampling in enumerate(EVERY_FILTER):
        monkeypatch.setattr("zimage.text.sampling.SHORTLIST", (512, 64, 5000)[case % 3])
        logits, before, now = wide_logits(case), *(torch.Generator().manual_seed(case) for _ in range(2))
        generated = logits.topk(100).indices[:: case % 4].tolist() if case % 4 else []
        for _ in range(3):
            offer = unpack(pack(logits, sampling), len(logits))
            token = choose(offer, generated, sampling, draw_noise(len(logits), sampling, now))
            assert token == int(torch.multinomial(probabilities(logits, generated, sampling), 1, generator=before))
            assert before.get_state().equal(now.get_state())
    assert sum(token is not None for token in taken) > 0.5 * len(taken)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=0), Sampling(min_p=0.3), Sampling(top_p=1.0)], ids=str)
def test_the_shortlist_answers_nearly_always(sampling):
    taken = []
    for case in range(3, 243, 4):  # as wide as a trained model's
        logits, noise = wide_logits(case), torch.empty(5000).exponential_()
        largest = logits.topk(512).indices
        taken.append(shortlisted(logits, largest, logits[largest[-1]], sampling, noise))
    assert sum(token is not None for token in taken) >= 55


def test_the_shortlist_never_answers_where_a_tie_decides():
    tied, noise = torch.tensor([1.0, 1.0, 0.0]), torch.ones(3)
    assert shortlisted(tied, torch.tensor([0, 1, 2]), tied[2], Sampling(top_p=0.3), noise) is None
    one = torch.tensor([1.0, 0.9, 0.0])
    assert shortlisted(one, torch.tensor([0, 1, 2]), one[2], Sampling(top_p=0.3), noise) == 0


def test_temperature_zero_is_greedy_and_needs_no_random_numbers(model):
    assert tokens_of(model, 1, GREEDY) == tokens_of(model, 2, GREEDY)
    assert tokens_of(model, 1, Sampling(top_k=1)) == tokens_of(model, 0, GREEDY)


def test_a_seed_gives_the_same_text(model):
    assert tokens_of(model, 3) == tokens_of(model, 3)
    assert tokens_of(model, 3) != tokens_of(model, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", 5.1), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.1),
     ("top_k", -1), ("top_k", 2.5), ("min_p", -0.1), ("min_p", 1.1), ("presence_penalty", -0.1),
     ("presence_penalty", 2.1), ("temperature", "hot"), ("top_p", None)],
)  # fmt: skip
def test_bounds_by_name(name, value):
    with pytest.raises(RequestError, match=f"^{name}"):
        Sampling(**{name: value})


def test_bounds_themselves_are_allowed():
    Sampling(temperature=0, top_p=1, top_k=0, min_p=0, presence_penalty=0)
    Sampling(temperature=5, top_p=1e-9, top_k=10**9, min_p=1, presence_penalty=2)
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        Sampling.from_mapping({"temprature": 1.0})


# ------------------------------------------------------------------ from tokens to text


def test_tokens_come_one_by_one_and_closing_cancels(model):
    text = generate(model, [1, 2, 3], GREEDY, 40, (), torch.Generator())
    ran = []
    hook = model.model.norm.register_forward_hook(lambda *_: ran.append(1))
    first = next(text)
    assert len(ran) == 1
    text.close()
    hook.remove()
    assert len(ran) == 1
    assert first == tokens_of(model, 0, GREEDY)[0]
    assert torch.is_grad_enabled()


def test_it_stops_before_a_stop_token_or_after_max_tokens(model):
    tokens = tokens_of(model, 0, GREEDY)
    stop = tokens[5]
    stopped = list(generate(model, [1, 2, 3], GREEDY, 40, {stop}, torch.Generator()))
    assert stopped == tokens[: tokens.index(stop)]
    assert tokens_of(model, 0, GREEDY, tokens=1) == tokens[:1]


@pytest.mark.parametrize(("ids", "most", "says"), [([], 5, "no tokens"), ([1], 0, "max_tokens 0"), ([1], -3, "-3")])
def test_what_cannot_be_written_is_refused_at_once(model, ids, most, says):
    with pytest.raises(RequestError, match=says):
        generate(model, ids, GREEDY, most, (), torch.Generator())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_damaged_weights_are_named_not_written_with(sampling, broken):
    model = randomised(Qwen3.from_config(QWEN), seed=6).requires_grad_(False)
    model.model.norm.weight[0] = broken
    with pytest.raises(NonFiniteError, match="text encoder produced NaN or infinity"):
        next(generate(model, [1], sampling, 5, (), torch.Generator()))


def test_stop_tokens_are_looked_up_by_name(words):
    assert stop_tokens(words) == {VOCAB - 5, VOCAB - 3}
    assert words.id_of("<think>") == VOCAB - 2
    with pytest.raises(CheckpointError, match="no token '<|im_ended|>'".replace("|", r"\|")):
        words.id_of("<|im_ended|>")


def test_streaming_never_breaks_a_character(words):
    """Every byte is a token of its own here."""
    ids = words.encode(TEXT)
    pieces = list(stream_text(ids, words))
    assert "".join(pieces) == TEXT
    assert len(pieces) >= len(TEXT) - 2, "and each is passed on as soon as it is whole"
    held = list(stream_text(ids[:3], words))
    assert held == ["A", " ", "\ufffd"], "what is cut off is shown as such, at the end"


def test_streaming_any_bytes_gives_their_text(words):
    for seed in range(20):
        ids = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert "".join(stream_text(ids, words)) == words.decode(ids)


def test_written_text_is_that_of_its_tokens(model, words):
    prompt, generator = "a cat", torch.Generator().manual_seed(9)
    tokens = generate(model, words.encode(prompt), Sampling(), 30, stop_tokens(words), generator)
    assert "".join(write(model, words, prompt, Sampling(), 30, seed=9)) == words.decode(list(tokens))


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("an answer", "", "an answer"),
        ("", "", ""),
        ("<think>\n\n</think>\n\nan answer\n", "", "an answer"),
        ("<think>\nwell\n</think>\n\nan answer", "well", "an answer"),
        ("<think>never closed, and cut", "never closed, and cut", ""),
        ("<think>", "", ""),
        ("before <think>cut", "cut", "before"),
        ("opened by the prompt</think>an answer", "opened by the prompt", "an answer"),
        ("</think>an answer", "", "an answer"),
        ("an answer</think>", "an answer", ""),
        ("<think>a<think>b</think>c</think>an answer", "a\nb\nc", "an answer"),
        ("<think>a<think>b</think>c", "a\nb\nc", ""),
        ("<think>a</think>one <think>b</think>two", "a\nb", "one two"),
        ("<think>a</think>one <think>b", "a\nb", "one"),
        ("<think>a</think>b</think>an answer", "a\nb", "an answer"),
        ("<think>a</think></think></think>an answer", "a", "an answer"),
        ("a</think>b</think>an answer", "a\nb", "an answer"),
        ("one<thinking>two", "", "one<thinking>two"),
    ],
)
def test_thoughts_are_split_from_the_answer(text, thinking, answer):
    assert split_thinking(text) == (thinking, answer)


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("cut before it was closed", "cut before it was closed", ""),
        ("a</think>an answer", "a", "an answer"),
        ("\n<think>\na</think>an answer", "a", "an answer"),
        ("a<think>b</think>c</think>an answer", "a\nb\nc", "an answer"),
        ("a</think>one <think>b</think>two", "a\nb", "one two"),
        ("", "", ""),
    ],
)
def test_thoughts_that_the_prompt_opened(text, thinking, answer):
    assert split_thinking(text, opened=True) == (thinking, answer)


def test_no_cut_text_ever_leaks_a_thought():
    """Every text of seven parts, cut anywhere: what stands inside a block that is open is never in the answer."""
    for parts in itertools.product(("<think>", "</think>", "x"), repeat=7):
        depth, open_thoughts, text = 0, [], ""
        for i, part in enumerate(parts):
            depth = max(0, depth + (part == "<think>") - (part == "</think>"))
            open_thoughts = [] if part == "</think>" and not depth else open_thoughts
            word = f"[{i}]" if part == "x" else part
            text += word
            open_thoughts += [word] if part == "x" and depth else []
        answer = split_thinking(text)[1]
        assert not [word for word in open_thoughts if word in answer], text
        assert "think>" not in answer
