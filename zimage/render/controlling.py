"""What ControlNets read of control pictures, and in which steps they have a say.

    control picture ─ fitted ─ edges, if asked for ─ VAE ─→ 16 channels ┐
    mask, 1 = keep, 0 = repaint ─ nearest ────────────────→ 1           ├→ 33, or only the first 16
    picture, 0 where it is repainted ─ VAE ───────────────→ 16          ┘

Latents are the posterior's mode, scaled. Without inpainting the last 17 channels are 0. Each pass has its own size, and
so its own latents; they are computed before the DiT is loaded.

Shapes: images (1, 3, H, W) in [−1, 1], latents (B, C, h, w).
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from zimage import flow
from zimage.dit.control import Controlled, Flow
from zimage.dit.model import ZImageDiT
from zimage.errors import RequestError
from zimage.loading.controls import ControlFile
from zimage.loading.residency import Residency
from zimage.pictures.canny import canny
from zimage.pictures.image import fit, from_pil
from zimage.render.canvas import Rendered, alongside, pastes
from zimage.render.job import Job, control_files
from zimage.settings.conditions import Control
from zimage.settings.declared import Request

PREPROCESS = {"canny": canny}


class ControlInput(NamedTuple):
    """A control file with what it reads: latents (1 or B, 16 or 33, h, w), and the factor of what it adds."""

    file: ControlFile
    latents: Tensor
    scale: float


GivenControl = tuple[str | os.PathLike[str], Tensor] | tuple[str | os.PathLike[str], Tensor, float]


class Steering(NamedTuple):
    """ControlNets over a run that begins with step `first`; `start` and `end` are those of `flow.steps_between`."""

    inputs: Sequence[ControlInput] = ()
    start: float = 0.0
    end: float = 1.0
    kind: Flow = "publisher"
    first: int = 0

    @classmethod
    def of(cls, request: Request, inputs: Sequence[ControlInput], first: int) -> "Steering":
        kind: Flow = "diffusers" if request.control_flow == "diffusers" else "publisher"
        return cls(inputs, request.control_start, request.control_end, kind, first)


NOTHING = Steering()


# ------------------------------------------------------------------ pictures


def pictures(job: Job, rendered: Rendered | None) -> list[Tensor]:
    """The images that the VAE encodes for a job's last pass: distinct control pictures, then the masked picture.

    `rendered` is what a job with an image starts from.
    """
    found = [from_pil(_prepared(control.picture.picture, job)) for control in _distinct(job.request)]
    kept = _kept(job, rendered)
    return found if rendered is None or kept is None else [*found, rendered.picture * kept]


def inputs(job: Job, encoded: Sequence[Tensor], rendered: Rendered | None) -> list[ControlInput]:
    """What each of a job's controls reads, from the latents (1, 16, h, w) of `pictures`."""
    shown = _distinct(job.request)
    latents = {control.picture.hash: one for control, one in zip(shown, encoded[: len(shown)], strict=True)}
    kept = _kept(job, rendered)
    rest = None if kept is None else inpainting_channels(kept, encoded[-1])
    return [
        ControlInput(control.model, widened(latents[control.picture.hash], control.model, rest), control.scale)
        for control in job.request.control or ()
    ]


def _kept(job: Job, rendered: Rendered | None) -> Tensor | None:
    """(1, 1, H, W): where the picture is kept; None where no ControlNet reads that."""
    reads = any(file.reads_mask for file in control_files(job.request))
    return rendered.kept if rendered and reads else None


def control_input(given: GivenControl, noise: Tensor) -> ControlInput:
    """What a library user passes for a run from this noise (B, 16, h, w), checked. Raises RequestError."""
    path, latents, scale = vars(Control(*given)).values()
    file = ControlFile.of(path)
    if latents.ndim != 4 or latents.shape[-2:] != noise.shape[-2:] or len(latents) not in (1, len(noise)):
        wanted = f"(1 or {len(noise)}, channels, {noise.shape[-2]}, {noise.shape[-1]})"
        text = f"control latents {tuple(latents.shape)} of {file.name} should be {wanted}"
        raise RequestError(text, fields=("control",))
    return ControlInput(file, widened(latents, file), scale)


def inpainting_channels(kept: Tensor, masked: Tensor) -> Tensor:
    """(1, 17, h, w): where the picture is kept (1, 1, H, W), and the latents (1, 16, h, w) of the masked picture."""
    return torch.cat((flow.latent_mask(kept, *masked.shape[-2:]).to(masked), masked), dim=1)


def widened(latents: Tensor, file: ControlFile, rest: Tensor | None = None) -> Tensor:
    """Control latents with as many channels as the file reads: the `rest` of them, or zeros. Raises RequestError."""
    lacking = file.config.control_in_dim - latents.shape[1]
    if not lacking:
        return latents
    if not file.reads_mask or latents.shape[1] != (file.config.control_in_dim - 1) // 2:
        text = (
            f"control latents {tuple(latents.shape)} do not fit {file.name}, which reads {file.config.control_in_dim}"
        )
        raise RequestError(f"{text} channels", fields=("control",))
    zeros = latents.new_zeros(1, lacking, *latents.shape[-2:])
    return torch.cat((latents, (zeros if rest is None else rest).expand(len(latents), -1, -1, -1)), dim=1)


def _distinct(request: Request) -> list[Control]:
    return list({control.picture.hash: control for control in request.control or ()}.values())


def _prepared(picture: Image.Image, job: Job) -> Image.Image:
    """A control picture as the job's last pass has it; fitted first, since edges that are scaled are no edges."""
    size, how = job.passes[-1][:2], job.request.control_preprocess
    fitted = alongside(picture, job.frame, size) if pastes(job.request) else fit(picture, *size)
    return PREPROCESS[how](fitted) if how else fitted


# ------------------------------------------------------------------ steps


class Beside:
    """The ControlNets of one batch: control pictures embedded once, the modulation of all steps computed once."""

    def __init__(self, steering: Steering, residency: Residency, dit: ZImageDiT, sigmas: Tensor):
        """`sigmas` (steps,) are those of every step. The DiT must be in use, with the files."""
        self._steering, self._residency = steering, residency
        self._steps = flow.steps_between(steering.first, len(sigmas), steering.start, steering.end)
        nets = [residency.control(one.file) for one in steering.inputs]
        time = dit.time(sigmas) if nets else sigmas
        self._modulations = [net.modulate(time) for net in nets]
        self._tokens = [net.embed(one.latents, dit.x_pad_token) for net, one in zip(nets, steering.inputs, strict=True)]

    def step(self, i: int) -> list[Controlled]:
        """Those that have a say in step `i`. Only for while the DiT is in use: the modules may be others later."""
        if i not in self._steps:
            return []
        return [
            Controlled(self._residency.control(one.file), tokens, modulation.step(i), one.scale, self._steering.kind)
            for one, tokens, modulation in zip(self._steering.inputs, self._tokens, self._modulations, strict=True)
        ]
