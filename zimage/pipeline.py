"""The whole path from prompt to picture, and the only file that sees every stage.

    prompts ─ encode ─→ captions ─ refine ─→ contexts ─┐
    seeds   ─ start noise ─→ latents ──────────────────┴─ denoise ─→ latents ─ decode ─→ pictures

`ZImage.run` is a generator of events: progress, previews, profiling and cancelling are things its consumer does.
Weights move between yields only. All prompts are encoded, then all images denoised, then all decoded, so that each
stage is loaded once per request and, where memory is short, let go before the next.

Shapes: B images, L caption tokens, h × w = H/8 × W/8 latents.
"""

import dataclasses
import logging
import os
import secrets
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zimage import flow
from zimage.components import Model, load_component, open_model
from zimage.dit import ZImageDiT
from zimage.errors import RequestError
from zimage.events import Event, Result
from zimage.image import to_pil
from zimage.loras import Loras
from zimage.nn.attention import choose_attention, use_attention
from zimage.nn.compile import compile_blocks
from zimage.nn.quant import check_precision, quantise
from zimage.places import Place, choose_places, device_names
from zimage.plan import MemoryPlan
from zimage.runtime.checkpoint import finite
from zimage.runtime.memory import Prefetch, forget_pages, out_of_memory_in, release_cached
from zimage.runtime.offload import resident_weights, stop_streaming, stream, streamed_blocks
from zimage.schedule import Schedule
from zimage.settings import SIZE_MULTIPLE, LoadSettings, Request, split_lora
from zimage.text import Qwen3
from zimage.text.chat import format_prompt
from zimage.version import __version__
from zimage.weights import DEMO

__all__ = ["Event", "Result", "ZImage", "load_component"]

log = logging.getLogger("zimage")

BASE_SHIFT = 6.0  # the shift that tells the undistilled Base checkpoint from Turbo


