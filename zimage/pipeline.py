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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from zimage import flow
from zimage.components import PARTS, Model, choose_device, choose_dtype, load_component, open_model
from zimage.dit import ZImageDiT
from zimage.errors import NonFiniteError, RequestError
from zimage.image import to_pil
from zimage.loras import Loras
from zimage.nn.attention import choose_attention, use_attention
from zimage.nn.compile import compile_blocks
from zimage.nn.quant import check_precision, quantise
from zimage.plan import MemoryPlan
from zimage.runtime.checkpoint import non_finite_weights
from zimage.runtime.memory import Prefetch, forget_pages, release_cached
from zimage.settings import SIZE_MULTIPLE, LoadSettings, Request, split_lora
from zimage.text import Qwen3
from zimage.text.chat import format_prompt
from zimage.version import __version__
from zimage.weights import DEMO

__all__ = ["Event", "Result", "ZImage", "load_component"]

log = logging.getLogger("zimage")

BASE_SHIFT = 6.0  # the shift that tells the undistilled Base checkpoint from Turbo


@dataclass(frozen=True)
class Event:
    """One step of a render. Step 0 says that a stage begins, step = total that it is done.

    `stage` is "load", "encode", "denoise" or "decode"; `index` of `count` counts components, prompts or images.
    `latents` (B, 16, h, w) come with denoising steps, `image` with each finished picture.
    """

    stage: str
    step: int
    total: int
    index: int = 0
    count: int = 1
    detail: str = ""
    latents: Tensor | None = None
    image: Image.Image | None = None


@dataclass(frozen=True)
class Result:
    """Pictures in order, prompt by prompt, with the seed of each, the request as it was run, and seconds per stage."""

    images: list[Image.Image]
    seeds: list[int]
    request: Request
    timings: dict[str, float]
    metadata: list[dict[str, Any]] = field(repr=False)


