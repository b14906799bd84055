"""A job: one request with nothing left open, as plain data.

`ZImage.prepare` makes it, and all that is decided is decided there, once: defaults, texts and their tokens, seeds,
which LoRAs at which scale, the memory plan. It travels whole: two jobs on one pipeline cannot see each other's plan or
LoRAs, and a queue may keep it as JSON.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zimage import flow
from zimage.errors import RequestError
from zimage.loading.controls import ControlFiles, with_controls
from zimage.loading.files import ModelFiles
from zimage.loading.loras import Adapters, LoraUse, bytes_beside
from zimage.loading.plan import PLAN, MemoryPlan, Workload
from zimage.loading.planner import Planner
from zimage.loading.registry import DIT, VAE
from zimage.loading.sizes import ComponentSizes
from zimage.pictures.canny import opencv
from zimage.pictures.image import first_pass_size
from zimage.pictures.inpaint import Frame
from zimage.render import attached, canvas
from zimage.render.budget import check_guidance, evaluations, guidance_of
from zimage.render.conditioning import ChatParts, Text, Texts
from zimage.render.defaults import filled
from zimage.render.seeing import Glimpse, Vision, glimpses, references, with_references
from zimage.settings.declared import Request
from zimage.settings.fields import Hint, Plain
from zimage.settings.plain import mistake
from zimage.settings.sampling import split_sigmas
from zimage.text.emphasis import Emphasis, Weighed

FACTS = ("model", "dtype", "precision")  # of the pipeline: with others the bits would be others
# What a render's bits come from; LoRAs and sizes are compared by themselves, plan and strips may follow the memory.
DECIDED = ("texts", "negative_texts", "token_ids", "emphasis", "glimpses", "frame", "sigmas", "begins", "seeds")
EMBEDDED = ""  # the text of embeddings: no formatted prompt is empty
# What a job is as plain values, for `mistake`; the fields of its request check themselves.
JOB: dict[str, Hint] = {
    "request": dict[str, Any],
    "texts": list[str],
    "negative_texts": list[str],
    "token_ids": dict[str, list[int]],
    "emphasis": list[list[tuple[float, str, list[int]]]],
    "glimpses": list[tuple[str, int, float]],
    "passes": list[tuple[int, int, str]],
    "frame": tuple[int, int, int, int, int, int],
    "sigmas": list[float],
    "begins": list[int],
    "seeds": list[int],
    "loras": list[LoraUse],
    "plan": PLAN,
    **dict.fromkeys(FACTS, str),
}


class Pass(NamedTuple):
    """One pass of denoising: its size in pixels, and how its pictures are cut for decoding."""

    width: int
    height: int
    tile_mode: str


@dataclass(frozen=True, eq=False)
class Job:
    """A request as it will run.

    `texts` are what the text encoder reads for the prompts, one each (EMBEDDED where embeddings stand in their place),
    and `negative_texts` the one that guidance or NAG steers away from, if there is any. `token_ids` has every distinct
    text once, also those that are read because of weights in a prompt; `emphasis` has these weights for each of
    `texts`, then of `negative_texts`; `glimpses` are the captions of pictures that are mixed in; `passes` are one, or
    two with `hires`; `frame` is the part of a picture that is rendered: all of it, but for inpainting; `sigmas` the
    noise levels, falling to 0; `begins` the step with which each pass begins; `seeds` one per image; `model`, `dtype`
    and `precision` are those that it was prepared for.
    """

    request: Request
    texts: tuple[str, ...]
    negative_texts: tuple[str, ...]
    token_ids: Mapping[str, tuple[int, ...]]
    emphasis: tuple[tuple[Emphasis, ...], ...]
    glimpses: tuple[Glimpse, ...]
    passes: tuple[Pass, ...]
    frame: Frame
    sigmas: tuple[float, ...]
    begins: tuple[int, ...]
    seeds: tuple[int, ...]
    loras: tuple[LoraUse, ...]
    plan: MemoryPlan
    model: str
    dtype: str
    precision: str

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Tokens of each prompt's text, or of the embeddings in their place."""
        embeddings = self.request.embeddings
        return tuple(len(embeddings.caption if t == EMBEDDED else self.token_ids[t]) for t in self.texts)

    @property
    def count(self) -> int:
        """Images in all."""
        return len(self.seeds)

    @property
    def evaluations(self) -> int:
        """How many evaluations of the DiT a picture takes, in all passes."""
        return evaluations(self.request, torch.tensor(self.sigmas), self.begins)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the pictures that come out."""
        return self.frame.size

    def rendered(self) -> canvas.Rendered:
        """The picture that the last pass starts from and its mask, at the size of that pass, computed at each call.

        Only for a request with an image.
        """
        return canvas.Rendered(self.request, self.frame, *self.passes[-1][:2])

    def text(self, formatted: str) -> Text:
        """One of its texts, as an encoder takes it."""
        return Text(formatted, self.token_ids[formatted], self.request.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them: pictures and embeddings by the hash of their content, and by path."""
        return {
            "request": {**self.request.to_mapping(), **attached.pointed(self.request)},
            "texts": list(self.texts),
            "negative_texts": list(self.negative_texts),
            "token_ids": {text: list(ids) for text, ids in self.token_ids.items()},
            "emphasis": [[[m.weight, m.without, list(m.tokens)] for m in marks] for marks in self.emphasis],
            "glimpses": [list(one) for one in self.glimpses],
            "passes": [list(one) for one in self.passes],
            "frame": list(self.frame),
            "sigmas": list(self.sigmas),
            "begins": list(self.begins),
            "seeds": list(self.seeds),
            "loras": [{**use.describe(), "path": use.path} for use in self.loras],
            "plan": self.plan.to_dict(),
            **{name: getattr(self, name) for name in FACTS},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], attachments: Mapping[str, Any] | None = None) -> "Job":
        """The inverse of `to_dict`. `attachments` are pictures and embeddings by hash; others are read at their paths.

        `ZImage.run` checks it against what it would decide itself. Raises RequestError where something is missing,
        changed, or not a job, and CheckpointError for damaged embeddings.
        """
        if fault := job_mistake(plain):
            raise RequestError(f"these values are not a job ({fault}); pass what Job.to_dict returned")
        values = {name: value for name, value in plain["request"].items() if value is not None}
        opened = attached.reopened(values, attachments or {})
        return cls(
            Request.from_mapping({**values, **opened}),
            tuple(plain["texts"]),
            tuple(plain["negative_texts"]),
            {text: tuple(ids) for text, ids in plain["token_ids"].items()},
            tuple(tuple(Emphasis(w, text, tuple(ids)) for w, text, ids in marks) for marks in plain["emphasis"]),
            tuple(Glimpse(*one) for one in plain["glimpses"]),
            tuple(Pass(*one) for one in plain["passes"]),
            Frame(*plain["frame"]),
            tuple(map(float, plain["sigmas"])),
            tuple(plain["begins"]),
            tuple(plain["seeds"]),
            tuple(LoraUse(use["name"], use["scale"], use["hash"], use["path"]) for use in plain["loras"]),
            MemoryPlan.from_dict(plain["plan"]),
            *(plain[name] for name in FACTS),
        )

    def differs(self, other: "Job") -> str:
        """The first thing that was decided otherwise, in words; empty where the two draw the same."""
        for name in DECIDED:
            if getattr(self, name) != getattr(other, name):
                return name.replace("_", " ")
        same_sizes = [one[:2] for one in self.passes] == [one[:2] for one in other.passes]
        return "" if same_sizes and self.passes[-1] == other.passes[-1] else "passes"


