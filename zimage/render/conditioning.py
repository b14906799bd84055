"""From a prompt to its caption.

    prompt ─ template, chat parts ─→ text ─ tokenizer ─→ ids ─ encoder ─→ layers, blended ─ weights, length ─→ caption

`Texts` does what needs no weights, once, when a request is prepared. What turns a text into its caption is an
`Encoder`: the model's own, saved embeddings, or one of these behind a cache; a server or a model that sees pictures
stands in the same place.

Shapes: L tokens, C caption width.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from zimage.errors import RequestError
from zimage.loading.files import ModelFiles
from zimage.loading.plan import MemoryPlan
from zimage.loading.registry import DIT, TEXT_ENCODER
from zimage.loading.residency import Residency
from zimage.loading.weights import finite
from zimage.settings.captions import MAX_TEXT_TOKENS, TEXT_PARTS, TextSettings
from zimage.settings.declared import Request
from zimage.settings.fields import Weights, either
from zimage.text.cache import EmbeddingCache, cache_key
from zimage.text.chat import before_prompt, format_chat
from zimage.text.compress import compress, describe
from zimage.text.emphasis import Emphasis, Weighed, Without, emphases, emphasised, weighed
from zimage.text.templates import Template, Templates

log = logging.getLogger("zimage")
T = TypeVar("T", bound=TextSettings)


class TokenCount(NamedTuple):
    """Tokens of a formatted prompt, the most that the model was trained for, and what will become of them."""

    tokens: int
    limit: int
    outcome: str


class ChatParts(NamedTuple):
    """All that is written round a prompt, its template's parts included."""

    system_prompt: str | None = None
    thinking_content: str | None = None
    assistant_content: str | None = None
    force_think_block: bool = False
    strip_quotes: bool = False
    weights_in_prompt: bool = False

    def format(self, prompt: str) -> str:
        """What the text encoder reads. Raises RequestError for a prompt that is not text, or endless."""
        return self.weigh(prompt).text

    def weigh(self, prompt: str) -> Weighed:
        """The same with the weights that stand in the prompt. Raises RequestError, also for those."""
        Request.check_one("prompt", prompt)
        parts = [self.system_prompt, self.thinking_content, self.assistant_content]
        if self.strip_quotes:
            prompt, parts = prompt.replace('"', ""), [part and part.replace('"', "") for part in parts]
        own = weighed(prompt) if self.weights_in_prompt else Weighed(prompt)
        system, thinking, answer = parts
        whole = format_chat(own.text, system, thinking, answer, self.force_think_block)
        if not own.weights:
            return Weighed(whole)
        before = len(before_prompt(system))
        after = len(whole) - before - len(own.text)
        return Weighed(whole, (*[1.0] * before, *own.weights, *[1.0] * after))


class Texts:
    """What a model knows of text without its weights; `templates` are the shipped ones and the user's own."""

    def __init__(self, model: ModelFiles, folder: Path | None):
        self._model, self._folder = model, folder
        dit = model.config(DIT)
        self.limit: int = dit.max_caption_tokens if dit else MAX_TEXT_TOKENS

    @cached_property
    def templates(self) -> Templates:
        return Templates.open(self._folder)

    def parts(self, text: TextSettings) -> ChatParts:
        """The chat parts that are given, and where they are left open the template's. Raises RequestError."""
        self.check_layers(text.layers)
        template = self.templates.get(text.template) if text.template else Template("", "", "")
        thinking = either(text.thinking_content, template.thinking_content)
        block = either(text.force_think_block, bool(thinking or template.add_think_block))
        return ChatParts(
            either(text.system_prompt, template.system_prompt or None),
            thinking if block else None,
            either(text.assistant_content, template.assistant_content),
            block,
            text.strip_quotes,
            text.weights_in_prompt,
        )

    def filled(self, text: T) -> T:
        """The settings with every part that the template has and they leave open. Raises RequestError."""
        return dataclasses.replace(text, **self.parts(text)._asdict())

    def tokenize(self, formatted: str) -> tuple[int, ...]:
        """Raises RequestError for more tokens than the text encoder was trained for: encoding them takes hours."""
        ids = tuple(self._model.tokenizer.encode(formatted))
        if len(ids) > MAX_TEXT_TOKENS:
            text = f"has {len(ids):,} tokens with its template and chat parts; it may have at most {MAX_TEXT_TOKENS:,}"
            raise RequestError(f"the text {text}", fields=("prompt", *TEXT_PARTS))
        return ids

    def emphases(self, text: Weighed) -> tuple[Emphasis, ...]:
        """The weights in a formatted prompt; none where all are 1."""
        return emphases(text, self._model.tokenizer.spans(text.text)) if text.weights else ()

    def warn_of_length(self, tokens: int, long_prompt: str) -> None:
        """Say that a text is longer than the model was trained for, where it stays so."""
        if tokens > self.limit and long_prompt == "none":
            log.warning("the prompt has %d tokens; the model was trained for at most %d", tokens, self.limit)

    def count(self, prompt: str, text: TextSettings) -> TokenCount:
        """Tokens of a prompt, and what `long_prompt` will do to them."""
        tokens = len(self.tokenize(self.parts(text).format(prompt)))
        return TokenCount(tokens, self.limit, describe(tokens, self.limit, text.long_prompt))

    def finished(
        self,
        text: str,
        marks: Sequence[Emphasis],
        captions: Mapping[str, Tensor],
        ids: Mapping[str, Sequence[int]],
        long_prompt: str,
    ) -> Tensor:
        """The caption of a text with its weights, and then as `long_prompt` wants it; from those that were encoded."""
        withouts = [Without(mark, captions[mark.without], ids[mark.without]) for mark in marks]
        return compress(emphasised(captions[text], ids[text], withouts), self.limit, long_prompt)

    def check_layers(self, layers: Weights) -> None:
        """Raise RequestError for layers that the text encoder does not have."""
        config = self._model.config(TEXT_ENCODER)
        if config is None:  # it is on another machine, which knows
            return
        states = config.num_hidden_layers + 1
        for layer in layers:
            if layer < -states:
                raise RequestError(
                    f"hidden layer {layer} does not exist; use −{states} to −1",
                    fields=("hidden_layer", "layer_weights"),
                )


