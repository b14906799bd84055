"""Ring 2: the text encoder as a language model, beside transformers' own generation on random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_parity_models import BF16_RATIO, TOLERANCE, ours_like
from tiny import QWEN, VOCAB, relative_error, talkative
from torch import Tensor

from bench.pairs import run_side
from zimage.loading.files import Component
from zimage.text import Qwen3
from zimage.text.generate import Sampling, generate
from zimage.text.qwen3 import KVCache
from zimage.text.sampling import probabilities

pytest.importorskip("transformers")
import references
from references import transformers

pytestmark = pytest.mark.parity

TOKENS = 120
PROMPTS = (1, 9, 40)  # lengths
GREEDY, VARIED = Sampling(temperature=0.0), Sampling(temperature=0.0, presence_penalty=2.0)
SETTINGS = [
    Sampling(),
    Sampling(temperature=1.0, top_k=0, top_p=1.0),
    Sampling(temperature=1.7, top_k=50, top_p=0.3, min_p=0.02),
    Sampling(temperature=0.3, top_k=0, top_p=0.9, presence_penalty=1.5),
    Sampling(temperature=5.0, top_k=1000, top_p=1.0, min_p=0.5, presence_penalty=2.0),
    Sampling(temperature=0.05, top_k=3, top_p=0.01, min_p=1.0, presence_penalty=0.7),
    Sampling(temperature=1.0, top_k=0, top_p=0.5, min_p=0.1, presence_penalty=0.1),
]


class PresencePenalty(transformers.LogitsProcessor):
    """OpenAI's, which transformers lacks: −p once for every token already generated."""

    def __init__(self, penalty: float, prompt: int):
        self.penalty, self.prompt = penalty, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        seen = torch.zeros_like(scores).scatter_(1, input_ids[:, self.prompt :], 1.0)
        return scores - self.penalty * seen


def reference_processors(sampling: Sampling, prompt: int) -> transformers.LogitsProcessorList:
    """The penalty, then the processors that transformers makes for these settings, in its order."""
    config = transformers.GenerationConfig(**sampled(sampling))
    model = references.text_encoder(seed=1)
    penalty = transformers.LogitsProcessorList([PresencePenalty(sampling.presence_penalty, prompt)])
    return model._get_logits_processor(config, logits_processor=penalty)


def sampled(sampling: Sampling) -> dict:
    keys = ("temperature", "top_k", "top_p", "min_p")
    return {"do_sample": True, **{key: getattr(sampling, key) for key in keys}}


