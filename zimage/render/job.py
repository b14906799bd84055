"""A job: one request with nothing left open, as plain data.

`ZImage.prepare` makes it, and all that is decided is decided there, once: defaults, texts and their tokens, seeds,
which LoRAs at which scale, the memory plan. It travels whole: two jobs on one pipeline cannot see each other's plan or
LoRAs, and a queue may keep it as JSON.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from zimage.errors import RequestError
from zimage.loading.controls import ControlFiles
from zimage.loading.loras import LoraUse
from zimage.loading.plan import PLAN, MemoryPlan
from zimage.pictures.inpaint import Frame
from zimage.render import attached, canvas
from zimage.render.budget import evaluations
from zimage.render.conditioning import Text
from zimage.render.seeing import Glimpse
from zimage.settings.declared import Request
from zimage.settings.fields import Hint, Plain
from zimage.settings.plain import mistake
from zimage.text.emphasis import Emphasis

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


def control_files(request: Request) -> ControlFiles:
    """The files of a prepared request's controls, one for each."""
    return tuple(control.model for control in request.control or ())


def starts_from_noise(request: Request) -> bool:
    """Whether an inpainting run is diffusers': from noise alone, where only the ControlNet knows the picture."""
    masked = request.mask is not None or request.extend is not None
    reads = any(file.reads_mask for file in control_files(request))
    return masked and reads and request.control_flow == "diffusers"


def first_pass(job: Job) -> Job:
    """The first pass of a job in two passes, as a job of its own."""
    return dataclasses.replace(job, passes=job.passes[:1])
