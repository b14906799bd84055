"""The half of a pipeline that needs no pixels: texts, their tokens and captions, and the rewriting of prompts.

    prompts ─ template, chat parts, tokenizer ─→ texts ─ encoder, with a cache in front ─→ captions

`ZImage` is one that also draws. By itself it needs the text encoder and the tokenizer of a model, and nothing else of
its files: a server that encodes for other machines is made of it.
"""

import logging
import math
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from zimage.errors import RequestError
from zimage.loading.devices import Place, choose_places
from zimage.loading.files import ModelFiles, open_model
from zimage.loading.memory import out_of_memory_in
from zimage.loading.plan import MemoryPlan, Workload
from zimage.loading.planner import Planner
from zimage.loading.registry import DIT, ROWS, TEXT_ENCODER, VAE
from zimage.loading.residency import Residency
from zimage.loading.vision import with_vision
from zimage.render.attached import open_picture, opened_references
from zimage.render.components import Components
from zimage.render.conditioning import CachedEncoder, Encoder, Identified, LocalEncoder, Text, Texts, TokenCount
from zimage.render.remote_encoder import RemoteEncoder
from zimage.render.rewriting import Rewrite, Rewriter
from zimage.render.seeing import Look, View, Vision, glimpses, mixed, needed, references, see, views_of
from zimage.settings.captions import HIDDEN_LAYER, VISION_TOKENS, CaptionSettings, TextSettings
from zimage.settings.declared import SIZE_MULTIPLE
from zimage.settings.environment import from_environment
from zimage.settings.loading import LoadSettings
from zimage.settings.paths import user_path
from zimage.settings.rewriting import RewriteSettings
from zimage.text.blend import describe_blend
from zimage.text.cache import EmbeddingCache
from zimage.text.templates import user_folder
from zimage.weights import DEMO

log = logging.getLogger("zimage")
R = TypeVar("R")