# ---------------------------------------------------------------------- encoders


class Text(NamedTuple):
    """A text to be encoded: formatted, its tokens, and the layers that its caption is made of."""

    formatted: str
    ids: tuple[int, ...]
    layers: Weights


class Encoder(Protocol):
    """Turns texts into captions (L, C), all their tokens.

    `component` names the component that must be loaded while it encodes; "" if none.
    """

    component: str

    def known(self, text: Text) -> Tensor | None:
        """The caption if it is already known, else None."""

    def encode(self, text: Text, plan: MemoryPlan) -> Tensor:
        """The caption, computed now."""


class LocalEncoder:
    """The model's own text encoder."""

    component = TEXT_ENCODER

    def __init__(self, model: ModelFiles, residency: Residency):
        self._model, self._residency = model, residency

    def known(self, text: Text) -> Tensor | None:
        return None

    def encode(self, text: Text, plan: MemoryPlan) -> Tensor:
        with self._residency.use(TEXT_ENCODER, plan) as encoder, torch.no_grad():
            ids = torch.tensor([text.ids], device=self._residency.places[TEXT_ENCODER].device)
            return finite(encoder.blend(ids, text.layers)[0], "the text encoder", encoder)

    @cached_property
    def fingerprint(self) -> str:
        """Files are read for it, so only once."""
        return self._model.components[TEXT_ENCODER].checkpoint.fingerprint()

    @cached_property
    def identity(self) -> dict[str, str]:
        """All that the bits of a caption depend on besides the text."""
        place, checkpoint = self._residency.places[TEXT_ENCODER], self._model.components[TEXT_ENCODER].checkpoint
        return {
            "encoder": self.fingerprint,
            "dtype": str(place.dtype),
            "files": checkpoint.stamp(),
            "device": place.device.type,
            "attention": self._residency.attention,
        }


class SavedEmbeddings:
    """A caption that was encoded before, in the place of the prompt; other texts go to another encoder."""

    def __init__(self, caption: Tensor, others: Encoder):
        self._caption, self._others = caption, others
        self.component = others.component

    def known(self, text: Text) -> Tensor | None:
        return self._others.known(text) if text.ids else self._caption

    def encode(self, text: Text, plan: MemoryPlan) -> Tensor:
        return self._others.encode(text, plan)


class Identified(Encoder, Protocol):
    """An encoder that can tell its captions from those of others."""

    @property
    def fingerprint(self) -> str:
        """That of its weights; "" as long as it is not known."""

    @property
    def identity(self) -> Mapping[str, str]: ...


class CachedEncoder:
    """Another encoder, whose captions are kept: a text is encoded once."""

    def __init__(self, inner: Identified, cache: EmbeddingCache):
        self._inner, self._cache = inner, cache
        self.component = inner.component

    def known(self, text: Text) -> Tensor | None:
        return self._cache.get(self._key(text))

    def encode(self, text: Text, plan: MemoryPlan) -> Tensor:
        caption = self._inner.encode(text, plan)
        self._cache.put(self._key(text), caption)
        return caption

    def _key(self, text: Text) -> str:
        return cache_key(text.formatted, text.layers, **self._inner.identity)
