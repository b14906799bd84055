"""The face: a model that is loaded when it is first needed, whole renders, and each stage with tensors in and out.

    Request ─ prepare: defaults, texts, tokens, seeds, LoRAs, memory plan ─→ Job ─ run ─→ events ─→ pictures

    prompts ─ encode ─→ captions ─ refine ─→ contexts ──────┐
    seeds   ─ start noise ─┬─→ latents ─────────────────────┴─ denoise ─→ latents ─ decode ─→ pictures
    picture ─ VAE encode ──┘  (only where there is one to start from)

A request is decided once: `prepare` leaves nothing open, and what it decided travels with the job as plain data. `run`
is a generator of events: progress, previews, profiling, cancelling and keeping the state of a long render are things
its consumer does. All prompts are encoded, then all images denoised, then all decoded, so that each component is loaded
once per request and, where memory is short, let go before the next. How each stage works: `render/stages.py`.

Shapes: B images, L caption tokens, h × w = H/8 × W/8 latents.
"""

import dataclasses
import logging
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from zimage import flow
from zimage.captioner import Captioner, checked_settings
from zimage.dit import ZImageDiT
from zimage.errors import RequestError
from zimage.events import Event, Result, timed
from zimage.loading.controls import ControlFiles, with_controls
from zimage.loading.devices import Place, choose_places, device_names
from zimage.loading.files import ModelFiles, load_component, open_model
from zimage.loading.loras import Loras, LoraUse, bytes_beside
from zimage.loading.memory import out_of_memory_in
from zimage.loading.plan import MemoryPlan, Workload
from zimage.loading.registry import DIT, REQUIRED, ROWS, TEXT_ENCODER, VAE
from zimage.loading.vision import with_vision
from zimage.pictures.image import InputPicture
from zimage.render import denoising, stages
from zimage.render.budget import check_guidance, guidance_of
from zimage.render.captioning import Conditions, encode
from zimage.render.components import Components
from zimage.render.conditioning import Encoder, SavedEmbeddings
from zimage.render.controlling import GivenControl, Steering, control_input
from zimage.render.deciding import decide
from zimage.render.defaults import find_shift, usual_side
from zimage.render.job import Job, control_files
from zimage.render.remote_encoder import RemoteEncoder
from zimage.render.stage_settings import check_seeds, run_settings
from zimage.render.state import RenderState
from zimage.settings.declared import SIZE_MULTIPLE, TILE_OVERLAP, Request
from zimage.settings.fields import either
from zimage.settings.loading import LoadSettings, split_lora
from zimage.text import Qwen3
from zimage.version import __version__
from zimage.weights import DEMO

__all__ = ["Event", "Job", "Result", "ZImage", "load_component"]


log = logging.getLogger("zimage")


