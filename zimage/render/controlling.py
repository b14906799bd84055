"""What ControlNets read of control pictures, and in which steps they have a say.

    control picture ─ fitted ─ edges, if asked for ─ VAE ─→ 16 channels ┐
    mask, 1 = keep ─ nearest ─────────────────────────────→ 1           ├→ 33, or only the first 16
    picture, 0 where it is repainted ─ VAE ───────────────→ 16          ┘

Latents are the posterior's mode, scaled. Without inpainting the last 17 channels are 0. Each pass has its own size, and
so its own latents; they are computed before the DiT is loaded.

Shapes: images (1, 3, H, W) in [−1, 1], masks (1, 1, H, W) with 1 = repaint, latents (B, C, h, w).
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zimage.dit.control import Controlled, Flow
from zimage.dit.model import ZImageDiT
from zimage.errors import RequestError
from zimage.loading.controls import ControlFile
from zimage.loading.residency import Residency
from zimage.loading.sizes import ComponentSizes
from zimage.pictures.canny import canny
from zimage.pictures.image import fit, from_pil
from zimage.render.job import Job
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
    """ControlNets over a run that begins with step `first`.

    They have a say in the steps that lie wholly between two fractions of those that run, as in diffusers: in step k of
    n, counted from 0, where start ≤ k/n and (k + 1)/n ≤ end. `flow` is as `zimage.dit.control` has it.
    """

    inputs: Sequence[ControlInput] = ()
    start: float = 0.0
    end: float = 1.0
    flow: Flow = "publisher"
    first: int = 0

    @classmethod
    def of(cls, request: Request, inputs: Sequence[ControlInput], first: int) -> "Steering":
        kind: Flow = "diffusers" if request.control_flow == "diffusers" else "publisher"
        return cls(inputs, request.control_start, request.control_end, kind, first)

    def has_say(self, step: int, steps: int) -> bool:
        """In step number `step` of a schedule of `steps`."""
        k, n = step - self.first, steps - self.first
        return self.start <= k / n and (k + 1) / n <= self.end


NOTHING = Steering()


# ------------------------------------------------------------------ pictures


def pictures(job: Job, mask: Tensor | None) -> list[Tensor]:
    """The images that the VAE encodes for a job's last pass: distinct control pictures, then the masked picture."""
    request, (width, height, _) = job.request, job.passes[-1]
    found = [from_pil(_prepared(control.picture.picture, request, width, height)) for control in _distinct(request)]
    if mask is not None and any(control.model.reads_mask for control in request.control or ()):
        assert request.image is not None  # a mask has one
        found.append(request.image.tensor(width, height) * (1 - mask))
    return found


def inputs(job: Job, encoded: Sequence[Tensor], mask: Tensor | None) -> list[ControlInput]:
    """What each of a job's controls reads, from the latents (1, 16, h, w) of `pictures`."""
    request = job.request
    latents = {control.picture.hash: one for control, one in zip(_distinct(request), encoded, strict=False)}
    masked = len(encoded) > len(latents)
    rest = inpainting_channels(mask, encoded[-1]) if masked and mask is not None else None
    return [
        ControlInput(control.model, widened(latents[control.picture.hash], control.model, rest), control.scale)
        for control in request.control or ()
    ]


def control_input(given: GivenControl, noise: Tensor, dit: ComponentSizes) -> ControlInput:
    """What a library user passes for a run from this noise (B, 16, h, w), checked. Raises RequestError."""
    path, latents, scale = vars(Control(*given)).values()
    file = ControlFile.of(path)
    file.check(dit)
    if latents.ndim != 4 or latents.shape[-2:] != noise.shape[-2:] or len(latents) not in (1, len(noise)):
        wanted = f"(1 or {len(noise)}, channels, {noise.shape[-2]}, {noise.shape[-1]})"
        text = f"control latents {tuple(latents.shape)} of {file.name} should be {wanted}"
        raise RequestError(text, fields=("control",))
    return ControlInput(file, widened(latents, file), scale)


def inpainting_channels(mask: Tensor, masked: Tensor) -> Tensor:
    """(1, 17, h, w): where the picture is kept, and the latents (1, 16, h, w) of the masked picture."""
    keep = F.interpolate(1 - mask, masked.shape[-2:], mode="nearest")
    return torch.cat((keep.to(masked), masked), dim=1)


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


def starts_from_noise(request: Request) -> bool:
    """Whether an inpainting run is diffusers': from noise alone, where only the ControlNet knows the picture."""
    masked = request.mask is not None and request.control_flow == "diffusers"
    return masked and any(control.model.reads_mask for control in request.control or ())


def _distinct(request: Request) -> list[Control]:
    return list({control.picture.hash: control for control in request.control or ()}.values())


def _prepared(picture: Image.Image, request: Request, width: int, height: int) -> Image.Image:
    """Fitted to the pass first: edges that are scaled are no edges any more."""
    fitted = fit(picture, width, height)
    return PREPROCESS[request.control_preprocess](fitted) if request.control_preprocess else fitted


# ------------------------------------------------------------------ steps


class Beside:
    """The ControlNets of one batch: control pictures embedded once, the modulation of all steps computed once."""

    def __init__(self, steering: Steering, residency: Residency, dit: ZImageDiT, sigmas: Tensor):
        """`sigmas` (steps,) are those of every step. The DiT must be in use, with the files."""
        self._steering, self._residency, self._steps = steering, residency, len(sigmas)
        nets = [residency.control(one.file) for one in steering.inputs]
        time = dit.time(sigmas) if nets else sigmas
        self._modulations = [net.modulate(time) for net in nets]
        self._tokens = [net.embed(one.latents, dit.x_pad_token) for net, one in zip(nets, steering.inputs, strict=True)]

    def step(self, i: int) -> list[Controlled]:
        """Those that have a say in step `i`. Only for while the DiT is in use: the modules may be others later."""
        if not self._steering.has_say(i, self._steps):
            return []
        return [
            Controlled(self._residency.control(one.file), tokens, modulation.step(i), one.scale, self._steering.flow)
            for one, tokens, modulation in zip(self._steering.inputs, self._tokens, self._modulations, strict=True)
        ]
