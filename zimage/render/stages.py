"""The stages of a render as generators over (components, job): encode → start → denoise → decode.

Each begins with its component loaded and read ahead, does one piece of work at a time while it holds the component, and
yields between them. Work that the state of an earlier run contains is skipped, and the bits are the same.

A hook takes the function that computes a step's velocity and gives another: guidance split over devices or a second
noise prediction stand there without another pipeline.

Shapes: B images, L caption tokens, C caption width, h × w latents.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from zimage import flow
from zimage.dit.control import Controlled
from zimage.dit.model import Context, Modulation, ZImageDiT
from zimage.errors import RequestError
from zimage.events import Event
from zimage.kernels.tiles import to_levels
from zimage.loading.controls import ControlFiles
from zimage.loading.files import ModelFiles
from zimage.loading.loras import Adapters
from zimage.loading.memory import out_of_memory_in
from zimage.loading.plan import MemoryPlan
from zimage.loading.registry import DIT, ROWS, VAE
from zimage.loading.residency import Residency
from zimage.loading.weights import finite
from zimage.pictures.image import fit, from_pil, to_pil
from zimage.render import controlling
from zimage.render.canvas import Pasting, pastes
from zimage.render.captioning import Conditions, encode
from zimage.render.conditioning import Encoder, Texts
from zimage.render.controlling import NOTHING, Beside, ControlInput, Steering
from zimage.render.job import Job, first_pass, starts_from_noise
from zimage.render.seeing import Vision
from zimage.render.state import RenderState
from zimage.settings.declared import TILE_OVERLAP

R = TypeVar("R")


class Components:
    """The components of a pipeline as one job sees them: by its plan, with its adapters and control files."""

    def __init__(self, residency: Residency, plan: MemoryPlan, adapters: Adapters = (), controls: ControlFiles = ()):
        self.residency, self.plan, self.adapters, self.controls = residency, plan, adapters, controls

    @property
    def model(self) -> ModelFiles:
        return self.residency.model

    def use(self, name: str) -> AbstractContextManager[Any]:
        """A component for one piece of work; see `Residency.use`."""
        return self.residency.use(name, self.plan, self.adapters, self.controls)

    def config(self, name: str) -> Any:
        return self.residency.model.config(name)

    def device(self, name: str) -> torch.device:
        return self.residency.places[name].device

    def stage(self, name: str, events: Generator[Event, None, R]) -> Generator[Event, None, R]:
        """A stage's events, its component loaded before and, unless it is kept, let go after them; "" loads nothing."""
        if not name:
            return (yield from events)
        yield Event("load", 0, 1, detail=name)
        with out_of_memory_in(ROWS[name].title):
            self.residency.begin(name, self.plan, self.adapters, self.controls)
        try:
            yield Event("load", 1, 1, detail=name)
            with out_of_memory_in(ROWS[name].title):
                return (yield from events)
        finally:
            self.residency.finish(name, self.plan)


def run(
    components: Components,
    job: Job,
    encoder: Encoder,
    texts: Texts,
    state: RenderState,
    hooks: Sequence["Hook"] = (),
    vision: Vision | None = None,
) -> Generator[Event, None, None]:
    """A whole job. Closing the generator cancels it; `state` is what an earlier run of the job has done."""
    conditions = Conditions([], None)
    if len(finished(job, state)) < job.count:
        conditions = yield from encode(components, job, encoder, texts, vision)
    yield from draw(components, job, conditions, state, hooks)


def draw(
    components: Components, job: Job, conditions: Conditions, state: RenderState, hooks: Sequence["Hook"] = ()
) -> Generator[Event, None, None]:
    """All of a job behind its encoding; `conditions` are not read where the state has all latents."""
    latents = finished(job, state)
    if len(latents) < job.count:
        sources = yield from start_from(components, job, conditions, state, hooks)
        begun = state if _in_last_pass(job, state) else RenderState()
        latents = yield from components.stage(DIT, denoise(components, job, conditions, sources, begun, hooks))
    yield from components.stage(VAE, decode(components, job, latents, state.decoded))