class ZImage:
    """A model, loaded when it is first needed. May be used from several threads at once."""

    def __init__(self, model: Model, places: dict[str, Place], settings: LoadSettings):
        self.model, self.places, self.settings = model, places, settings
        self.device, self.dtype = places["dit"]
        self.plan = MemoryPlan(model, places, settings)
        wanted = settings.attention or os.environ.get("ZIMAGE_ATTENTION", "auto")
        # A backend that is named is meant for the DiT; parts on another device take what runs there.
        chosen = {n: choose_attention(wanted if p == places["dit"] else "auto", *p) for n, p in places.items()}
        self.attention, self._attend = chosen["dit"][0], {name: attend for name, (_, attend) in chosen.items()}
        check_precision(settings.precision, self.device)
        self._loaded: dict[str, nn.Module] = {}
        self._schedule: Schedule | None = None  # of the latest request
        self._lock = threading.Lock()
        mergeable = settings.precision == "bf16" and not self.plan.widens_late("dit")
        self.lora = Loras(model.components["dit"], self.device, self.dtype, self._loaded, self._lock, mergeable)
        for text in settings.lora or []:
            self.lora.add(*split_lora(text))

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
        return self._part("text_encoder")

    @property
    def dit(self) -> ZImageDiT:
        return self._part("dit")

    @property
    def vae(self) -> Any:
        """AutoencoderKL or AutoencoderKLWan."""
        return self._part("vae")

    @property
    def max_caption_tokens(self) -> int:
        """Tokens of the longest caption inside the trained positions."""
        return self.model.skeleton("dit").config.max_caption_tokens

    def release(self, *names: str) -> None:
        """Let go of loaded parts (all, when none is named); they load again when next used."""
        with self._lock:
            self._let_go(names or tuple(self._loaded))

    def _part(self, name: str) -> Any:
        with self._lock:
            if self._schedule is None:  # stages called one by one: as for a picture of the usual size
                self._schedule = self.schedule(self.resolve(Request("", seed=0, shift=1.0)))
            schedule = self._schedule
            needed = schedule.stages[name].streamed
            if name not in self._loaded or streamed_blocks(self._loaded[name]) < len(needed):
                log.debug("loading %s", name)
                if name not in schedule.kept:  # also when stages are called one by one
                    here = self.places[name].device
                    self._let_go([n for n in self._loaded if self.places[n].device == here])
                with out_of_memory_in(name):
                    self._loaded[name] = self._prepared(name, needed)
            return self._loaded[name]

    def _let_go(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._loaded:
                stop_streaming(self._loaded.pop(name))
        for device in dict.fromkeys(self.places[name].device for name in names):
            release_cached(device)

    def _prepared(self, name: str, streamed: Sequence[int]) -> nn.Module:
        """Load a plain module, then transform it, in this order."""
        device, dtype = self.places[name]
        module = self.model.components[name].load(device, dtype, self.plan.widens_late(name), streamed)
        if name == "dit" and self.settings.precision != "bf16":
            quantise(module, self.settings.precision, forget_pages)
        if name == "dit":
            self.lora.apply(module)
        use_attention(module, self._attend[name])
        if name == "dit" and self.settings.compile:
            compile_blocks(module)
        if streamed:
            stream(module, streamed, device)
        return module

    # ------------------------------------------------------------------ stages

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of the formatted prompt."""
        return self.model.tokenizer.encode(format_prompt(prompt))

    @out_of_memory_in("text_encoder")
    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> list[Tensor]:
        """Caption embeddings (L, caption width), real tokens only, one tensor per prompt; each prompt runs alone."""
        model = self.text_encoder
        captions = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            ids = torch.tensor([self.tokenize(prompt)], device=self.places["text_encoder"].device)
            length, most = ids.shape[1], self.max_caption_tokens
            if length > most:
                log.warning("the prompt has %d tokens; the model was trained for at most %d", length, most)
            captions.append(finite(model(ids)[0], "the text encoder", model))
        return captions

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
    ) -> Tensor:
        """Latents (B, 16, h, w) fp32 of noise (B, 16, h, w) and B captions (L, caption width), all in one batch.

        `negative` captions count when guidance > 0; without them it is the empty prompt. Raises RequestError.
        """
        request = Request(
            prompt="",
            steps=steps,
            shift=self._shift(shift),
            guidance=guidance,
            cfg_truncation=cfg_truncation,
            cfg_normalization=cfg_normalization,
        )
        if noise.ndim != 4 or len(captions) != len(noise):
            raise RequestError(f"noise {tuple(noise.shape)} should be (B, 16, h, w) for {len(captions)} captions")
        if guidance > 0 and negative is None:
            negative = self.encode([""]) * len(captions)
        *_, latents = self._steps(captions, negative, noise, request)
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
        mode = tile_mode or self.plan.tile_mode(width, height, list(self._loaded))
        images = [vae.decode(sample[None].to(device), tile_size, tile_overlap, mode) for sample in latents]
        return finite(torch.cat(images), "the VAE", vae)

    def _steps(
        self,
        captions: Sequence[Tensor],
        negative: Sequence[Tensor] | None,
        noise: Tensor,
        request: Request,
    ) -> Iterator[Tensor]:
        """Yield the latents (B, 16, h, w) fp32 after each Euler step."""
        dit = self.dit
        sigmas = flow.sigmas(request.steps, request.shift)
        with torch.no_grad():
            modulation = dit.modulate(sigmas[:-1])
            positive_context = dit.context(dit.refine(self._at_dit(captions)), *noise.shape[-2:])
            if request.guidance > 0:
                negative_context = dit.context(dit.refine(self._at_dit(negative)), *noise.shape[-2:])
            latents = noise.to(self.device, torch.float32)
        for i in range(request.steps):
            with torch.no_grad():
                now = modulation.step(i)
                velocity = dit.velocity(latents, now, positive_context)
                scale = flow.guidance_at(sigmas[i], request.guidance, request.cfg_truncation)
                if scale > 0:
                    opposite = dit.velocity(latents, now, negative_context)
                    velocity = flow.guide(velocity, opposite, scale, request.cfg_normalization)
                latents = flow.euler_step(latents, velocity, sigmas[i], sigmas[i + 1])
            if i in (0, request.steps - 1):  # each look is a device sync; a bad weight shows at once
                finite(latents, "the DiT", dit)
            yield latents

    def _at_dit(self, captions: Sequence[Tensor]) -> list[Tensor]:
        """Captions come from where the text encoder runs."""
        return [caption.to(self.device, self.dtype) for caption in captions]

    # ------------------------------------------------------------------ whole renders

    def generate(self, prompt: str | list[str], **settings: Any) -> Result:
        """Render to the end. Keywords are the fields of Request; `prompt` and `seed` may be lists."""
        request = self.resolve(Request.from_mapping({"prompt": prompt, **settings}))
        images, timings, last = [], {}, time.perf_counter()
        for event in self.run(request):
            now = time.perf_counter()
            timings[event.stage] = timings.get(event.stage, 0.0) + now - last
            last = now
            if event.image is not None:
                images.append(event.image)
        metadata = [self.metadata(request, i) for i in range(request.count)]
        return Result(images, request.seeds, request, timings, metadata)

    def run(self, request: Request) -> Iterator[Event]:
        """Render, yielding an Event per step; closing the generator cancels. Raises RequestError before any loading."""
        request = self.resolve(request)
        self._schedule = self.check(request)
        self._warn_beyond_training(request)
        captions = yield from self._stage("text_encoder", self._encode_events(request))
        latents = yield from self._stage("dit", self._denoise_events(request, captions))
        yield from self._stage("vae", self._decode_events(request, latents))

    def resolve(self, request: Request) -> Request:
        """The request with every open setting filled in. Raises RequestError where the shift is unknown."""
        sample_size = getattr(self.model.skeleton("vae").config, "sample_size", 1024)
        side = sample_size if sample_size < 1024 else 1024
        is_base = self.model.shift is not None and self.model.shift >= BASE_SHIFT
        guidance = _either(request.guidance, 4.0 if is_base else 0.0)
        resolved = dataclasses.replace(
            request,
            width=_either(request.width, side),
            height=_either(request.height, side),
            steps=_either(request.steps, 30 if is_base else 8),
            guidance=guidance,
            negative=request.negative if guidance == 0 else _either(request.negative, ""),
            shift=self._shift(request.shift),
            seed=_either(request.seed, secrets.randbelow(2**32)),
        )
        return dataclasses.replace(resolved, tile_mode=self.schedule(resolved).tile_mode)

    def schedule(self, request: Request) -> Schedule:
        """What will be in memory when a resolved request runs, whether it fits or not."""
        return self.plan.schedule(request, self._longest(request), list(self._loaded))

    def check(self, request: Request) -> Schedule:
        """The same; raises RequestError, with the figures and what would fit, for a request that does not fit."""
        return self.plan.check(request, self._longest(request), list(self._loaded))

    def metadata(self, request: Request, index: int) -> dict[str, Any]:
        """All that is needed to render image `index` of a resolved request again, as plain values; no paths."""
        single = dataclasses.replace(
            request, prompt=request.prompts[index // request.images], seed=request.seeds[index], images=1
        )
        return {
            "version": __version__,
            "request": dataclasses.asdict(single),
            "model": {"name": self.model.name, "fingerprint": self.model.fingerprint},
            "dtype": str(self.dtype).removeprefix("torch."),
            "precision": self.settings.precision,
            "lora": [adapter.describe() for adapter in self.lora.list()],
            "attention": self.attention,
            "compile": self.settings.compile,
            "device": device_names(self.places),
            "torch": torch.__version__,
        }

    def _stage(self, name: str, events: Iterator[Event]) -> Generator[Event, None, Any]:
        """Run one stage's events with its part loaded and read ahead; afterwards let it go unless it is kept."""
        yield Event("load", 0, 1, detail=name)
        kept, prefetch = name in self._schedule.kept, Prefetch(resident_weights(self._part(name)))
        try:
            yield Event("load", 1, 1, detail=name)
            with out_of_memory_in(name):
                return (yield from events)
        finally:
            prefetch.stop()
            if not kept:
                self.release(name)

    def _encode_events(self, request: Request) -> Generator[Event, None, dict[str, Tensor]]:
        """Encode each distinct text once; returns {text: caption}."""
        texts = list(dict.fromkeys(request.prompts + ([request.negative] if request.guidance > 0 else [])))
        captions = {}
        for i, text in enumerate(texts):
            yield Event("encode", 0, 1, i, len(texts))
            captions[text] = self.encode([text])[0]
            yield Event("encode", 1, 1, i, len(texts))
        return captions

    def _denoise_events(self, request: Request, captions: dict[str, Tensor]) -> Generator[Event, None, list[Tensor]]:
        """Returns the finished latents (1, 16, h, w) of every image."""
        factor = self.model.skeleton("vae").spatial_factor
        channels = self.model.skeleton("dit").config.in_channels
        size = (request.height // factor, request.width // factor)
        finished = []
        for first in range(0, request.count, request.batch_size):
            batch = range(first, min(first + request.batch_size, request.count))
            noise = torch.cat([flow.start_noise(request.seeds[i], channels, *size) for i in batch])
            positive = [captions[request.prompts[i // request.images]] for i in batch]
            negative = [captions[request.negative]] * len(batch) if request.guidance > 0 else None
            yield Event("denoise", 0, request.steps, first, request.count)
            for step, latents in enumerate(self._steps(positive, negative, noise, request), 1):
                yield Event("denoise", step, request.steps, first, request.count, latents=latents)
            finished += latents.split(1)
        return finished

    def _decode_events(self, request: Request, latents: list[Tensor]) -> Iterator[Event]:
        tiles = (request.tile_size, request.tile_overlap, request.tile_mode)
        for i, sample in enumerate(latents):
            yield Event("decode", 0, 1, i, len(latents))
            image = to_pil(self.decode(sample, *tiles))[0]
            yield Event("decode", 1, 1, i, len(latents), image=image)

    # ------------------------------------------------------------------ checks

    def _shift(self, given: float | None) -> float:
        shift = _either(given, self.model.shift)
        if shift is None:
            raise RequestError(
                f"{self.model.origin} has no schedule; give the shift (3 for Turbo, 6 for Base) "
                "or, for loose files, the variant"
            )
        return shift

    def _longest(self, request: Request) -> int:
        """Tokens of the longest text of a request."""
        return max(len(self.tokenize(text)) for text in [*request.prompts, request.negative or ""])

    def _warn_beyond_training(self, request: Request) -> None:
        longest = self.model.skeleton("dit").config.axes_lens[1] * SIZE_MULTIPLE
        if (side := max(request.width, request.height)) > longest:
            log.warning("a side of %d px is past the %d px the model was trained for", side, longest)


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value
