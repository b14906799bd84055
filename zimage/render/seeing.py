"""From a reference picture to its caption: what a vision tower sees in it, read by a text stack.

    picture ─ sized, cut up ─→ patches ─ tower ─→ sight ─┐
    text round it ─ tokenizer ─→ ids ────────────────────┴ text stack ─→ hidden state ─→ its image tokens, or all

The text stack is the vision model's own (`full`), or the text encoder (`tower`). Each picture is seen once for every
way of reading it: captions are kept in the cache of those of prompts, by what they depend on. The vision model is let
go before anything else is loaded.

Shapes: L tokens of the text round a picture, N of its caption, C caption width.
"""

import hashlib
import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from zimage.errors import RequestError
from zimage.events import Event
from zimage.loading.files import ModelFiles
from zimage.loading.plan import MemoryPlan, Workload
from zimage.loading.registry import TEXT_ENCODER
from zimage.loading.residency import Residency
from zimage.loading.vision import WHERE, caption_width, config_of, mode_of, vision_of
from zimage.loading.weights import finite
from zimage.pictures.image import InputPicture
from zimage.settings.captions import HIDDEN_LAYER, MAX_TEXT_TOKENS, VISION_TOKENS, CaptionSettings
from zimage.settings.conditions import Reference
from zimage.text.blend import Seen, blend, blended_length
from zimage.text.cache import EmbeddingCache, cache_key
from zimage.text.chat import seen_text
from zimage.text.embeddings import Embeddings
from zimage.text.qwen3 import Qwen3
from zimage.text.sight import Grid, Sight
from zimage.text.vision_input import pixels_of

R = TypeVar("R")
MOST_PIXELS = 1 << 20  # of a picture as it is seen: 1024 tokens, more than a caption has room for
IMAGE = VISION_TOKENS[0]


class Look(NamedTuple):
    """How a picture is to be read."""

    text: str = ""
    layer: int = HIDDEN_LAYER
    tokens: str = IMAGE


@dataclass(frozen=True, eq=False)
class View:
    """A picture as it is to be seen, with all that its caption depends on besides weights; `key` names it."""

    picture: InputPicture
    look: Look
    ids: tuple[int, ...]  # of the text round it, with one token for each of the picture's
    grid: Grid  # of patches
    count: int  # tokens of its caption
    key: str


class Glimpse(NamedTuple):
    """A caption of a picture that is blended in: what it depends on, its tokens, and its share."""

    key: str
    tokens: int
    alpha: float


@dataclass(eq=False)
class Reading:
    """How far a view has come: it has a caption (N, C), or a sight that the text encoder has yet to read."""

    view: View
    caption: Tensor | None
    sight: Sight | None = None