def _in_last_pass(job: Job, state: RenderState) -> bool:
    """Whether the state is one of the last pass."""
    return job.request.hires is None or bool(state.small)


def finished(job: Job, state: RenderState) -> list[Tensor]:
    """The latents of those images that have been through the last pass."""
    return state.finished if _in_last_pass(job, state) else []


# ------------------------------------------------------------------ what denoising starts from


class Sources(NamedTuple):
    """What a pass is given besides captions.

    `clean` are the latents (1, 16, h, w) that each image starts from, None where it starts from noise alone, and
    `controls` what ControlNets read.
    """

    clean: list[Tensor] | None
    controls: list[ControlInput]


def start_from(
    components: Components, job: Job, conditions: Conditions, state: RenderState, hooks: Sequence["Hook"] = ()
) -> Generator[Event, None, Sources]:
    """What the last pass is given; of two passes, the first runs here."""
    request, small = job.request, state.small
    if request.hires is not None and not small:
        first = first_pass(job)
        sources = yield from components.stage(VAE if request.control else "", _sources(components, first, []))
        small = yield from components.stage(DIT, denoise(components, first, conditions, sources, state, hooks))
    pictured = small or request.control or request.image is not None
    return (yield from components.stage(VAE if pictured else "", _sources(components, job, small)))


def _sources(components: Components, job: Job, small: list[Tensor]) -> Generator[Event, None, Sources]:
    """What a job's last pass is given; `small` are the latents that the pass before it ended in."""
    request, (width, height, _) = job.request, job.passes[-1]
    rendered, clean = None if request.image is None else job.rendered(), None
    if small:
        enlarged = (from_pil(fit(_drawn(components, first_pass(job), latents), width, height)) for latents in small)
        clean = yield from _encode_pictures(components, job, "enlarge", enlarged, job.count)
    elif rendered and not starts_from_noise(request):
        clean = (yield from _encode_pictures(components, job, "encode image", [rendered.picture], 1)) * job.count
    shown = controlling.pictures(job, rendered)
    encoded = yield from _encode_pictures(components, job, "encode control", shown, len(shown))
    return Sources(clean, controlling.inputs(job, encoded, rendered))


def _encode_pictures(
    components: Components, job: Job, stage: str, pictures: Iterable[Tensor], count: int
) -> Generator[Event, None, list[Tensor]]:
    """Latents (1, 16, h, w) of each picture (1, 3, H, W)."""
    clean, remaining = [], iter(pictures)
    for i in range(count):
        yield Event(stage, 0, 1, i, count)
        clean.append(_encoded(components, job, next(remaining)))
        yield Event(stage, 1, 1, i, count)
    return clean


@torch.no_grad()
def _encoded(components: Components, job: Job, picture: Tensor) -> Tensor:
    request, mode = job.request, job.passes[-1].tile_mode
    with components.use(VAE) as vae:
        latents = vae.encode(picture.to(components.device(VAE)), request.tile_size, request.tile_overlap, mode)
        return finite(latents, "the VAE", vae)


# ------------------------------------------------------------------ denoising


class Evaluation(NamedTuple):
    """What one step's velocity is computed from.

    `latents` (B, 16, h, w) fp32 stand at noise level `sigmas[step]`. `negative` is None in a run without guidance;
    `scale` is this step's guidance, 0 where it is off.
    """

    dit: ZImageDiT
    latents: Tensor
    step: int
    sigmas: Tensor  # (steps + 1,)
    modulation: Modulation
    positive: Context
    negative: Context | None
    scale: float
    normalization: float
    controls: Sequence[Controlled] = ()  # ControlNets that have a say in this step


Evaluate = Callable[[Evaluation], Tensor]  # → velocity (B, 16, h, w) fp32
Hook = Callable[[Evaluate], Evaluate]


