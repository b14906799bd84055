"""The stages of a render as generators over (components, job): encode → start → denoise → decode.

Each begins with its component loaded and read ahead, does one piece of work at a time while it holds the component, and
yields between them. Work that the state of an earlier run contains is skipped, and the bits are the same.

How latents are denoised: `render/denoising.py`.

Shapes: B images, h × w latents.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zimage.events import Event
from zimage.kernels.tiles import to_levels
from zimage.loading.registry import DIT, VAE
from zimage.loading.weights import finite
from zimage.pictures.image import fit, from_pil, to_pil
from zimage.render import controlling
from zimage.render.canvas import Pasting, pastes
from zimage.render.captioning import Conditions, encode
from zimage.render.components import Components
from zimage.render.conditioning import Encoder, Texts
from zimage.render.denoising import Hook, Sources, denoise
from zimage.render.job import Job, first_pass, starts_from_noise
from zimage.render.seeing import Vision
from zimage.render.state import RenderState
from zimage.settings.declared import TILE_OVERLAP


def run(
    components: Components,
    job: Job,
    encoder: Encoder,
    texts: Texts,
    state: RenderState,
    hooks: Sequence[Hook] = (),
    vision: Vision | None = None,
) -> Generator[Event, None, None]:
    """A whole job. Closing the generator cancels it; `state` is what an earlier run of the job has done."""
    conditions = Conditions([], None)
    if len(finished(job, state)) < job.count:
        conditions = yield from encode(components, job, encoder, texts, vision)
    yield from draw(components, job, conditions, state, hooks)


def draw(
    components: Components, job: Job, conditions: Conditions, state: RenderState, hooks: Sequence[Hook] = ()
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


def start_from(
    components: Components, job: Job, conditions: Conditions, state: RenderState, hooks: Sequence[Hook] = ()
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
