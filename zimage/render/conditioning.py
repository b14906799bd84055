"""From a prompt to its caption: template, chat format, tokens, the text encoder's layers, and what is kept of them.

    prompt ─ template, chat parts ─→ text ─ tokenizer ─→ ids ─ text encoder ─→ layers ─ blend, cache, shorten ─→ caption

Shapes: L tokens, C caption width.
"""

import dataclasses
import logging
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from zimage.errors import RequestError
from zimage.loading.files import Model
from zimage.loading.residency import Parts
from zimage.loading.weights import finite
from zimage.settings.declared import LoadSettings, Request, TextSettings
from zimage.settings.fields import Weights, either
from zimage.text.cache import EmbeddingCache, cache_key
from zimage.text.chat import format_chat
from zimage.text.compress import compress, describe
from zimage.text.templates import Template, Templates, user_folder

log = logging.getLogger("zimage")
T = TypeVar("T", bound=TextSettings)


class TokenCount(NamedTuple):
    """Tokens of a formatted prompt, the most that the model was trained for, and what will become of them."""

    tokens: int
    limit: int
    outcome: str


class Captions:
    """What a pipeline knows of text. `cache` and `templates` are the user's to look at."""

    def __init__(self, model: Model, parts: Parts, settings: LoadSettings):
        self._model, self._parts = model, parts
        self._folder = Path(settings.templates).expanduser() if settings.templates else user_folder()
        folder = Path(settings.cache_folder).expanduser() if settings.cache_folder else None
        self.cache = EmbeddingCache(settings.cache_entries, folder)
        self.limit: int = model.skeleton("dit").config.max_caption_tokens

    @cached_property
    def templates(self) -> Templates:
        """The shipped templates and the user's own."""
        return Templates.open(self._folder)

    def filled(self, text: T) -> T:
        """The settings with every part that the template has and they leave open. Raises RequestError."""
        self._check_layers(text.layers)
        template = self.templates.get(text.template) if text.template else Template("", "", "")
        thinking = either(text.thinking_content, template.thinking_content)
        block = text.force_think_block
        if block is None:
            block = bool(thinking or template.add_think_block)
        return dataclasses.replace(
            text,
            system_prompt=either(text.system_prompt, template.system_prompt or None),
            thinking_content=thinking if block else None,
            assistant_content=either(text.assistant_content, template.assistant_content),
            force_think_block=block,
        )

    def format(self, prompt: str, text: TextSettings) -> str:
        """What the text encoder reads, by settings that are filled in."""
        parts = (prompt, text.system_prompt, text.thinking_content, text.assistant_content)
        if text.strip_quotes:
            parts = tuple(part and part.replace('"', "") for part in parts)
        return format_chat(*parts, think_block=bool(text.force_think_block))

    def texts(self, request: Request) -> tuple[list[str], list[str]]:
        """What the text encoder reads for the prompts of a resolved request, and for its negative, if it has one.

        A negative prompt takes no parts: what it has in common with the prompt, guidance would cancel.
        """
        prompts = [] if request.embeddings is not None else request.prompts
        plain = TextSettings(strip_quotes=request.strip_quotes)
        negatives = [self.format(request.negative, plain)] if request.guidance > 0 else []
        return [self.format(prompt, request) for prompt in prompts], negatives

    def longest(self, request: Request) -> int:
        """Tokens of the longest text of a resolved request, at least of an empty prompt."""
        prompts, negatives = self.texts(request)
        lengths = [len(self.tokenize(text)) for text in [*prompts, *negatives]]
        return max([*lengths, len(request.embeddings.caption) if request.embeddings is not None else 0])

    def tokenize(self, formatted: str) -> list[int]:
        return self._model.tokenizer.encode(formatted)

    def count(self, prompt: str, text: TextSettings) -> TokenCount:
        """Tokens of a prompt and what `long_prompt` will do to them; by settings that are filled in."""
        tokens = len(self.tokenize(self.format(prompt, text)))
        return TokenCount(tokens, self.limit, describe(tokens, self.limit, text.long_prompt))

    def kept(self, formatted: str, text: TextSettings) -> Tensor | None:
        """The caption (L, C) of a text that was encoded before, all its tokens, or None."""
        return self.cache.get(self._key(formatted, text.layers))

    def caption(self, formatted: str, text: TextSettings, kept: Tensor | None) -> Tensor:
        """The caption (L, C) of a text, from what was `kept` of it or encoded now, shortened as the settings say."""
        return self.shorten(self.encode(formatted, text) if kept is None else kept, text)

    def encode(self, formatted: str, text: TextSettings) -> Tensor:
        """The caption (L, C) of a text, all its tokens: encoded now, and kept."""
        encoder, device = self._parts.get("text_encoder"), self._parts.places["text_encoder"].device
        ids = torch.tensor([self.tokenize(formatted)], device=device)
        caption = finite(encoder.blend(ids, text.layers)[0], "the text encoder", encoder)
        self.cache.put(self._key(formatted, text.layers), caption)
        return caption

    def shorten(self, caption: Tensor, text: TextSettings) -> Tensor:
        """The caption as `long_prompt` wants it; warns where it stays longer than the model was trained for."""
        if len(caption) > self.limit and text.long_prompt == "none":
            log.warning("the prompt has %d tokens; the model was trained for at most %d", len(caption), self.limit)
        return compress(caption, self.limit, text.long_prompt).to(self._parts.places["text_encoder"].device)

    def _key(self, formatted: str, layers: Weights) -> str:
        """All that the bits of a caption depend on."""
        place, (fingerprint, stamp) = self._parts.places["text_encoder"], self._encoder
        more = {"files": stamp, "device": place.device.type, "attention": self._parts.attention}
        return cache_key(formatted, layers, fingerprint, place.dtype, **more)

    @cached_property
    def _encoder(self) -> tuple[str, str]:
        """What tells the text encoder from others; its files are read for it, so only once."""
        checkpoint = self._model.components["text_encoder"].checkpoint
        return checkpoint.fingerprint(), checkpoint.stamp()

    def _check_layers(self, layers: Weights) -> None:
        states = self._model.skeleton("text_encoder").config.num_hidden_layers + 1
        for layer in layers:
            if layer < -states:
                raise RequestError(f"hidden layer {layer} does not exist; use −{states} to −1")