def guided_velocity(e: Evaluation) -> Tensor:
    """The model's velocity, with classifier-free guidance where there is any."""
    velocity = e.dit.velocity(e.latents, e.modulation, e.positive, e.controls)
    if e.negative is None or e.scale <= 0:
        return velocity
    negative = e.dit.velocity(e.latents, e.modulation, e.negative, e.controls)
    return flow.guide(velocity, negative, e.scale, e.normalization)


class Guidance(NamedTuple):
    """Classifier-free guidance over a run, as `flow.guidance_at` and `flow.guide` take it."""

    scale: float = 0.0
    truncation: float = 1.0
    normalization: float = 0.0


class _Batch:
    """The steps of one batch. Between them it holds no component: one that is let go is gone."""

    def __init__(
        self,
        components: Components,
        start: flow.Start,
        sigmas: Tensor,
        guidance: Guidance,
        steering: Steering,
        hooks: Sequence[Hook],
    ):
        self.components, self.sigmas, self.guidance, self.steering = components, sigmas, guidance, steering
        self.start = start.to(components.device(DIT))
        self.evaluate: Evaluate = guided_velocity
        for hook in hooks:
            self.evaluate = hook(self.evaluate)

    def condition(self, positive: Sequence[Tensor], negative: Sequence[Tensor] | None) -> None:
        """What stays the same over the steps; captions come from where the text encoder runs."""
        device, size = self.components.device(DIT), self.start.noise.shape[-2:]
        with self.components.use(DIT) as dit, torch.no_grad():

            def context(captions: Sequence[Tensor]) -> Context:
                refined: Context = dit.context(dit.refine([caption.to(device) for caption in captions]), *size)
                return refined

            self.modulation = dit.modulate(self.sigmas[:-1])
            self.beside = Beside(self.steering, self.components.residency, dit, self.sigmas[:-1])
            self.positive = context(positive)
            self.negative = context(negative) if negative and self.guidance.scale > 0 else None

    def step(self, latents: Tensor, i: int) -> Tensor:
        """From noise level i to the next."""
        start, sigmas = self.start, self.sigmas
        scale = flow.guidance_at(sigmas[i], self.guidance.scale, self.guidance.truncation)
        with self.components.use(DIT) as dit, torch.no_grad():
            moment = Evaluation(
                dit,
                latents,
                i,
                sigmas,
                self.modulation.step(i),
                self.positive,
                self.negative,
                scale,
                self.guidance.normalization,
                self.beside.step(i),
            )
            latents = flow.euler_step(latents, self.evaluate(moment), sigmas[i], sigmas[i + 1])
            latents = start.kept(latents, i, sigmas[i + 1])
            if i in (start.step, len(sigmas) - 2):  # each look is a device sync; a bad weight shows at once
                finite(latents, "the DiT", dit)
        return latents


def denoise_steps(
    components: Components,
    positive: Sequence[Tensor],
    negative: Sequence[Tensor] | None,
    start: flow.Start,
    sigmas: Tensor,
    guidance: Guidance,
    steering: Steering = NOTHING,
    hooks: Sequence[Hook] = (),
) -> Iterator[Tensor]:
    """Yield the latents (B, 16, h, w) fp32 after each Euler step of B captions (L, C), with as many negative ones."""
    batch = _Batch(components, start, sigmas, guidance, steering, hooks)
    batch.condition(positive, negative)
    latents = batch.start.latents
    for i in range(start.step, len(sigmas) - 1):
        latents = batch.step(latents, i)
        yield latents