class ZImage:
    """A model, loaded when it is first needed. May be used from several threads at once."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, settings: LoadSettings):
        self.model, self.device, self.dtype, self.settings = model, device, dtype, settings
        self.plan = MemoryPlan(model, device, dtype, settings)
        wanted = settings.attention or os.environ.get("ZIMAGE_ATTENTION", "auto")
        self.attention, self._attend = choose_attention(wanted, device, dtype)
        check_precision(settings.precision, device)
        self._loaded: dict[str, nn.Module] = {}
        self._lock = threading.Lock()
        mergeable = settings.precision == "bf16" and not self.plan.widens_late("dit")
        self.lora = Loras(model.components["dit"], device, dtype, self._loaded, self._lock, mergeable)
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
        Further keywords are fields of LoadSettings: dit, text_encoder, vae (each a loose file or a component folder,
        alone or in the place of the model's own), tokenizer, variant, attention, precision, compile, residency ("keep"
        all stages loaded, load each "stage" in its turn, or "auto" by the free memory), lora (a list of "PATH:SCALE";
        later `pipe.lora` adds and removes). Raises CheckpointError or RequestError.
        """
        plain = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in settings.items()}
        checked = LoadSettings.from_mapping({"device": device, **plain})
        place = choose_device(device)
        parts = {name: Path(value).expanduser() for name in PARTS if (value := getattr(checked, name))}
        given = checked.tokenizer and Path(checked.tokenizer).expanduser()
        origin = None if path is None and parts else Path(DEMO if path is None else path).expanduser()
        model = open_model(origin, parts, given, checked.variant)
        return cls(model, place, choose_dtype(dtype, place), checked)

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
            for name in names or tuple(self._loaded):
                self._loaded.pop(name, None)
        release_cached(self.device)

    def _part(self, name: str) -> Any:
        with self._lock:
            if name not in self._loaded:
                log.debug("loading %s", name)
                if not self.plan.keeps_loaded:
                    self._loaded.clear()  # also when stages are called one by one
                    release_cached(self.device)
                self._loaded[name] = self._prepared(name)
            return self._loaded[name]

    def _prepared(self, name: str) -> nn.Module:
        """Load a plain module, then transform it, in this order."""
        module = self.model.components[name].load(self.device, self.dtype, self.plan.widens_late(name))
        if name == "dit" and self.settings.precision != "bf16":
            quantise(module, self.settings.precision, forget_pages)
        if name == "dit":
            self.lora.apply(module)
        use_attention(module, self._attend)
        if name == "dit" and self.settings.compile:
            compile_blocks(module)
        return module

    # ------------------------------------------------------------------ stages

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of the formatted prompt."""
        return self.model.tokenizer.encode(format_prompt(prompt))

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> list[Tensor]:
        """Caption embeddings (L, caption width), real tokens only, one tensor per prompt; each prompt runs alone."""
        model = self.text_encoder
        captions = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            ids = torch.tensor([self.tokenize(prompt)], device=self.device)
            if ids.shape[1] > self.max_caption_tokens:
                log.warning(
                    "the prompt has %d tokens; the model was trained for at most %d",
                    ids.shape[1],
                    self.max_caption_tokens,
                )
            captions.append(_finite(model(ids)[0], "the text encoder", model))
        return captions

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

    @torch.no_grad()
    def decode(
        self, latents: Tensor, tile_size: int | None = None, tile_overlap: int = 64, tile_mode: str | None = None
    ) -> Tensor:
        """Images (B, 3, H, W) fp32, clamped to [−1, 1], of latents (B, 16, h, w); each image runs alone.

        `tile_mode` "exact" gives the same picture strip by strip, "blend" a similar one of overlapping tiles; without
        it, strips are used where the whole does not fit in memory. Sizes in pixels; raises RequestError.
        """
        vae = self.vae
        height, width = (side * vae.spatial_factor for side in latents.shape[-2:])
        mode = tile_mode or self.plan.tile_mode(width, height, list(self._loaded))
        images = [vae.decode(sample[None].to(self.device), tile_size, tile_overlap, mode) for sample in latents]
        return _finite(torch.cat(images), "the VAE", vae)

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
            positive_context = dit.context(dit.refine(captions), *noise.shape[-2:])
            if request.guidance > 0:
                negative_context = dit.context(dit.refine(negative), *noise.shape[-2:])
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
                _finite(latents, "the DiT", dit)
            yield latents

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
        self.plan.check(request, list(self._loaded))
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
        width, height = _either(request.width, side), _either(request.height, side)
        return dataclasses.replace(
            request,
            width=width,
            height=height,
            steps=_either(request.steps, 30 if is_base else 8),
            guidance=guidance,
            negative=request.negative if guidance == 0 else _either(request.negative, ""),
            shift=self._shift(request.shift),
            seed=_either(request.seed, secrets.randbelow(2**32)),
            tile_mode=_either(request.tile_mode, self.plan.tile_mode(width, height, list(self._loaded))),
        )

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
            "device": self.device.type,
            "torch": torch.__version__,
        }

    def _stage(self, name: str, events: Iterator[Event]) -> Generator[Event, None, Any]:
        """Run one stage's events with its part loaded and read ahead; afterwards let it go unless all are kept."""
        yield Event("load", 0, 1, detail=name)
        prefetch = Prefetch(self._part(name).read_order())
        try:
            yield Event("load", 1, 1, detail=name)
            return (yield from events)
        finally:
            prefetch.stop()
            if not self.plan.keeps_loaded:
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

    def _warn_beyond_training(self, request: Request) -> None:
        longest = self.model.skeleton("dit").config.axes_lens[1] * SIZE_MULTIPLE
        side = max(request.width, request.height)
        if side > longest:
            log.warning("a side of %d px is past the %d px the model was trained for", side, longest)


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _finite(values: Tensor, source: str, model: nn.Module) -> Tensor:
    """`values`, or NonFiniteError that names the weights at fault where there are such."""
    if torch.isfinite(values).all():
        return values
    broken = non_finite_weights(model)
    if broken:
        raise NonFiniteError(f"{source} holds NaN or infinity in {broken[0]}; fetch the weights again")
    raise NonFiniteError(f"{source} produced NaN or infinity though its weights are finite; try dtype fp32")
