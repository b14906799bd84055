"""What a request leaves open, filled in from the model's kind, the template and the picture it starts from."""

import dataclasses
import secrets

from zimage.errors import RequestError
from zimage.loading.files import Model
from zimage.pictures.image import natural_size, open_image, open_mask
from zimage.pictures.source import Source
from zimage.render.conditioning import Captions
from zimage.settings.declared import SIZE_MULTIPLE, STRENGTH, Request
from zimage.settings.fields import either
from zimage.text.embeddings import Embeddings

BASE_SHIFT = 6.0  # the shift that tells the undistilled Base checkpoint from Turbo
USUAL_SIDE = 1024


def complete(request: Request, model: Model, captions: Captions) -> Request:
    """The request with all but `tile_mode` filled in and its files opened. Raises RequestError or CheckpointError."""
    request = captions.filled(_opened(request, model))
    is_base = model.shift is not None and model.shift >= BASE_SHIFT
    guidance = either(request.guidance, 4.0 if is_base else 0.0)
    width, height = _size(request, model)
    return dataclasses.replace(
        request,
        width=width,
        height=height,
        steps=either(request.steps, 30 if is_base else 8),
        guidance=guidance,
        negative=request.negative if guidance == 0 else either(request.negative, ""),
        shift=find_shift(model, request.shift),
        seed=either(request.seed, secrets.randbelow(2**32)),
        strength=_strength(request),
        hidden_layer=None if request.layer_weights else next(iter(request.layers)),
    )


def find_shift(model: Model, given: float | None) -> float:
    """The shift that is given, or the checkpoint's. Raises RequestError where there is neither."""
    shift = either(given, model.shift)
    if shift is None:
        raise RequestError(
            f"{model.origin} has no schedule; give the shift (3 for Turbo, 6 for Base) or, for loose files, the variant"
        )
    return shift


def first_pass(request: Request) -> Request:
    """Of a resolved request in two passes the first, at the size divided by `hires`."""
    sides = (max(1, round(side / request.hires / SIZE_MULTIPLE)) for side in (request.width, request.height))
    width, height = (n * SIZE_MULTIPLE for n in sides)
    return dataclasses.replace(request, width=width, height=height, hires=None, strength=None)


def _opened(request: Request, model: Model) -> Request:
    image, mask, embeddings = request.image, request.mask, request.embeddings
    width = model.skeleton("text_encoder").config.hidden_size
    return dataclasses.replace(
        request,
        image=None if image is None else Source.of(image, open_image),
        mask=None if mask is None else Source.of(mask, open_mask),
        embeddings=None if embeddings is None else Embeddings.of(embeddings, width),
    )


def _size(request: Request, model: Model) -> tuple[int, int]:
    """What was given; else the picture's own, in its proportions where one side was given; else the checkpoint's."""
    if request.image is None:
        side = min(getattr(model.skeleton("vae").config, "sample_size", USUAL_SIDE), USUAL_SIDE)
        return either(request.width, side), either(request.height, side)
    wide, high = request.image.picture.size
    if request.width and request.height:
        return request.width, request.height
    if request.width:
        return request.width, _multiple(request.width * high / wide)
    if request.height:
        return _multiple(request.height * wide / high), request.height
    return natural_size(request.image.picture)


def _strength(request: Request) -> float | None:
    """What is behind a mask is painted anew altogether; both as the reference does."""
    if request.image is None and request.hires is None:
        return None
    return either(request.strength, STRENGTH if request.mask is None else 1.0)


def _multiple(side: float) -> int:
    return max(1, round(side / SIZE_MULTIPLE)) * SIZE_MULTIPLE