def denoise(
    components: Components,
    job: Job,
    conditions: Conditions,
    sources: Sources,
    state: RenderState,
    hooks: Sequence[Hook] = (),
) -> Generator[Event, None, list[Tensor]]:
    """Returns the finished latents (1, 16, h, w) of every image of a pass; goes on from its state."""
    request, finished = job.request, list(state.finished)
    sigmas, mask = torch.tensor(job.sigmas), _latent_mask(components, job)
    guidance = Guidance(request.guidance or 0.0, request.cfg_truncation, request.cfg_normalization)
    for first in range(len(finished), job.count, request.batch_size):
        batch = range(first, min(first + request.batch_size, job.count))
        start, done = _start(components, job, batch, sources.clean, mask, sigmas), 0
        total = len(sigmas) - 1 - start.step
        steering = Steering.of(request, sources.controls, start.step)
        if first == len(state.finished) and state.latents is not None:
            done = state.step
            if done >= total:  # how many there are, a mask by value decides
                raise RequestError(f"the state is that of another render ({done} steps of {total}); start anew")
            start = start._replace(latents=state.latents, step=start.step + done)
        positive = [conditions.prompts[i // request.images] for i in batch]
        negative = None if conditions.negative is None else [conditions.negative] * len(batch)
        yield Event("denoise", done, total, first, job.count)
        latents = start.latents
        steps = denoise_steps(components, positive, negative, start, sigmas, guidance, steering, hooks)
        for step, latents in enumerate(steps, done + 1):
            yield Event("denoise", step, total, first, job.count, latents=latents)
        finished += latents.split(1)
    return finished


def _start(
    components: Components, job: Job, batch: range, clean: list[Tensor] | None, mask: Tensor | None, sigmas: Tensor
) -> flow.Start:
    """The noise (B, 16, h, w) of some images, each from its own seed, and what it is mixed with."""
    channels, (h, w) = components.config(DIT).in_channels, _latent_size(components, job)
    noise = torch.cat([flow.start_noise(job.seeds[i], channels, h, w) for i in batch])
    if clean is None:
        return flow.start(noise, sigmas)
    begin = torch.cat([clean[i] for i in batch]).cpu()
    return flow.start(noise, sigmas, job.request.strength or 1.0, begin, mask)


def _latent_mask(components: Components, job: Job) -> Tensor | None:
    """(1, 1, h, w): the mask at the latents' size; by value where the picture is pasted back."""
    mask = None if job.request.image is None else job.rendered().mask
    if mask is None:
        return None
    reduced = flow.soft_latent_mask if pastes(job.request) else flow.latent_mask
    return reduced(mask, *_latent_size(components, job))


def _latent_size(components: Components, job: Job) -> tuple[int, int]:
    """(h, w) of a job's last pass."""
    factor = components.model.skeleton(VAE).spatial_factor
    width, height, _ = job.passes[-1]
    return height // factor, width // factor


# ------------------------------------------------------------------ decoding


def decode(components: Components, job: Job, latents: list[Tensor], done: int) -> Generator[Event, None, None]:
    """The pictures of finished latents, after the first `done`, pasted back to where they belong."""
    place = Pasting(job.request, job.frame) if pastes(job.request) and done < len(latents) else None
    for i in range(done, len(latents)):
        yield Event("decode", 0, 1, i, len(latents))
        image = _drawn(components, job, latents[i])
        yield Event("decode", 1, 1, i, len(latents), image=place.onto(image) if place else image)


def _drawn(components: Components, job: Job, latents: Tensor) -> Image.Image:
    """The picture of the latents (1, 16, h, w) of a job's last pass."""
    request, mode = job.request, job.passes[-1].tile_mode
    with components.use(VAE) as vae:
        images = decoded(vae, latents.to(components.device(VAE)), request.tile_size, request.tile_overlap, mode)
        return to_pil(to_levels(images))[0]


@torch.no_grad()
def decoded(
    vae: Any, latents: Tensor, tile_size: int | None = None, tile_overlap: int = TILE_OVERLAP, tile_mode: str = "off"
) -> Tensor:
    """Images (B, 3, H, W) fp32 in [−1, 1] of latents (B, 16, h, w), each alone. Raises NonFiniteError."""
    images = [vae.decode(sample[None], tile_size, tile_overlap, tile_mode) for sample in latents]
    return finite(torch.cat(images), "the VAE", vae)