class Vision:
    """The vision model of a pipeline. Raises RequestError for pictures and settings that cannot be used."""

    def __init__(self, model: ModelFiles, residency: Residency, cache: EmbeddingCache):
        component = vision_of(model)
        assert component is not None
        self._model, self._residency, self._cache, self._files = model, residency, cache, component
        self.component, self.mode, self._config = component.name, mode_of(component), config_of(component)
        self.halves = 2 if self.mode == "tower" else 1  # stages that a picture goes through
        limits = self._config.pixel_limits(component.checkpoint.origin)
        self.limits = replace(limits, max_pixels=max(min(limits.max_pixels, MOST_PIXELS), limits.min_pixels))

    @classmethod
    def of(cls, model: ModelFiles, residency: Residency, cache: EmbeddingCache) -> "Vision | None":
        """That of a model, if it has one."""
        return None if vision_of(model) is None else cls(model, residency, cache)

    @cached_property
    def fingerprint(self) -> str:
        """Files are read for it, so only once."""
        return self._files.checkpoint.fingerprint()

    def describe(self) -> dict[str, str]:
        """Plain values for a picture's metadata."""
        origin = self._files.checkpoint.origin.resolve()
        return {"name": origin.name, "fingerprint": self.fingerprint, "mode": self.mode}

    def view(self, picture: InputPicture, look: Look) -> View:
        """A picture that is to be seen so."""
        self._check_layer(look.layer)
        rows, columns = grid = self.limits.grid(*picture.picture.size)
        count = rows * columns // self.limits.merge_size**2
        if count > MAX_TEXT_TOKENS:  # before the text is made, which would take seconds and gigabytes
            told = (
                f"{count:,} tokens at the size that the vision model asks for; it may have at most {MAX_TEXT_TOKENS:,}"
            )
            raise RequestError(f"a reference picture has {told}", fields=("reference",))
        ids = tuple(self._model.tokenizer.encode(seen_text(look.text, [count])))
        if len(ids) > MAX_TEXT_TOKENS:
            text = f"has {len(ids):,} tokens with its picture; it may have at most {MAX_TEXT_TOKENS:,}"
            raise RequestError(f"vision_text {text}", fields=("vision_text",))
        if ids.count(self._config.image_token_id) != count:
            raise RequestError("vision_text: leave <|image_pad|> out of it", fields=("vision_text",))
        return View(
            picture, look, ids, grid, count if look.tokens == IMAGE else len(ids), self._key(picture, look, ids, grid)
        )

    def known(self, view: View) -> Tensor | None:
        """The caption (N, C) if it was read before, else None."""
        return self._cache.get(self._cache_key(view))

    def look(self, reading: Reading, plan: MemoryPlan) -> None:
        """With the vision model: a picture's caption, or in mode `tower` the sight that the text encoder is to read."""
        with self._residency.use(self.component, plan) as module, torch.no_grad():
            sight: Sight = module.look([pixels_of(reading.view.picture.picture, self.limits)])
            finite(sight.tokens, "the vision tower", module)
            if self.mode == "full":
                self._read(reading, sight, module.text, self.component)
            else:  # on the CPU, so that nothing stays on the device when the model is let go
                reading.sight = sight._replace(
                    tokens=sight.tokens.cpu(), deepstack=tuple(layer.cpu() for layer in sight.deepstack)
                )

    def read(self, reading: Reading, plan: MemoryPlan) -> None:
        """With the text encoder: the caption of what the tower has seen."""
        assert reading.sight is not None
        with self._residency.use(TEXT_ENCODER, plan) as encoder, torch.no_grad():
            self._read(reading, reading.sight, encoder, TEXT_ENCODER)

    def _read(self, reading: Reading, sight: Sight, stack: Qwen3, reader: str) -> None:
        view = reading.view
        ids = torch.tensor([view.ids], device=self._residency.places[reader].device)
        state = stack(ids, view.look.layer, sight=sight)[0]
        rows = state[sight.places(ids)[0]] if view.look.tokens == IMAGE else state
        reading.caption = finite(rows, "the text stack", stack)
        self._cache.put(self._cache_key(view), reading.caption)

    def _key(self, picture: InputPicture, look: Look, ids: tuple[int, ...], grid: Grid) -> str:
        """Weights do not tell the architecture: the layers of deepstack, say, stand beside them."""
        facts = [picture.hash, look, ids, grid, self.fingerprint, str(self._config), self._reader]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @cached_property
    def _reader(self) -> str:
        """The fingerprint of the text encoder where that reads."""
        return self._model.components[TEXT_ENCODER].checkpoint.fingerprint() if self.mode == "tower" else ""

    def _cache_key(self, view: View) -> str:
        return cache_key(view.key, view.look.layer, **self._identity)

    @cached_property
    def _identity(self) -> Mapping[str, str]:
        """What the bits depend on besides the view: as of a prompt's caption, and where each half computes."""
        names = [self.component] + [TEXT_ENCODER] * (self.mode == "tower")
        files = [self._model.components[name].checkpoint.stamp() for name in names]
        places = [self._residency.places[name] for name in names]
        return {
            "encoder": self.fingerprint,
            "dtype": str(places[-1].dtype),
            "files": " ".join(files),
            "device": " ".join(place.device.type for place in places),
            "attention": self._residency.attention,
        }

    def _check_layer(self, layer: int) -> None:
        stack = self._config.text or self._model.config(TEXT_ENCODER)
        if layer < -(states := stack.num_hidden_layers + 1):
            raise RequestError(f"vision_layer {layer} does not exist; use −{states} to −1", fields=("vision_layer",))


# ------------------------------------------------------------------ its two halves, as generators of events


class Stages(Protocol):
    """What runs stages by a plan: `stages.Components`."""

    plan: MemoryPlan

    @property
    def model(self) -> ModelFiles: ...
    def stage(self, name: str, events: Generator[Event, None, R]) -> Generator[Event, None, R]: ...


def look(components: Stages, vision: Vision, views: Sequence[View]) -> Generator[Event, None, list[Reading]]:
    """The vision model's stage: the captions of pictures, or what the text encoder has yet to `read`.

    The model is loaded only for pictures that are not known already.
    """
    readings = [Reading(view, vision.known(view)) for view in views]
    yield from components.stage(vision.component if unread(readings) else "", _look(components, vision, readings))
    return readings


