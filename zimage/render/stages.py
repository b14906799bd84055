"""One request as a generator of events: encode → start → denoise → decode, each stage with its part loaded once.

What an earlier run of the same request has done, its state, is not done again, and the bits are the same.

Shapes: B images, L caption tokens, h × w latents.
"""

from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from zimage import flow
from zimage.events import Event
from zimage.loading.weights import finite
from zimage.pictures.image import fit, from_pil, mask_tensor, to_pil
from zimage.render.defaults import first_pass
from zimage.render.state import RenderState
from zimage.settings.declared import Request


class Conditions(NamedTuple):
    """The captions (L, C) of the prompts, and of the negative prompt where there is guidance."""

    prompts: list[Tensor]
    negative: Tensor | None


class Render:
    """`pipe` is the pipeline whose stages run; `request` is resolved."""

    def __init__(self, pipe: Any, request: Request, state: RenderState):
        self.pipe, self.request = pipe, request
        self.state = state.snapshot()  # the consumer goes on with its own

    def events(self) -> Iterator[Event]:
        """The whole render. Closing the generator cancels it."""
        request, state = self.request, self.state
        second = request.hires is None or bool(state.small)  # whether the state is one of the last pass
        latents = state.finished if second else []
        if len(latents) < request.count:
            conditions = yield from self._encode()
            clean = yield from self._clean(conditions)
            events = self._denoise(request, conditions, clean, state if second else RenderState())
            latents = yield from self.pipe.parts.stage("dit", events)
        yield from self.pipe.parts.stage("vae", self._decode(latents))

    # ------------------------------------------------------------------ captions

    def _encode(self) -> Generator[Event, None, Conditions]:
        """Each distinct text once. The text encoder is loaded only for texts that are not in the cache."""
        request, captions = self.request, self.pipe.captions
        prompts, negatives = captions.texts(request)
        kept = {text: captions.kept(text, request) for text in [*prompts, *negatives]}
        missing = any(caption is None for caption in kept.values())
        events = self._encode_texts(kept)
        found = yield from self.pipe.parts.stage("text_encoder", events) if missing else events
        given = [] if request.embeddings is None else [captions.shorten(request.embeddings.caption, request)]
        return Conditions(given + [found[text] for text in prompts], found[negatives[0]] if negatives else None)

    def _encode_texts(self, kept: dict[str, Tensor | None]) -> Generator[Event, None, dict[str, Tensor]]:
        captions, found = self.pipe.captions, {}
        for i, text in enumerate(kept):
            yield Event("encode", 0, 1, i, len(kept))
            with torch.no_grad():
                found[text] = captions.caption(text, self.request, kept[text])
            yield Event("encode", 1, 1, i, len(kept))
        return found

    # ------------------------------------------------------------------ what denoising starts from

    def _clean(self, conditions: Conditions) -> Generator[Event, None, list[Tensor] | None]:
        """The latents (1, 16, h, w) that each image starts from, where it does not start from noise alone."""
        request, stage = self.request, self.pipe.parts.stage
        if request.image is not None:
            picture = from_pil(fit(request.image.picture, request.width, request.height))
            (clean,) = yield from stage("vae", self._encode_pictures("encode image", [picture], 1))
            return [clean] * request.count
        if request.hires is None:
            return None
        small = self.state.small
        if not small:
            small = yield from stage("dit", self._denoise(first_pass(request), conditions, None, self.state))
        enlarged = map(self._enlarged, small)
        return (yield from stage("vae", self._encode_pictures("enlarge", enlarged, request.count)))

    def _enlarged(self, latents: Tensor) -> Tensor:
        """The picture (1, 3, H, W) of small latents at the request's size."""
        return from_pil(fit(to_pil(self.pipe.decode(latents))[0], self.request.width, self.request.height))

    def _encode_pictures(
        self, stage: str, pictures: Iterable[Tensor], count: int
    ) -> Generator[Event, None, list[Tensor]]:
        """Latents (1, 16, h, w) of each picture (1, 3, H, W)."""
        vae, device = self.pipe.vae, self.pipe.places["vae"].device
        tiles = {name: getattr(self.request, name) for name in ("tile_size", "tile_overlap", "tile_mode")}
        clean, remaining = [], iter(pictures)
        for i in range(count):
            yield Event(stage, 0, 1, i, count)
            with torch.no_grad():
                clean.append(finite(vae.encode(next(remaining).to(device), **tiles), "the VAE", vae))
            yield Event(stage, 1, 1, i, count)
        return clean

    # ------------------------------------------------------------------ denoising, decoding

    def _denoise(
        self, request: Request, conditions: Conditions, clean: list[Tensor] | None, state: RenderState
    ) -> Generator[Event, None, list[Tensor]]:
        """Returns the finished latents (1, 16, h, w) of every image of a pass; goes on from its state."""
        finished = list(state.finished)
        for first in range(len(finished), request.count, request.batch_size):
            batch = range(first, min(first + request.batch_size, request.count))
            start, done = self._start(request, batch, clean), 0
            total = request.steps - start.step
            if first == len(state.finished) and state.latents is not None:
                done = state.step
                start = start._replace(latents=state.latents, step=start.step + done)
            positive = [conditions.prompts[i // request.images] for i in batch]
            negative = [conditions.negative] * len(batch)
            yield Event("denoise", done, total, first, request.count)
            for step, latents in enumerate(self.pipe.denoise_steps(positive, negative, start, request), done + 1):
                yield Event("denoise", step, total, first, request.count, latents=latents)
            finished += latents.split(1)
        return finished

    def _start(self, request: Request, batch: range, clean: list[Tensor] | None) -> flow.Start:
        """The noise (B, 16, h, w) of some images, each from its own seed, and what it is mixed with."""
        factor = self.pipe.model.skeleton("vae").spatial_factor
        channels = self.pipe.model.skeleton("dit").config.in_channels
        h, w = request.height // factor, request.width // factor
        noise = torch.cat([flow.start_noise(request.seeds[i], channels, h, w) for i in batch])
        sigmas = flow.sigmas(request.steps, request.shift)
        if clean is None:
            return flow.start(noise, sigmas)
        begin = torch.cat([clean[i] for i in batch]).cpu()
        return flow.start(noise, sigmas, request.strength, begin, self._latent_mask(h, w))

    def _latent_mask(self, h: int, w: int) -> Tensor | None:
        """(1, 1, h, w): 1 where the picture is painted anew. A mask of another size is stretched over the image."""
        request = self.request
        if request.mask is None:
            return None
        mask = request.mask.picture.resize(request.image.picture.size, Image.Resampling.LANCZOS)
        return flow.latent_mask(mask_tensor(mask, request.width, request.height), h, w)

    def _decode(self, latents: list[Tensor]) -> Iterator[Event]:
        request = self.request
        for i in range(self.state.decoded, len(latents)):
            yield Event("decode", 0, 1, i, len(latents))
            decoded = self.pipe.decode(latents[i], request.tile_size, request.tile_overlap, request.tile_mode)
            yield Event("decode", 1, 1, i, len(latents), image=to_pil(decoded)[0])
