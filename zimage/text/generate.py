"""Writes text with the text encoder's weights: logits → a sampled token (`text.sampling`), again and again.

Shapes: L prompt tokens, V vocabulary.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from zimage.errors import RequestError
from zimage.nn.graphs import graphs_of
from zimage.settings.rewriting import Sampling
from zimage.text.chat import END_THINK, IM_END, THINK
from zimage.text.qwen3 import KVCache, Qwen3
from zimage.text.replay import ReplayedLogits
from zimage.text.sampling import choose, draw_noise, pack, unpack
from zimage.text.tokenizer import Tokenizer

__all__ = ["Sampling", "generate", "split_thinking", "stop_tokens", "stream_text", "write"]

END_OF_TEXT = "<|endoftext|>"
TAG = re.compile(f"({THINK}|{END_THINK})")


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
    device = model.model.norm.weight.device
    next_logits = _continuation(model, len(ids) + max_tokens - 1)  # the last token's keys are never used
    following, generated = torch.tensor([ids], device=device), list[int]()
    while len(generated) < max_tokens:
        packed = pack(next_logits(following)[0], sampling)
        noise = draw_noise(model.config.vocab_size, sampling, generator)  # while a GPU works
        token = choose(unpack(packed, model.config.vocab_size), generated, sampling, noise)
        if token in stop_ids:
            return
        generated.append(token)
        following = torch.full((1, 1), token, device=device)  # a launch, where a copy would wait for the GPU
        yield token


# ------------------------------------------------------------------ from tokens to text


def _continuation(model: Qwen3, tokens: int) -> Callable[[Tensor], Tensor]:
    """Token ids (1, L) → logits (1, V) of the token after them, for a text of at most `tokens` that they continue."""
    like = model.model.norm.weight  # has the dtype of the computation, however the matrices are stored
    if graphs := graphs_of(model):
        return ReplayedLogits(model, tokens, like, graphs)
    return partial(model.next_logits, cache=KVCache(model.config, tokens, like))


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