class Captioner:
    """Encodes and rewrites prompts, here or on another machine. May be used from several threads at once."""

    def __init__(
        self,
        model: ModelFiles,
        places: Mapping[str, Place],
        settings: LoadSettings,
        remote: RemoteEncoder | None = None,
    ):
        """`remote` takes the place of the model's own text encoder, which then has no place here."""
        self.model, self.places, self.settings = model, places, settings
        self.planner = Planner(model, places, settings)
        self.residency = Residency(model, places, settings, self.planner.sizes)
        self.texts = Texts(model, user_path(settings.templates, "templates") if settings.templates else user_folder())
        self.captions_from: Identified = remote or LocalEncoder(model, self.residency)
        self.cache = EmbeddingCache(settings.cache_entries, _cache_folder(settings, remote))
        self.encoder: Encoder = CachedEncoder(self.captions_from, self.cache)
        self.vision = Vision.of(model, self.residency, self.cache)
        self.rewriter = Rewriter(model.tokenizer, self.residency, self.texts, self.planner, remote)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        **settings: Any,
    ) -> "Captioner":
        """Open the text encoder of a model folder, an all-in-one file or a loose file; without `path`, the demo's.

        The arguments are those of `ZImage.load`. DiT and VAE may be absent. Raises CheckpointError or RequestError.
        """
        checked = checked_settings(device, settings)
        if checked.encoder_url:
            text = "encoder_url: what only encodes needs a text encoder of its own; leave it out"
            raise RequestError(text, fields=("encoder_url",))
        model = with_vision(open_model(path, checked, default=DEMO, elsewhere=(DIT, VAE)), checked)
        here = [name for name in model.components if name not in (DIT, VAE)]
        return cls(model, choose_places(here, checked, dtype), checked)

    @property
    def is_demo(self) -> bool:
        """Whether this is the small model that comes along."""
        return self.model.origin == DEMO

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the components that are in memory now."""
        return self.residency.loaded

    def release(self, *names: str) -> None:
        """Let go of loaded components (all, when none is named); they load again when next used."""
        self.residency.release(*names)

    def tokenize(self, prompt: str, **text: Any) -> list[int]:
        """Token ids of the formatted prompt. Keywords are the fields of TextSettings."""
        return list(self.texts.tokenize(self.texts.parts(TextSettings.from_mapping(text)).format(prompt)))

    def count_tokens(self, prompt: str, **text: Any) -> TokenCount:
        """How long a prompt is and what will become of it. Keywords are the fields of TextSettings."""
        return self.texts.count(prompt, TextSettings.from_mapping(text))

    def encode(self, prompts: str | Sequence[str], **settings: Any) -> list[Tensor]:
        """Caption embeddings (L, caption width), real tokens only, one tensor per prompt; each prompt runs alone.

        Keywords are the fields of CaptionSettings: chat parts, template, layers, long_prompt, references. Raises
        RequestError, and RemoteError where another machine encodes.
        """
        given = CaptionSettings.from_mapping(settings)
        parts = self.texts.parts(given)
        found = references(opened_references(given.reference), given, self.model, self.vision)
        weighed = [parts.weigh(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        marks = [self.texts.emphases(one) for one in weighed]
        every = [*(one.text for one in weighed), *(mark.without for several in marks for mark in several)]
        ids = {text: self.texts.tokenize(text) for text in every}
        self.texts.warn_of_length(max(map(len, ids.values()), default=0), given.long_prompt)
        seen = {view.key: self._seen(view) for view in views_of(found)}
        whole = {text: self.caption(Text(text, tokens, given.layers)) for text, tokens in ids.items()}
        captions = [
            self.texts.finished(one.text, several, whole, ids, given.long_prompt)
            for one, several in zip(weighed, marks, strict=True)
        ]
        if not found:
            return captions
        return [self._here(mixed(caption, given, found, seen, self.texts.limit)) for caption in captions]

    def describe_references(self, settings: CaptionSettings, tokens: int) -> str:
        """One line on how the captions of opened references are mixed with one of so many tokens; empty without any."""
        found = glimpses(references(settings.reference, settings, self.model, self.vision))
        shown = tokens if settings.long_prompt == "none" else min(tokens, self.texts.limit)
        return describe_blend(settings.vision_blend, shown, [one[1:] for one in found], self.texts.limit)

    def caption(self, text: Text) -> Tensor:
        """The caption (L, caption width) of a text, all its tokens, where the text encoder is; from elsewhere, here."""
        caption = self.encoder.known(text)
        if caption is None:
            with out_of_memory_in(ROWS[TEXT_ENCODER].title):
                caption = self.encoder.encode(text, self._plan(_work(len(text.ids))))
        return self._here(caption)

    def see(self, picture: Any, text: str = "", layer: int = HIDDEN_LAYER, tokens: str = VISION_TOKENS[0]) -> Tensor:
        """The caption (L, caption width) of a picture, as a `reference` is mixed with a prompt's; needs a vision model.

        `picture` is a path or a PIL picture, `tokens` is "image" (those of the picture alone) or "all", which have the
        `text` behind it, too. Raises RequestError.
        """
        for name, value in {"vision_text": text, "vision_layer": layer, "vision_tokens": tokens}.items():
            CaptionSettings.check_one(name, value)
        return self._seen(needed(self.vision).view(open_picture(picture), Look(text, layer, tokens)))

    def _seen(self, view: View) -> Tensor:
        vision = needed(self.vision)
        plan = self._plan(_work(0, vision_patches=math.prod(view.grid), vision_tokens=len(view.ids)))
        if vision.known(view) is None:
            instead = "more memory" + (" or vision_mode tower" if vision.mode == "full" else "")
            self.planner.check_stage(plan, vision.component, "seeing a picture", instead, ("memory", "vision_mode"))
        return self._here(exhausted(see(Components(self.residency, plan), vision, view)))

    def rewrite(self, prompt: str, **settings: Any) -> Rewrite:
        """A fuller prompt, written by the text encoder's own weights or by a server; to be encoded like any other.

        Keywords are the fields of RewriteSettings. Raises RequestError, RemoteError, or RewriteError where no prompt
        came of it. To see it written, iterate over `rewriter.pieces`.
        """
        return exhausted(self.rewriter.pieces(prompt, RewriteSettings.from_mapping(settings)))

    def _here(self, caption: Tensor) -> Tensor:
        return caption.to(self.places[TEXT_ENCODER].device) if TEXT_ENCODER in self.places else caption

    def _plan(self, work: Workload) -> MemoryPlan:
        return self.planner.plan(work, self.residency.copies)


def _work(tokens: int, **vision: int) -> Workload:
    """That of encoding or seeing alone."""
    return Workload(SIZE_MULTIPLE, SIZE_MULTIPLE, tokens, tile_mode="off", **vision)


def checked_settings(device: str, settings: Mapping[str, Any]) -> LoadSettings:
    """LoadSettings of keywords, over those of the environment (but ZIMAGE_MODEL, which is the command line's)."""
    plain = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in settings.items()}
    given = {name: value for name, value in plain.items() if value is not None}
    variables = {name: value for name, value in from_environment(LoadSettings).items() if name != "model"}
    return LoadSettings.from_mapping({**variables, "device": device, **given})


def exhausted(pieces: Generator[Any, None, R]) -> R:
    """What a generator returns in the end."""
    while True:
        try:
            next(pieces)
        except StopIteration as finished:
            result: R = finished.value
            return result


def _cache_folder(settings: LoadSettings, remote: RemoteEncoder | None) -> Path | None:
    """Where captions are kept between runs: not those of an encoder that may be another one in the next run."""
    if not settings.cache_folder:
        return None
    if remote is None or remote.is_verified:
        return user_path(settings.cache_folder, "cache_folder")
    log.warning("captions are kept in memory only: which text encoder the server holds is not known beforehand")
    return None
