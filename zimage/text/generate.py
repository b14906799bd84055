"""Writes text with the text encoder's weights: logits → filters → a sampled token, again and again.

The filters follow transformers' processors in their order and treatment of ties; the presence penalty of OpenAI's
interface comes before them. All of it runs in fp32 on the CPU, so a seed gives the same text on every device as far
as the logits agree.

Shapes: L prompt tokens, V vocabulary.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from zimage.errors import NonFiniteError, RequestError
from zimage.settings.declared import Sampling
from zimage.text.chat import END_THINK, IM_END, THINK
from zimage.text.qwen3 import KVCache, Qwen3
from zimage.text.tokenizer import Tokenizer

__all__ = ["Sampling", "generate", "split_thinking", "stop_tokens", "stream_text", "write"]

END_OF_TEXT = "<|endoftext|>"
TAG = re.compile(f"({THINK}|{END_THINK})")


# ------------------------------------------------------------------ from logits to a token


def penalised(logits: Tensor, generated: Collection[int], penalty: float) -> Tensor:
    """logitᵢ − penalty · [i ∈ generated]: once per token, however often it occurred (OpenAI's presence penalty)."""
    if not penalty or not generated:
        return logits
    seen = torch.tensor(sorted(set(generated)))
    return logits.index_add(0, seen, logits.new_ones(len(seen)), alpha=-penalty)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """−∞ below the k-th largest logit; all logits equal to it stay (Fan et al. 2018)."""
    least = logits.topk(min(k, len(logits))).values[-1]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """−∞ for the least likely tokens whose probabilities add up to 1 − p or less (Holtzman et al. 2020).

    The most likely token always stays. All V logits are sorted, though most may be −∞, because their order decides
    which of several equal ones at the limit are dropped.
    """
    ascending, order = logits.sort()
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    tail[-1] = False
    return logits.index_fill(0, order[tail], -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """−∞ for tokens less likely than p times the most likely one (Nguyen et al. 2024)."""
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < p * probability.amax(), -torch.inf)


def probabilities(logits: Tensor, generated: Collection[int], sampling: Sampling) -> Tensor:
    """Probabilities (V,) of the next token, fp32, from raw logits (V,) and the tokens so far; temperature above 0."""
    logits = penalised(logits, generated, sampling.presence_penalty) / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.softmax(-1)


def choose(logits: Tensor, generated: Collection[int], sampling: Sampling, generator: torch.Generator) -> int:
    """The next token: the most likely one at temperature 0, else a sampled one. Raises NonFiniteError."""
    if not logits.isfinite().all():
        raise NonFiniteError("the text encoder produced NaN or infinity; fetch its weights again or try dtype fp32")
    if sampling.temperature == 0:
        return int(penalised(logits, generated, sampling.presence_penalty).argmax())
    return int(torch.multinomial(probabilities(logits, generated, sampling), 1, generator=generator))


# ------------------------------------------------------------------ from tokens to text


def generate(
    model: Qwen3,
    ids: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: Collection[int],
    generator: torch.Generator,
) -> Iterator[int]:
    """Tokens that follow `ids`, each as soon as the CPU `generator` has sampled it; closing the iterator cancels.

    It ends before a token of `stop_ids` or after `max_tokens`. Raises RequestError at once.
    """
    if not ids:
        raise RequestError("the text to continue has no tokens")
    if max_tokens < 1:
        raise RequestError(f"max_tokens {max_tokens} is too small; the minimum is 1")
    return _tokens(model, list(ids), sampling, max_tokens, frozenset(stop_ids), generator)


def _tokens(
    model: Qwen3,
    ids: list[int],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: frozenset[int],
    generator: torch.Generator,
) -> Iterator[int]:
    like = model.model.norm.weight  # has the dtype of the computation, however the matrices are stored
    cache = KVCache(model.config, len(ids) + max_tokens - 1, like)  # the last token's keys are never used
    following, generated = ids, list[int]()
    while len(generated) < max_tokens:
        logits = model.next_logits(torch.tensor([following], device=like.device), cache)
        token = choose(logits[0].cpu(), generated, sampling, generator)
        if token in stop_ids:
            return
        generated.append(token)
        following = [token]
        yield token


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer."""
    return frozenset(map(tokenizer.id_of, (IM_END, END_OF_TEXT)))


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Pieces of text that together are the text of all tokens; a character that is still incomplete is held back."""
    held = []
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        if text and not text.endswith("\ufffd"):  # an incomplete character decodes to this
            yield text
            held = []
    if held:
        yield tokenizer.decode(held)


def write(
    model: Qwen3, tokenizer: Tokenizer, text: str, sampling: Sampling, max_tokens: int = 512, seed: int = 0
) -> Iterator[str]:
    """What the model writes after `text` (a formatted chat) to the end of its turn, piece by piece, thoughts included.

    The same seed gives the same text; closing the iterator cancels. Raises RequestError or NonFiniteError.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = generate(model, tokenizer.encode(text), sampling, max_tokens, stop_tokens(tokenizer), generator)
    return stream_text(tokens, tokenizer)


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """(thinking, answer) of what a model wrote; `opened` says that the prompt ended inside a think block.

    What may be thinking never counts as answer: a block that is never closed is all thinking, nested blocks end with
    the outermost, and everything before a closing tag without an opening one is thinking.
    """
    depth, thoughts, answers = int(opened), list[str](), list[str]()
    for i, piece in enumerate(TAG.split(text)):
        if piece == THINK:
            depth += not (opened and i == 1 and not "".join(thoughts).strip())  # the model may repeat the prompt's tag
        elif piece == END_THINK and depth:
            depth -= 1
        elif piece == END_THINK:
            thoughts, answers = thoughts + answers, []
        else:
            (thoughts if depth else answers).append(piece)
    return "\n".join(filter(None, map(str.strip, thoughts))), "".join(answers).strip()