def _look(components: Stages, vision: Vision, readings: Sequence[Reading]) -> Generator[Event, None, None]:
    for i, reading in enumerate(readings):
        yield Event("see", 0, vision.halves, i, len(readings))
        if reading.caption is None:
            vision.look(reading, components.plan)
        yield Event("see", 1 if reading.sight else vision.halves, vision.halves, i, len(readings))


def read(components: Stages, vision: Vision, readings: Sequence[Reading]) -> Generator[Event, None, dict[str, Tensor]]:
    """The captions of all, by the keys of their views; in the text encoder's stage where one is `unread`."""
    captions = {}
    for i, reading in enumerate(readings):
        if reading.sight:
            vision.read(reading, components.plan)
            yield Event("see", vision.halves, vision.halves, i, len(readings))
        assert reading.caption is not None
        captions[reading.view.key] = reading.caption
    return captions


def unread(readings: Sequence[Reading]) -> bool:
    """Whether some have no caption yet."""
    return any(reading.caption is None for reading in readings)


def see(components: Stages, vision: Vision, view: View) -> Generator[Event, None, Tensor]:
    """Both halves for one picture: its caption (N, C)."""
    readings = yield from look(components, vision, [view])
    reader = TEXT_ENCODER if unread(readings) else ""
    captions = yield from components.stage(reader, read(components, vision, readings))
    return captions[view.key]


# ------------------------------------------------------------------ the references of a request

Found = tuple[View | Embeddings, float]  # what a reference is, and its share


def references(
    opened: Iterable[Reference] | None, settings: CaptionSettings, model: ModelFiles, vision: Vision | None
) -> list[Found]:
    """What the opened references are that have a share. Raises RequestError where one cannot be seen."""
    look = Look(settings.vision_text, settings.vision_layer, settings.vision_tokens)
    return [(_seen_as(one.picture, look, model, vision), one.alpha) for one in opened or [] if one.alpha > 0]


def _seen_as(
    picture: InputPicture | Embeddings, look: Look, model: ModelFiles, vision: Vision | None
) -> View | Embeddings:
    if not isinstance(picture, Embeddings):
        return needed(vision).view(picture, look)
    if (found := picture.caption.shape[1]) != (width := caption_width(model)):
        text = f"reference: the caption in {picture.name} is {found} wide; this model takes {width}"
        raise RequestError(text, fields=("reference",))
    return picture


def needed(vision: Vision | None) -> Vision:
    """Raises RequestError where there is none."""
    if vision is None:
        text = f"reference: nothing here sees pictures; pass {WHERE} as vision_model, or a file that `see` saved"
        raise RequestError(text, fields=("reference", "vision_model"))
    return vision


def views_of(found: Sequence[Found]) -> list[View]:
    """The pictures among references, each once."""
    return list({one.key: one for one, _ in found if isinstance(one, View)}.values())


def glimpses(found: Sequence[Found]) -> tuple[Glimpse, ...]:
    """What a job remembers of its references."""
    return tuple(
        Glimpse(one.hash, len(one.caption), alpha)
        if isinstance(one, Embeddings)
        else Glimpse(one.key, one.count, alpha)
        for one, alpha in found
    )


def with_references(
    work: Workload, settings: CaptionSettings, found: Sequence[Found], lengths: Sequence[int], limit: int
) -> Workload:
    """A workload with what references add to it: pictures to see, and longer captions than the prompts' `lengths`."""
    if not found:
        return work
    views, pictures = views_of(found), [(one.tokens, one.alpha) for one in glimpses(found)]
    longest = max(length if settings.long_prompt == "none" else min(length, limit) for length in lengths)
    blended = blended_length(settings.vision_blend, longest, pictures, limit)
    return replace(
        work,
        tokens=max(work.tokens, blended),
        vision_patches=max((math.prod(view.grid) for view in views), default=0),
        vision_tokens=max((len(view.ids) for view in views), default=0),
    )


def mixed(
    caption: Tensor, settings: CaptionSettings, found: Sequence[Found], captions: Mapping[str, Tensor], limit: int
) -> Tensor:
    """A prompt's caption (L, C) with those of the references, by the keys of their views.

    On the CPU, so that the bits are the same whether a caption comes from the cache or from where it was computed.
    """
    pictures = [
        Seen(one.caption if isinstance(one, Embeddings) else captions[one.key].cpu(), alpha) for one, alpha in found
    ]
    return blend(caption.cpu(), pictures, settings.vision_blend, limit) if pictures else caption
