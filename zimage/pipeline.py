"""The whole path from prompt to picture, and the only file that sees every stage.

    prompts ─ encode ─→ captions ─ refine ─→ contexts ──────┐
    seeds   ─ start noise ─┬─→ latents ─────────────────────┴─ denoise ─→ latents ─ decode ─→ pictures
    picture ─ VAE encode ──┘  (only where there is one to start from)

`ZImage.run` is a generator of events: progress, previews, profiling, cancelling and keeping the state of a long render
are things its consumer does. Weights move between yields only. All prompts are encoded, then all images denoised, then
all decoded, so that each stage is loaded once per request and, where memory is short, let go before the next.

Shapes: B images, L caption tokens, h × w = H/8 × W/8 latents.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage import flow
from zimage.dit import ZImageDiT
from zimage.errors import RequestError
from zimage.events import Event, Result
from zimage.loading.devices import Place, choose_places, device_names
from zimage.loading.files import Model, load_component, open_model
from zimage.loading.memory import out_of_memory_in
from zimage.loading.plan import Schedule
from zimage.loading.planner import MemoryPlan
from zimage.loading.residency import Parts
from zimage.loading.weights import finite
from zimage.render.conditioning import Captions, TokenCount
from zimage.render.defaults import complete, find_shift
from zimage.render.rewriting import Rewrite, Rewriter
from zimage.render.stages import Render
from zimage.render.state import RenderState
from zimage.settings.declared import SIZE_MULTIPLE, STRENGTH, LoadSettings, Request, RewriteSettings, TextSettings
from zimage.text import Qwen3
from zimage.version import __version__
from zimage.weights import DEMO

__all__ = ["Event", "Result", "ZImage", "load_component"]

log = logging.getLogger("zimage")


class ZImage:
    """A model, loaded when it is first needed. May be used from several threads at once."""

    def __init__(self, model: Model, places: dict[str, Place], settings: LoadSettings):
        self.model, self.places, self.settings = model, places, settings
        self.device, self.dtype = places["dit"]
        self.plan = MemoryPlan(model, places, settings)
        attention = settings.attention or os.environ.get("ZIMAGE_ATTENTION", "auto")
        self.parts = Parts(model, places, settings, self.plan, attention, self._usual_schedule)
        self.captions = Captions(model, self.parts, settings)
        self.lora = self.parts.lora
        self.rewriter = Rewriter(model, self.parts, self.captions, self.plan)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        **settings: Any,
    ) -> "ZImage":
        """Open a model folder in the published layout or an all-in-one file; without `path`, the bundled demo model.

        Everything is checked here (configs, keys, shapes, tokenizer), weights are read when a stage first runs.
        Further keywords are the fields of LoadSettings, which says what each does: loose files (dit, text_encoder,
        vae, tokenizer, variant), devices of single parts, attention, precision, compile, memory, residency, lora.
        `device` and `dtype` of the pipeline are the DiT's. Raises CheckpointError or RequestError.
        """
        plain = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in settings.items()}
        checked = LoadSettings.from_mapping({"device": device, **plain})
        places = choose_places(checked, dtype)
        return cls(open_model(path, checked, default=DEMO), places, checked)

    # ------------------------------------------------------------------ parts

    @property
    def is_demo(self) -> bool:
        """Whether this is the small model that comes along."""
        return self.model.origin == DEMO

    @property
    def text_encoder(self) -> Qwen3:
        return self.parts.get("text_encoder")

    @property
    def dit(self) -> ZImageDiT:
        return self.parts.get("dit")

    @property
    def vae(self) -> Any:
        """AutoencoderKL or AutoencoderKLWan."""
        return self.parts.get("vae")

    def release(self, *names: str) -> None:
        """Let go of loaded parts (all, when none is named); they load again when next used."""
        self.parts.release(*names)

    # ------------------------------------------------------------------ stages

    def tokenize(self, prompt: str, **text: Any) -> list[int]:
        """Token ids of the formatted prompt. Keywords are the fields of TextSettings."""
        return self.captions.tokenize(self.captions.format(prompt, self._text(text)))

    def count_tokens(self, prompt: str, **text: Any) -> TokenCount:
        """How long a prompt is and what will become of it. Keywords are the fields of TextSettings."""
        return self.captions.count(prompt, self._text(text))

    @out_of_memory_in("text_encoder")
    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str], **text: Any) -> list[Tensor]:
        """Caption embeddings (L, caption width), real tokens only, one tensor per prompt; each prompt runs alone.

        Keywords are the fields of TextSettings: chat parts, template, layers, long_prompt. Raises RequestError.
        """
        settings = self._text(text)
        texts = [self.captions.format(p, settings) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        return [self.captions.caption(text, settings, self.captions.kept(text, settings)) for text in texts]

    def rewrite(self, prompt: str, **settings: Any) -> Rewrite:
        """A fuller prompt, written by the text encoder's own weights or by a server; to be encoded like any other.

        Keywords are the fields of RewriteSettings. Raises RequestError, RemoteError, or RewriteError where no prompt
        came of it. To see it written, iterate over `rewriter.pieces`.
        """
        pieces = self.rewriter.pieces(prompt, RewriteSettings.from_mapping(settings))
        while True:
            try:
                next(pieces)
            except StopIteration as finished:
                return finished.value

    def _text(self, text: dict[str, Any]) -> TextSettings:
        return self.captions.filled(TextSettings.from_mapping(text))

    @out_of_memory_in("dit")
    def denoise(
        self,
        captions: Sequence[Tensor],
        noise: Tensor,
        steps: int = 8,
        shift: float | None = None,
        guidance: float = 0.0,
        negative: Sequence[Tensor] | None = None,
        cfg_truncation: float = 1.0,
        cfg_normalization: float = 0.0,
        clean: Tensor | None = None,
        strength: float = STRENGTH,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, 16, h, w) fp32 of noise (B, 16, h, w) and B captions (L, caption width), all in one batch.

        `negative` captions count when guidance > 0; without them it is the empty prompt. `clean` latents (B, 16, h, w),
        as `vae.encode` gives them, are where an image-to-image run starts, at `strength`; where the `mask` (1, 1, h, w)
        is 0 they stay. Raises RequestError.
        """
        if noise.ndim != 4 or len(captions) != len(noise):
            raise RequestError(f"noise {tuple(noise.shape)} should be (B, 16, h, w) for {len(captions)} captions")
        request = Request(
            steps=steps,
            shift=find_shift(self.model, shift),
            guidance=guidance,
            cfg_truncation=cfg_truncation,
            cfg_normalization=cfg_normalization,
        )
        if guidance > 0 and negative is None:
            negative = self.encode([""]) * len(captions)
        start = flow.start(noise, flow.sigmas(steps, request.shift), strength, clean, mask)
        *_, latents = self.denoise_steps(captions, negative, start, request)
        return latents

    @out_of_memory_in("vae")
    @torch.no_grad()
    def decode(
        self, latents: Tensor, tile_size: int | None = None, tile_overlap: int = 64, tile_mode: str | None = None
    ) -> Tensor:
        """Images (B, 3, H, W) fp32, clamped to [−1, 1], of latents (B, 16, h, w); each image runs alone.

        `tile_mode` "exact" gives the same picture strip by strip, "blend" a similar one of overlapping tiles; without
        it, strips are used where the whole does not fit in memory. Sizes in pixels; raises RequestError.
        """
        vae, device = self.vae, self.places["vae"].device
        height, width = (side * vae.spatial_factor for side in latents.shape[-2:])
        mode = tile_mode or self.plan.tile_mode(width, height, list(self.parts.loaded))
        images = [vae.decode(sample[None].to(device), tile_size, tile_overlap, mode) for sample in latents]
        return finite(torch.cat(images), "the VAE", vae)

    def denoise_steps(
        self, captions: Sequence[Tensor], negative: Sequence[Tensor] | None, start: flow.Start, request: Request
    ) -> Iterator[Tensor]:
        """Yield the latents (B, 16, h, w) fp32 after each Euler step."""
        dit = self.dit
        sigmas = flow.sigmas(request.steps, request.shift)
        start = start.to(self.device)
        with torch.no_grad():
            modulation = dit.modulate(sigmas[:-1])
            positive_context = dit.context(dit.refine(self._at_dit(captions)), *start.noise.shape[-2:])
            if request.guidance > 0:
                negative_context = dit.context(dit.refine(self._at_dit(negative)), *start.noise.shape[-2:])
        latents = start.latents
        for i in range(start.step, request.steps):
            with torch.no_grad():
                now = modulation.step(i)
                velocity = dit.velocity(latents, now, positive_context)
                scale = flow.guidance_at(sigmas[i], request.guidance, request.cfg_truncation)
                if scale > 0:
                    opposite = dit.velocity(latents, now, negative_context)
                    velocity = flow.guide(velocity, opposite, scale, request.cfg_normalization)
                latents = flow.euler_step(latents, velocity, sigmas[i], sigmas[i + 1])
                if start.mask is not None:
                    latents = flow.keep_outside(latents, start.clean, start.noise, start.mask, sigmas[i + 1])
            if i in (start.step, request.steps - 1):  # each look is a device sync; a bad weight shows at once
                finite(latents, "the DiT", dit)
            yield latents

    def _at_dit(self, captions: Sequence[Tensor]) -> list[Tensor]:
        """Captions come from where the text encoder runs."""
        return [caption.to(self.device, self.dtype) for caption in captions]

    # ------------------------------------------------------------------ whole renders

    def generate(self, prompt: str | list[str] | None = None, **settings: Any) -> Result:
        """Render to the end. Keywords are the fields of Request; `prompt` and `seed` may be lists."""
        if prompt is None and settings.get("embeddings") is None:
            raise RequestError("prompt: a value is needed, unless embeddings are given")
        request = self.resolve(Request.from_mapping({"prompt": "" if prompt is None else prompt, **settings}))
        images, timings, last = [], {}, time.perf_counter()
        for event in self.run(request):
            now = time.perf_counter()
            timings[event.stage] = timings.get(event.stage, 0.0) + now - last
            last = now
            if event.image is not None:
                images.append(event.image)
        metadata = [self.metadata(request, i) for i in range(request.count)]
        return Result(images, request.seeds, request, timings, metadata)

    def run(self, request: Request, state: RenderState | None = None) -> Iterator[Event]:
        """Render, yielding an Event per step; closing the generator cancels. Raises RequestError before any loading.

        `state` is how far an earlier run of the same request came: what it has is not done again.
        """
        request = self.resolve(request)
        self.parts.schedule = self.check(request)
        self._warn_beyond_training(request)
        return Render(self, request, state or RenderState()).events()

    def resolve(self, request: Request) -> Request:
        """The request with every open setting filled in. Raises RequestError where the shift is unknown."""
        completed = complete(request, self.model, self.captions)
        return dataclasses.replace(completed, tile_mode=self.schedule(completed).tile_mode)

    def schedule(self, request: Request) -> Schedule:
        """What will be in memory when a resolved request runs, whether it fits or not."""
        return self.plan.schedule(request, self.captions.longest(request), list(self.parts.loaded))

    def check(self, request: Request) -> Schedule:
        """The same; raises RequestError, with the figures and what would fit, for a request that does not fit."""
        return self.plan.check(request, self.captions.longest(request), list(self.parts.loaded))

    def metadata(self, request: Request, index: int) -> dict[str, Any]:
        """All that is needed to render image `index` of a resolved request again, as plain values; no paths.

        The template's parts stand in the request, so that the picture does not depend on its file.
        """
        single = dataclasses.replace(
            request, prompt=request.prompts[index // request.images], seed=request.seeds[index], images=1, template=None
        )
        return {
            "version": __version__,
            "request": single.to_mapping(),
            "template": request.template,
            "model": {"name": self.model.name, "fingerprint": self.model.fingerprint},
            "dtype": str(self.dtype).removeprefix("torch."),
            "precision": self.settings.precision,
            "lora": [adapter.describe() for adapter in self.lora.list()],
            "attention": self.parts.attention,
            "compile": self.settings.compile,
            "device": device_names(self.places),
            "torch": torch.__version__,
        }

    # ------------------------------------------------------------------ checks

    def _usual_schedule(self) -> Schedule:
        """For stages called one by one: as for a picture of the usual size."""
        return self.schedule(self.resolve(Request(seed=0, shift=1.0)))

    def _warn_beyond_training(self, request: Request) -> None:
        longest = self.model.skeleton("dit").config.axes_lens[1] * SIZE_MULTIPLE
        if (side := max(request.width, request.height)) > longest:
            log.warning("a side of %d px is past the %d px the model was trained for", side, longest)
