"""A job: one request with nothing left open, as plain data.

`ZImage.prepare` makes it, and all that is decided is decided there, once: defaults, texts and their tokens, seeds,
which LoRAs at which scale, the memory plan. It travels whole: two jobs on one pipeline cannot see each other's plan or
LoRAs, and a queue may keep it as JSON.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from zimage import flow
from zimage.errors import RequestError
from zimage.loading.files import ModelFiles
from zimage.loading.loras import LoraUse
from zimage.loading.plan import MemoryPlan, Workload
from zimage.loading.planner import Planner
from zimage.pictures.image import InputPicture, open_image, open_mask
from zimage.render.conditioning import ChatParts, Text, Texts
from zimage.render.defaults import filled, first_pass_size
from zimage.settings.declared import Request
from zimage.text.embeddings import Embeddings

EMBEDDED = ""  # the text of embeddings: no formatted prompt is empty
OPENERS = {"image": open_image, "mask": open_mask}


class Pass(NamedTuple):
    """One pass of denoising: its size in pixels, and how its pictures are cut for decoding."""

    width: int
    height: int
    tile_mode: str


@dataclass(frozen=True)
class Job:
    """A request as it will run.

    `texts` are what the text encoder reads for the prompts, one each (EMBEDDED where embeddings stand in their place),
    and `negative_texts` the one that guidance steers away from, if there is guidance. `token_ids` has every distinct
    text once; `passes` are one, or two with `hires`; `sigmas` the noise levels, falling from 1 to 0; `seeds` one per
    image; `model` is the fingerprint of the model that it was prepared for.
    """

    request: Request
    texts: tuple[str, ...]
    negative_texts: tuple[str, ...]
    token_ids: Mapping[str, tuple[int, ...]]
    passes: tuple[Pass, ...]
    sigmas: tuple[float, ...]
    seeds: tuple[int, ...]
    loras: tuple[LoraUse, ...]
    plan: MemoryPlan
    model: str

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Tokens of each prompt's text, or of the embeddings in their place."""
        embeddings = self.request.embeddings
        return tuple(len(embeddings.caption if t == EMBEDDED else self.token_ids[t]) for t in self.texts)

    @property
    def count(self) -> int:
        """Images in all."""
        return len(self.seeds)

    def text(self, formatted: str) -> Text:
        """One of its texts, as an encoder takes it."""
        return Text(formatted, self.token_ids[formatted], self.request.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them: pictures and embeddings by the hash of their content, and by path."""
        return {
            "request": {**self.request.to_mapping(), **{n: _pointed(x) for n, x in _attachments(self.request).items()}},
            "texts": list(self.texts),
            "negative_texts": list(self.negative_texts),
            "token_ids": {text: list(ids) for text, ids in self.token_ids.items()},
            "passes": [list(one) for one in self.passes],
            "sigmas": list(self.sigmas),
            "seeds": list(self.seeds),
            "loras": [{**use.describe(), "path": use.path} for use in self.loras],
            "plan": self.plan.to_dict(),
            "model": self.model,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], attachments: Mapping[str, Any] | None = None) -> "Job":
        """The inverse of `to_dict`. `attachments` are pictures and embeddings by hash; others are read at their paths.

        Raises RequestError where something is missing, changed, or not a job.
        """
        try:
            values = {name: value for name, value in plain["request"].items() if value is not None}
            opened = {n: _opened(n, values[n], attachments or {}) for n in (*OPENERS, "embeddings") if n in values}
            job = cls(
                Request.from_mapping({**values, **opened}),
                tuple(plain["texts"]),
                tuple(plain["negative_texts"]),
                {text: tuple(ids) for text, ids in plain["token_ids"].items()},
                tuple(Pass(*one) for one in plain["passes"]),
                tuple(map(float, plain["sigmas"])),
                tuple(plain["seeds"]),
                tuple(LoraUse(use["name"], use["scale"], use["hash"], use["path"]) for use in plain["loras"]),
                MemoryPlan.from_dict(plain["plan"]),
                plain["model"],
            )
            job._check()
            return job
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"these values are not a job ({error}); pass what Job.to_dict returned") from error

    def _check(self) -> None:
        """Raise ValueError unless the parts belong together: what is read from JSON may be anything."""
        whole = [
            *self.seeds,
            *(side for one in self.passes for side in one[:2]),
            *itertools.chain(*self.token_ids.values()),
        ]
        if not all(type(number) is int for number in whole) or len(self.seeds) != self.request.count:
            raise ValueError("its seeds, sizes or tokens are not the whole numbers that its request needs")
        if len(self.sigmas) < 2 or not all(2 > a >= b >= 0 for a, b in itertools.pairwise(self.sigmas)):
            raise ValueError("its sigmas do not fall from about 1 to 0")
        if set(self.token_ids) != {*self.texts, *self.negative_texts} or not self.passes:
            raise ValueError("its texts and their tokens do not belong together")


def decide(
    request: Request,
    model: ModelFiles,
    texts: Texts,
    planner: Planner,
    loras: tuple[LoraUse, ...],
    loaded: tuple[str, ...],
    must_fit: bool,
) -> Job:
    """The job that a request makes, on what is free when the `loaded` components are let go.

    Raises RequestError or CheckpointError; for one that does not fit in memory only where it `must_fit`.
    """
    parts = texts.parts(request)
    values = filled(request, model, parts)
    prompts = (EMBEDDED,) if request.embeddings is not None else tuple(map(parts.format, request.prompts))
    # A negative prompt takes no chat parts: what it has in common with the prompt, guidance would cancel.
    plain = ChatParts(strip_quotes=request.strip_quotes)
    negatives = (plain.format(values["negative"]),) if values["guidance"] > 0 else ()
    ids = {text: texts.tokenize(text) if text else () for text in dict.fromkeys((*prompts, *negatives))}
    embeddings, width, height = values["embeddings"], values["width"], values["height"]
    longest = max([*map(len, ids.values()), len(embeddings.caption) if embeddings else 0])
    together = min(request.batch_size, request.count)
    work = Workload(width, height, longest, together, request.tile_mode or "", request.tile_size or 0)
    plan = planner.plan(work, loaded)
    if must_fit:
        planner.check(plan, loaded)
    passes = [Pass(width, height, plan.tile_mode)]
    if request.hires is not None:
        small = first_pass_size(width, height, request.hires)
        passes.insert(0, Pass(*small, planner.tile_mode(*small, loaded)))
    complete = dataclasses.replace(request, **values, tile_mode=plan.tile_mode)
    sigmas, seeds = flow.sigmas(values["steps"], values["shift"]).tolist(), complete.seeds
    return Job(
        complete, prompts, negatives, ids, tuple(passes), tuple(sigmas), tuple(seeds), loras, plan, model.fingerprint
    )


def first_pass(job: Job) -> Job:
    """Of a job in two passes the first, as a job of its own."""
    width, height, tile_mode = job.passes[0]
    request = dataclasses.replace(
        job.request, width=width, height=height, tile_mode=tile_mode, hires=None, strength=None
    )
    return dataclasses.replace(job, request=request, passes=job.passes[:1])


def _attachments(request: Request) -> dict[str, Any]:
    found = {name: getattr(request, name) for name in (*OPENERS, "embeddings")}
    return {name: value for name, value in found.items() if value is not None}


def _pointed(attachment: InputPicture | Embeddings) -> dict[str, str]:
    return {**attachment.describe(), "path": attachment.path}


def _opened(name: str, described: Mapping[str, str], attachments: Mapping[str, Any]) -> Any:
    given = attachments.get(described["hash"], described["path"])
    if isinstance(given, str) and not given:
        raise RequestError(
            f"{name} {described['name']!r} was given as an object; pass it as attachments={{{described['hash']!r}: …}}",
            fields=(name,),
        )
    found = Embeddings.of(given) if name == "embeddings" else InputPicture.of(given, OPENERS[name])
    if found.hash != described["hash"]:
        raise RequestError(f"{name} {given} is not the file that the job was prepared with", fields=(name,))
    return found