def job_mistake(plain: Plain) -> str:
    """What of plain values is not as `Job.to_dict` returns them, in words; empty where they are."""
    if fault := mistake(plain, JOB, "job"):
        return fault
    if fault := attached.fault(plain["request"]):
        return fault
    texts = [*plain["texts"], *plain["negative_texts"], *(text for marks in plain["emphasis"] for _, text, _ in marks)]
    missing = [text for text in texts if text not in plain["token_ids"]]
    empty = [name for name in ("texts", "passes", "sigmas", "begins", "seeds") if not plain[name]]
    return f"job.{empty[0]} is empty" if empty else "job.token_ids lacks a text" if missing else ""


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
    work = _workload(request, values, longest, loras, planner.sizes[DIT])
    work = dataclasses.replace(
        work, nag_tokens=max(map(lengths.__getitem__, negatives), default=0) if request.nag > 1 else 0
    )
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
    request: Request, values: Mapping[str, Any], tokens: int, loras: Adapters, dit: ComponentSizes
) -> Workload:
    """That of a request with these values filled in, but for its references."""
    width, height, together = values["width"], values["height"], min(request.batch_size, request.count)
    mode, size = request.tile_mode or "", request.tile_size or 0
    work = Workload(width, height, tokens, together, mode, size, loras=bytes_beside(loras, dit.dtype))
    return with_controls(work, tuple(control.model for control in values["control"] or ()), dit)


def _passes(request: Request, width: int, height: int, planner: Planner, loaded: Mapping[str, int]) -> tuple[Pass, ...]:
    """One, or with `hires` two, each with its way of decoding."""
    last = Pass(width, height, request.tile_mode or "off")
    if request.hires is None:
        return (last,)
    small = first_pass_size(width, height, request.hires)
    return Pass(*small, planner.tile_mode(*small, loaded)), last


def control_files(request: Request) -> ControlFiles:
    """The files of a prepared request's controls, one for each."""
    return tuple(control.model for control in request.control or ())


def starts_from_noise(request: Request) -> bool:
    """Whether an inpainting run is diffusers': from noise alone, where only the ControlNet knows the picture."""
    masked = request.mask is not None or request.extend is not None
    reads = any(file.reads_mask for file in control_files(request))
    return masked and reads and request.control_flow == "diffusers"


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


def first_pass(job: Job) -> Job:
    """The first pass of a job in two passes, as a job of its own."""
    return dataclasses.replace(job, passes=job.passes[:1])
