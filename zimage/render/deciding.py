"""From a request to its job: all that is left open is decided here, once."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from zimage import flow
from zimage.errors import RequestError
from zimage.loading.controls import with_controls
from zimage.loading.files import ModelFiles
from zimage.loading.loras import Adapters, bytes_beside
from zimage.loading.plan import Workload
from zimage.loading.planner import Planner
from zimage.loading.registry import DIT, VAE
from zimage.loading.sizes import ComponentSizes
from zimage.pictures.canny import opencv
from zimage.pictures.image import first_pass_size
from zimage.pictures.inpaint import Frame
from zimage.render import canvas
from zimage.render.budget import check_guidance, guidance_of
from zimage.render.conditioning import ChatParts, Texts
from zimage.render.defaults import filled
from zimage.render.job import EMBEDDED, Job, Pass, starts_from_noise
from zimage.render.seeing import Vision, glimpses, references, with_references
from zimage.settings.declared import Request
from zimage.settings.sampling import split_sigmas
from zimage.text.emphasis import Emphasis, Weighed


def decide(
    request: Request,
    model: ModelFiles,
    texts: Texts,
    planner: Planner,
    loras: Adapters,
    loaded: Mapping[str, int],
    facts: Mapping[str, str],
    must_fit: bool,
    vision: Vision | None = None,
) -> Job:
    """The job that a request makes, on what is free when the `loaded` components are let go and return these bytes.

    Raises RequestError or CheckpointError; for one that does not fit in memory only where it `must_fit`.
    """
    parts = texts.parts(request)
    values, frame = filled(request, model, parts, loras)
    prompts, negatives, ids, emphasis = _written(request, values["negative"], parts, texts)
    embeddings, width, height = values["embeddings"], values["width"], values["height"]
    lengths = {text: len(tokens) if text else len(embeddings.caption) for text, tokens in ids.items()}
    texts.warn_of_length(longest := max(lengths.values()), request.long_prompt)
    found = references(values["reference"], request, model, vision)
    away = max(lengths[text] for text in negatives) if request.nag > 1 else 0
    work = _workload(request, values, longest, away, loras, planner.sizes[DIT])
    work = with_references(work, request, found, [lengths[text] for text in prompts], texts.limit)
    plan = planner.plan(work, loaded)
    if must_fit:
        planner.check(plan, loaded)
    complete = dataclasses.replace(request, **values, tile_mode=plan.tile_mode)
    passes = _passes(complete, width, height, planner, loaded)
    levels, seeds, seen = _levels(request, values), tuple(complete.seeds), glimpses(found)
    _check_control(complete)
    begins = _beginnings(complete, len(levels) - 1, passes, frame, model)
    _check_say(complete, len(levels) - 1, begins)
    check_guidance(guidance_of(complete), levels, begins, model.config(DIT).n_layers)
    sigmas = tuple(levels.tolist())
    return Job(
        complete, prompts, negatives, ids, emphasis, seen, passes, frame, sigmas, begins, seeds, loras, plan, **facts
    )


class _Written(NamedTuple):
    """What is read of a request, as its job has it."""

    texts: tuple[str, ...]
    negative_texts: tuple[str, ...]
    token_ids: dict[str, tuple[int, ...]]
    emphasis: tuple[tuple[Emphasis, ...], ...]


def _written(request: Request, negative: str | None, parts: ChatParts, texts: Texts) -> _Written:
    """The texts of the prompts and of the negative one, if there is any, with the weights that stand in them."""
    prompts = [Weighed(EMBEDDED)] if request.embeddings is not None else list(map(parts.weigh, request.prompts))
    # A negative prompt takes no chat parts: what it has in common with the prompt, guidance would cancel.
    plain = ChatParts(strip_quotes=request.strip_quotes, weights_in_prompt=request.weights_in_prompt)
    negatives = [] if negative is None else [plain.weigh(negative)]
    emphasis = tuple(map(texts.emphases, (*prompts, *negatives)))
    own, away = (tuple(one.text for one in several) for several in (prompts, negatives))
    every = (*own, *away, *(mark.without for marks in emphasis for mark in marks))
    return _Written(own, away, {t: texts.tokenize(t) if t else () for t in dict.fromkeys(every)}, emphasis)


def _levels(request: Request, values: Mapping[str, Any]) -> Tensor:
    """The noise levels (steps + 1,) of a request with these values filled in."""
    if request.sigmas is not None:
        return flow.exact(split_sigmas(request.sigmas))
    return flow.sigmas(values["steps"], values["shift"], values["schedule"])


def _workload(
    request: Request, values: Mapping[str, Any], tokens: int, away: int, loras: Adapters, dit: ComponentSizes
) -> Workload:
    """That of a request with these values filled in, but for its references; `away` are the tokens that NAG adds."""
    width, height, together = values["width"], values["height"], min(request.batch_size, request.count)
    mode, size = request.tile_mode or "", request.tile_size or 0
    work = Workload(width, height, tokens, together, mode, size, loras=bytes_beside(loras, dit.dtype), nag_tokens=away)
    return with_controls(work, tuple(control.model for control in values["control"] or ()), dit)


def _passes(request: Request, width: int, height: int, planner: Planner, loaded: Mapping[str, int]) -> tuple[Pass, ...]:
    """One, or with `hires` two, each with its way of decoding."""
    last = Pass(width, height, request.tile_mode or "off")
    if request.hires is None:
        return (last,)
    small = first_pass_size(width, height, request.hires)
    return Pass(*small, planner.tile_mode(*small, loaded)), last


def _check_control(request: Request) -> None:
    """Raise RequestError where control pictures cannot be made, or the strength would have no say."""
    if request.control_preprocess:
        opencv()
    if starts_from_noise(request) and request.strength != 1:
        text = f"strength {request.strength}: diffusers' flow inpaints from noise alone; leave it out, or control_flow"
        raise RequestError(text, fields=("strength", "control_flow"))


def _beginnings(
    request: Request, steps: int, passes: tuple[Pass, ...], frame: Frame, model: ModelFiles
) -> tuple[int, ...]:
    """The step with which each pass begins."""
    width, height, _ = passes[-1]
    first = 0 if request.strength is None else flow.first_step(steps, request.strength)
    if request.image is not None and not starts_from_noise(request):
        factor = model.skeleton(VAE).spatial_factor
        first = canvas.Rendered(request, frame, width, height).first_step(
            first, steps, height // factor, width // factor
        )
    return (0, first)[-len(passes) :]


def _check_say(request: Request, steps: int, begins: Sequence[int]) -> None:
    """Raise RequestError where controls have a say in no step of any pass."""
    start, end = request.control_start, request.control_end
    if not request.control or (start, end) == (0, 1):
        return
    if not any(flow.steps_between(begin, steps, start, end) for begin in begins):
        n = steps - begins[-1]
        text = (
            f"control_start {start:g} and control_end {end:g} hold none of the {n} steps whole; each is 1/{n} of them"
        )
        raise RequestError(text, fields=("control_start", "control_end"))
