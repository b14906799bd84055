"""What a request leaves open, filled in from the model's kind, the template and the picture it starts from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from zimage.errors import RequestError
from zimage.loading.files import ModelFiles
from zimage.loading.loras import Adapter, Adapters, LoraUse
from zimage.loading.registry import VAE
from zimage.pictures.image import nearest_side
from zimage.pictures.inpaint import Frame, whole
from zimage.render import attached
from zimage.render.canvas import placed
from zimage.render.conditioning import ChatParts
from zimage.settings.declared import CONTROL_FLOWS, STRENGTH, Request, split_aspect
from zimage.settings.fields import either
from zimage.settings.guiding import GuidanceMethod
from zimage.settings.presets import BASE, TURBO, Values, names_of, preset_values
from zimage.settings.sampling import drawn_seed, is_open, split_sigmas, split_variation

BASE_SHIFT = 6.0  # the shift that tells the undistilled Base checkpoint from Turbo
USUAL_SIDE = 1024
USUAL: dict[str, Values] = {
    TURBO: {"sampler": "euler", "schedule": "simple", "steps": 8, "guidance": 0.0},
    BASE: {"sampler": "euler", "schedule": "simple", "steps": 30, "guidance": 4.0},
}


def filled(request: Request, model: ModelFiles, parts: ChatParts, loras: Adapters = ()) -> tuple[dict[str, Any], Frame]:
    """Everything that a request leaves open but `tile_mode`, its files opened; and the frame of what it renders.

    Raises RequestError, CheckpointError.
    """
    usual = _usual(request, kind_of(model), loras)
    guidance = either(request.guidance, usual["guidance"])
    attachments = attached.opened(request, model)
    width, height, frame = _placed(_sized(request, usual_side(model)), attachments, usual_side(model))
    values = {
        **parts._asdict(),
        **attachments,
        "width": width,
        "height": height,
        "aspect": None,  # the sides say it
        **_schedule(request, model, usual),
        "sampler": either(request.sampler, usual["sampler"]),
        "guidance": guidance,
        "guidance_method": GuidanceMethod.parse(either(request.guidance_method, "cfg")).describe(),
        "negative": either(request.negative, "") if guidance > 0 or request.nag > 1 else request.negative,
        "seed": [*map(drawn_seed, seed)] if isinstance(seed := request.seed, list) else drawn_seed(seed),
        "variation": _variation(request),
        "strength": _strength(request),
        "control_flow": either(request.control_flow, CONTROL_FLOWS[0]) if request.control else None,
        "hidden_layer": None if request.layer_weights else next(iter(request.layers)),
    }
    return values, frame


def _usual(request: Request, kind: str, loras: Adapters) -> Values:
    """What is taken where a request leaves it open: what its preset says, else its adapters, else its checkpoint."""
    known = [a.file.known for a in loras if a.scale and a.file.known and a.file.known.kind == kind]
    asked = {name: value for one in known for name, value in one.asks.items()}
    return {**USUAL[kind], **asked, **_of_preset(request, kind)}


def _of_preset(request: Request, kind: str) -> Values:
    """What its preset says; nothing where the request itself says all that, as one from a picture does."""
    decides = names_of(request.preset) if request.preset else ()
    return preset_values(request.preset, kind) if any(getattr(request, name) is None for name in decides) else {}


def adapters_told(loras: Sequence[LoraUse], model: ModelFiles) -> list[str]:
    """A line on each of a prepared job's adapters that asks for other defaults; one at scale 0 asks for nothing."""
    adapters = (lora for lora in loras if isinstance(lora, Adapter) and lora.scale)
    return [a.file.known.told(a.name, kind_of(model)) for a in adapters if a.file.known]


def _schedule(request: Request, model: ModelFiles, usual: Values) -> dict[str, Any]:
    """What noise levels come from: those that are given, else steps, a schedule and a shift."""
    if request.sigmas is not None:
        return {"steps": len(split_sigmas(request.sigmas)) - 1, "schedule": None, "shift": None}
    return {
        "steps": either(request.steps, usual["steps"]),
        "schedule": either(request.schedule, usual["schedule"]),
        "shift": find_shift(model, either(request.shift, usual.get("shift"))),
    }


def kind_of(model: ModelFiles) -> str:
    """TURBO or BASE."""
    return BASE if is_base(model) else TURBO


def is_base(model: ModelFiles) -> bool:
    """Whether a model is the undistilled one, which is made for guidance and more steps."""
    return model.shift is not None and model.shift >= BASE_SHIFT


def find_shift(model: ModelFiles, given: float | None) -> float:
    """The shift that is given, or the checkpoint's. Raises RequestError where there is neither."""
    shift = either(given, model.shift)
    if shift is None:
        raise RequestError(
            f"{model.origin} has no schedule; set the shift (3 for Turbo, 6 for Base) or, for loose files, the variant",
            fields=("shift",),
        )
    return shift


def usual_side(model: ModelFiles) -> int:
    """Width and height in pixels of a picture of no given size."""
    return min(getattr(model.config(VAE), "sample_size", USUAL_SIDE), USUAL_SIDE)


def _sized(request: Request, side: int) -> Request:
    """The request with the sides that its aspect stands for: those nearest to it with the area of a square."""
    if request.aspect is None:
        return request
    root = split_aspect(request.aspect) ** 0.5
    return dataclasses.replace(request, aspect=None, width=nearest_side(side * root), height=nearest_side(side / root))


def _placed(request: Request, attachments: dict[str, Any], side: int) -> tuple[int, int, Frame]:
    """The size of the render and its frame. Without a picture: what was given, else the checkpoint's."""
    if request.image is None:
        width, height = either(request.width, side), either(request.height, side)
        return width, height, whole((width, height))
    return placed(dataclasses.replace(request, **attachments), side)


def _variation(request: Request) -> str | None:
    """With a seed of its own where that was left open."""
    if request.variation is None:
        return None
    seed, weight = split_variation(request.variation)
    return f"{drawn_seed(seed)}:{weight}" if is_open(seed) else request.variation


def _strength(request: Request) -> float | None:
    """What is behind a mask is painted anew altogether; both as the reference does."""
    if request.image is None and request.hires is None:
        return None
    return either(request.strength, STRENGTH if request.mask is None and request.extend is None else 1.0)