class ZImage(Captioner):
    """A model, loaded when it is first needed. May be used from several threads at once."""

    def __init__(self, model: ModelFiles, places: Mapping[str, Place], settings: LoadSettings):
        super().__init__(model, places, settings, RemoteEncoder.of(model, places[DIT], settings))
        self.device, self.dtype = places[DIT]
        self.lora = Loras(model.components[DIT], self.residency, (settings.lora_skip,) if settings.lora_skip else ())
        for text in settings.lora or []:
            self.lora.add(*split_lora(text))
        self._prepared: WeakSet[Job] = WeakSet()

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
        vae, tokenizer, variant), devices of single components, attention, precision, compile, memory, residency, lora,
        an encoder on another machine (encoder_url), in whose place no weights of a text encoder need be here.
        What is not given is taken from the environment's variables where these are set (but ZIMAGE_MODEL, which is the
        command line's). `device` and `dtype` of the pipeline are the DiT's. Raises CheckpointError or RequestError.
        """
        checked = checked_settings(device, settings)
        elsewhere = (TEXT_ENCODER,) if checked.encoder_url else ()
        model = with_vision(open_model(path, checked, default=DEMO, elsewhere=elsewhere), checked)
        here = [name for name in model.components if name not in elsewhere]
        return cls(model, choose_places(here, checked, dtype), checked)

    # ------------------------------------------------------------------ components

    @property
    def text_encoder(self) -> Qwen3:
        return self._component(TEXT_ENCODER)

    @property
    def dit(self) -> ZImageDiT:
        """With the adapters that `lora` lists now; a later render with others exchanges them in this same module."""
        return self._component(DIT)

    @property
    def vae(self) -> Any:
        """AutoencoderKL or AutoencoderKLWan."""
        return self._component(VAE)

    def _component(self, name: str) -> Any:
        if name not in self.places:
            text = f"the {ROWS[name].title} is on another machine ({self.settings.encoder_url}); leave out encoder_url"
            raise RequestError(text, fields=("encoder_url",))
        with self._components().use(name) as module:
            return module

    def _components(self, work: Workload | None = None, controls: ControlFiles = ()) -> Components:
        """For stages called one by one: planned for this work, else for a picture of the usual size."""
        adapters = self.lora.list()
        work = dataclasses.replace(work or self._usual, loras=bytes_beside(adapters, self.dtype))
        work = with_controls(work, controls, self.planner.sizes[DIT])
        return Components(self.residency, self.planner.plan(work, self.residency.copies), adapters, controls)

    @property
    def _usual(self) -> Workload:
        side = usual_side(self.model)
        return Workload(side, side, len(self.tokenize("")))

    def _plan(self, work: Workload) -> MemoryPlan:
        """For what draws nothing: as for a picture of the usual size, so that what is kept for these stays."""
        patches, tokens = work.vision_patches, work.vision_tokens
        return self._components(dataclasses.replace(self._usual, vision_patches=patches, vision_tokens=tokens)).plan

    # ------------------------------------------------------------------ stages

    def denoise(
        self,
        captions: Sequence[Tensor],
        noise: Tensor,
        steps: int = 8,
        shift: float | None = None,
        guidance: float = 0.0,
        negative: Sequence[Tensor] | None = None,
        clean: Tensor | None = None,
        mask: Tensor | None = None,
        controls: Sequence[GivenControl] = (),
        sigmas: Sequence[float] | None = None,
        seeds: Sequence[int] = (),
        hooks: Sequence[denoising.Hook] = (),
        **settings: Any,
    ) -> Tensor:
        """Latents (B, 16, h, w) fp32 of noise (B, 16, h, w) and B captions (L, caption width), all in one batch.

        `sigmas` (steps + 1), falling from 1 or less to 0, replace steps, shift and schedule. `negative`
        captions are used when guidance > 0 or nag > 1; by default that of the empty prompt. An image-to-image run
        starts from `clean` latents (B, 16, h, w), as `vae.encode` returns them, at `strength`; where the `mask`
        (1, 1, h, w) is 0 they stay, and values below 1 are repainted from a later step on (`flow.first_steps`).
        `controls` are (file, latents, scale) each: a control file, what it reads, as `vae.encode` returns it for a
        control picture, (1 or B, 16, h, w), or with the 17 channels of inpainting after them, and the factor of what
        it adds. What is random after the start comes from `seeds`, one per image. `hooks` wrap every evaluation, see
        `render.denoising`. Further keywords are these fields of Request: sampler, schedule, variety, nag,
        guidance_method, cfg_truncation, cfg_normalization, strength, control_start, control_end and control_flow.
        Raises RequestError, and CheckpointError for an unusable control file.
        """
        if noise.ndim != 4 or not len(noise) or len(captions) != len(noise):
            raise RequestError(f"noise {tuple(noise.shape)} should be (B, 16, h, w) for {len(captions)} captions")
        chosen, strength, say = run_settings({"steps": steps, "shift": shift, "guidance": guidance, **settings})
        solver, guided = chosen.solver, guidance_of(chosen)
        if flow.SOLVERS[solver].draws or chosen.variety > 0:
            check_seeds(seeds, len(noise))
        if negative is None and (guided.scale > 0 or chosen.nag > 1):
            negative = self.encode([""]) * len(captions)
        if negative is not None and len(negative) != len(captions):
            raise RequestError(f"pass as many negative captions ({len(negative)}) as captions ({len(captions)})")
        if sigmas is None:
            levels = flow.sigmas(steps, find_shift(self.model, shift), either(chosen.schedule, "simple"))
        else:
            levels = flow.exact(sigmas)
        start = flow.start(noise, levels, strength, clean, mask)
        check_guidance(guided, levels, [start.step], self.model.config(DIT).n_layers)
        height, width = (side * self.model.skeleton(VAE).spatial_factor for side in noise.shape[2:])
        inputs = [control_input(given, noise) for given in controls]
        away = max(map(len, negative)) if negative and chosen.nag > 1 else 0
        work = Workload(width, height, max(map(len, captions)), len(noise), nag_tokens=away)
        components = self._components(work, tuple(one.file for one in inputs))
        with out_of_memory_in(ROWS[DIT].title):
            sampling = denoising.Sampling(solver, guided, seeds, chosen.variety, chosen.nag)
            steering = Steering(inputs, **say, first=start.step)
            *_, reached = denoising.denoise_steps(
                components, captions, negative, start, levels, sampling, steering, hooks
            )
        return reached.latents

    def decode(
        self,
        latents: Tensor,
        tile_size: int | None = None,
        tile_overlap: int = TILE_OVERLAP,
        tile_mode: str | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) fp32, clamped to [−1, 1], of latents (B, 16, h, w); each image runs alone.

        `tile_mode` "exact" gives the same picture strip by strip, "blend" a similar one of overlapping tiles; without
        it, strips are used where the whole does not fit in memory. Sizes in pixels; raises RequestError.
        """
        if latents.ndim != 4 or not len(latents):
            raise RequestError(f"latents {tuple(latents.shape)} should be (B, 16, h, w), at least one")
        height, width = (side * self.model.skeleton(VAE).spatial_factor for side in latents.shape[-2:])
        mode = tile_mode or self.planner.tile_mode(width, height, self.residency.copies)
        components = self._components(Workload(width, height, 0, tile_mode=mode, tile_size=tile_size or 0))
        with out_of_memory_in(ROWS[VAE].title), components.use(VAE) as vae:
            return stages.decoded(vae, latents.to(self.places[VAE].device), tile_size, tile_overlap, mode)

    # ------------------------------------------------------------------ whole renders

    def prepare(self, request: Request, loras: Sequence[LoraUse] | None = None, must_fit: bool = True) -> Job:
        """Decide everything that a request leaves open, once; nothing is loaded.

        `loras` are used instead of `pipe.lora`'s. Raises RequestError where the request cannot run, also where it
        does not fit in memory, unless it need not (to look at its plan).
        """
        adapters = self.lora.list() if loras is None else self.lora.read(loras)
        job = decide(
            request,
            self.model,
            self.texts,
            self.planner,
            adapters,
            self.residency.copies,
            self._facts,
            must_fit,
            self.vision,
        )
        self._prepared.add(job)
        return job

    def run(
        self,
        job: Job | Request,
        state: RenderState | None = None,
        hooks: Sequence[denoising.Hook] = (),
        conditions: Conditions | None = None,
    ) -> Generator[Event, None, None]:
        """Render, yielding an Event per step; closing the generator cancels. A request is prepared first.

        Work that the `state` of an earlier run of the job contains is skipped. `hooks` wrap every evaluation, see
        `render.denoising`. With `conditions`, which `conditions` of this job returned here or elsewhere, nothing is
        encoded. Raises RequestError, and CheckpointError for files that the job names, before any loading.
        """
        job, begun = self.begun(job, state)
        components = self.components(job)
        if conditions is not None:
            return stages.draw(components, job, conditions, begun, hooks)
        return stages.run(components, job, self._encoder_of(job), self.texts, begun, hooks, self.vision)

    def begun(self, job: Job | Request, state: RenderState | None = None) -> tuple[Job, RenderState]:
        """A job of this pipeline and how far it has come, checked before anything is loaded. Raises as `run` does."""
        job = self.checked(self.prepare(job) if isinstance(job, Request) else job)
        self._warn_beyond_training(max(job.passes[-1][:2]))
        begun = RenderState() if state is None else state.snapshot()  # the consumer goes on with its own
        self.check_state(begun, job)
        return job, begun

    def conditions(self, job: Job) -> Generator[Event, None, Conditions]:
        """The encode stage of a job alone: yields its events, and returns the captions that it is drawn from."""
        job = self.checked(job)
        return encode(self.components(job), job, self._encoder_of(job), self.texts, self.vision)

    def components(self, job: Job) -> Components:
        """The components as a checked job sees them, for stages that are run one by one."""
        return Components(self.residency, job.plan, self.lora.read(job.loras), control_files(job.request))

    def _encoder_of(self, job: Job) -> Encoder:
        embeddings = job.request.embeddings
        return self.encoder if embeddings is None else SavedEmbeddings(embeddings.caption, self.encoder)

    def generate(self, prompt: str | list[str] | None = None, **settings: Any) -> Result:
        """Render to the end. Keywords are the fields of Request; `prompt` and `seed` may be lists."""
        if prompt is None and settings.get("embeddings") is None:
            raise RequestError("prompt: a value is needed, unless embeddings are given", fields=("prompt",))
        job = self.prepare(Request.from_mapping({"prompt": "" if prompt is None else prompt, **settings}))
        timings = dict[str, float]()
        images = [event.image for event in timed(self.run(job), timings) if event.image is not None]
        metadata = [self.metadata(job, i) for i in range(job.count)]
        return Result(images, list(job.seeds), job.request, timings, metadata)

    def metadata(self, job: Job, index: int) -> dict[str, Any]:
        """All that is needed to render image `index` of a job again, as plain values; no paths.

        The template's parts stand in the request, so that the picture does not depend on its file.
        """
        request = job.request
        looks = any(isinstance(r.picture, InputPicture) for r in request.reference or [])
        return {
            "version": __version__,
            "request": {**request.to_mapping(), **request.single(index), "template": None},
            "template": request.template,
            "model": {"name": self.model.name, "fingerprint": job.model},
            "dtype": job.dtype,
            "precision": job.precision,
            "lora": [use.describe() for use in job.loras],
            **({"vision": self.vision.describe()} if self.vision and looks else {}),
            "attention": self.residency.attention,
            "compile": self.settings.compile,
            "ranks": self.planner.ranks,
            "device": device_names({name: self.places[name] for name in REQUIRED if name in self.places}),
            "torch": torch.__version__,
        }

    # ------------------------------------------------------------------ checks

    @property
    def _facts(self) -> dict[str, str]:
        """What a job is prepared for."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"model": self.model.fingerprint, "dtype": dtype, "precision": self.settings.precision}

    def refusal(self, job: Job) -> RequestError | None:
        """The error on a job that does not fit in memory, with the figures and what would fit; None where it fits."""
        try:
            self.planner.check(job.plan, self.residency.copies)
        except RequestError as error:
            return error
        return None

    def checked(self, job: Job) -> Job:
        """A job of this pipeline as it is; one from elsewhere with a plan for here.

        Raises RequestError where it does not fit in memory, or does not mean the same here.
        """
        if job in self._prepared:
            if refusal := self.refusal(job):
                raise refusal
            return job
        for name, here in self._facts.items():
            if (there := getattr(job, name)) != here:
                raise RequestError(f"the job was prepared for {name} {there}, and this is {here}; prepare it anew")
        again = self.prepare(dataclasses.replace(job.request, template=None), loras=job.loras)
        if difference := job.differs(again):
            raise RequestError(f"the job's {difference} are not those that its request has here; prepare it anew")
        return dataclasses.replace(again, request=job.request)

    def check_state(self, state: RenderState, job: Job) -> None:
        """Raise RequestError unless the state is one of this job's."""
        state.check(job, self.model.config(DIT).in_channels, self.model.skeleton(VAE).spatial_factor)

    def _warn_beyond_training(self, side: int) -> None:
        longest = self.model.config(DIT).axes_lens[1] * SIZE_MULTIPLE
        if side > longest:
            log.warning("a side of %d px is past the %d px the model was trained for", side, longest)