def prompt_ids(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def theirs(model, ids: list[int], sampling: Sampling, tokens: int = TOKENS, **more) -> list[int]:
    """What transformers generates."""
    out = model.generate(
        torch.tensor([ids]),
        max_new_tokens=tokens,
        logits_processor=transformers.LogitsProcessorList([PresencePenalty(sampling.presence_penalty, len(ids))]),
        **(sampled(sampling) if sampling.temperature else {"do_sample": False}),
        **more,
    )
    return out[0, len(ids) :].tolist()


def greedy(model: Qwen3, ids: list[int], sampling: Sampling, stop_ids=()) -> list[int]:
    return list(generate(model, ids, sampling, TOKENS, stop_ids, torch.Generator()))


def stored_in_bf16(reference, folder) -> Qwen3:
    """Our encoder on a CPU that computes in fp32 only: bf16 weights in the mapped file, widened when used."""
    weights = {k: v.bfloat16() for k, v in reference.state_dict().items() if k != "lm_head.weight"}
    (folder / "config.json").write_text(json.dumps(QWEN))
    save_file(weights, folder / "model.safetensors")
    model = Component.open("text_encoder", folder).load(torch.device("cpu"), torch.float32, widen_late=True)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    return model


@pytest.mark.parametrize("seed", [61, 62, 63])
@pytest.mark.parametrize("sampling", [GREEDY, VARIED], ids=["plain", "penalty"])
def test_greedy_tokens_are_the_reference_s(sampling, seed, tmp_path):
    """In fp32, from weights in fp32 and in bf16: the same values."""
    reference = talkative(references.text_encoder(seed))
    models = ours_like(reference, "text"), stored_in_bf16(reference, tmp_path)
    for length in PROMPTS:
        ids = prompt_ids(length, seed + length)
        expected = theirs(reference, ids, sampling)
        assert len(expected) == TOKENS
        assert sampling is GREEDY or len(set(expected)) > 60, "a text that repeats itself compares little"
        for model in models:
            assert greedy(model, ids, sampling) == expected


def test_generation_stops_where_the_reference_s_does():
    reference = talkative(references.text_encoder(seed=64))
    model, ids = ours_like(reference, "text"), prompt_ids(9, 64)
    stop = theirs(reference, ids, VARIED)[30]
    *expected, last = theirs(reference, ids, VARIED, eos_token_id=[stop, VOCAB - 1], pad_token_id=0)
    assert last == stop
    assert expected
    assert greedy(model, ids, VARIED, (stop, VOCAB - 1)) == expected


@torch.no_grad()
def test_bf16_logits_are_no_less_exact_than_the_reference():
    """RMS error against the reference in float64 along one continuation, which each is made to follow."""
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(65, 73):
        reference = talkative(references.text_encoder(seed)).double()
        ids = torch.tensor([prompt_ids(9, seed) + theirs(reference, prompt_ids(9, seed), VARIED, tokens=40)])
        truth = reference(ids).logits[0, 8:]
        reference.bfloat16()
        ours = following(ours_like(reference, "text"), ids, 9)
        squares += torch.stack([(x.double() - truth).square().mean() for x in (ours, cached(reference, ids, 9))])
    ratio = float((squares[0] / squares[1]).sqrt())
    assert ratio <= BF16_RATIO, f"our bf16 logits' RMS error is {ratio:.3f} times the reference's own"


@torch.no_grad()
@pytest.mark.parametrize("seed", [73, 74])
def test_logits_along_the_same_continuation(seed):
    reference, ids = talkative(references.text_encoder(seed)), torch.tensor([prompt_ids(90, seed)])
    assert relative_error(following(ours_like(reference, "text"), ids, 20), cached(reference, ids, 20)) <= TOLERANCE


def following(model: Qwen3, ids: Tensor, prompt: int) -> Tensor:
    """Logits (L − prompt + 1, vocabulary) after the prompt and after each further token."""
    cache = KVCache(model.config, ids.shape[1], model.model.norm.weight)
    rest = ids[:, prompt:].split(1, dim=1)
    return torch.cat([model.next_logits(part, cache) for part in (ids[:, :prompt], *rest)])


def cached(reference, ids: Tensor, prompt: int) -> Tensor:
    rows, past = [], None
    for part in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)):
        out = reference(part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        rows.append(out.logits[:, -1].float())
    return torch.cat(rows)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("scale", [0.3, 4.0, 30.0])
def test_filtered_probabilities(sampling, scale):
    """Of a thousand logits of several widths, some tied, after 25 tokens of which some came twice."""
    generator = torch.Generator().manual_seed(75)
    processors = reference_processors(sampling, prompt=5)
    for case in range(40):
        logits = scale * torch.randn(1000, generator=generator)
        if case % 2:
            logits = logits.bfloat16().float()  # as a bf16 model gives them: with ties
        prompt, generated = prompt_ids(5, case), prompt_ids(25, case + 100)
        scores = processors(torch.tensor([prompt + generated]), logits[None])
        ours = probabilities(logits, generated, sampling)
        assert (ours - scores[0].softmax(-1)).abs().max() <= 1e-5


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_sampled_tokens_are_the_reference_s_for_the_same_random_numbers(sampling):
    """Step by step: the same logits, filters and draws give the same token, and so the same next step."""
    reference = talkative(references.text_encoder(seed=76))
    model = ours_like(reference, "text")
    for seed in range(3):
        ids = prompt_ids(11, seed)
        torch.manual_seed(seed)
        expected = theirs(reference, ids, sampling, tokens=60)
        assert list(generate(model, ids, sampling, 60, (), torch.Generator().manual_seed(seed))) == expected


@pytest.mark.parametrize("side", ["zimage", "transformers"])
def test_the_bench_measures_both_sides(side, tiny_folder):
    arguments = {"folder": str(tiny_folder), "dtype": "fp32", "prompt_tokens": 7, "tokens": 5}
    figures = run_side(side, "rewrite", arguments)
    assert list(figures) == ["load", "prefill", "token", "peak_gb", "memory_ratio"]
    assert figures["token"] >= 0
