"""The denoise stage: from captions and noise to finished latents, by a solver, a schedule and guidance.

    captions ─ refine, context (once) ─┐
    noise, clean latents ─ start ──→ x ┴─ evaluate at σᵢ: branches → guided velocity ─ solver ─→ x at σᵢ₊₁ ─ keep ─┐
                                     └──────────────────────── next step ←────────────────────────────────────────┘

A hook takes the function that computes an evaluation's velocity and gives another: guidance split over devices or a
second noise prediction stand there without another pipeline.

What a run carries from step to step is its latents and what its solver and its guidance want to see again; all of it is
in every event, so that a run goes on from any step to the same bits.

Shapes: B images, L caption tokens, C caption width, h × w latents.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zimage import flow
from zimage.dit.context import Context
from zimage.dit.control import Controlled
from zimage.dit.model import Modulation, ZImageDiT
from zimage.events import Event
from zimage.loading.registry import DIT, VAE
from zimage.loading.weights import finite
from zimage.render.budget import guidance_of
from zimage.render.captioning import Conditions
from zimage.render.components import Components
from zimage.render.controlling import NOTHING, Beside, ControlInput, Steering
from zimage.render.job import Job
from zimage.render.state import PAST, RenderState

# ------------------------------------------------------------------ one evaluation


class Evaluation(NamedTuple):
    """What one velocity is computed from.

    `latents` (B, 16, h, w) fp32 stand at noise level `sigmas[step]`; a solver may evaluate at the level after a step's
    own. `negative` is None in a run without guidance; `scale` is this level's guidance, 0 where it is off, and
    `guidance` says what is made of it. `start` is where the run began, and says which cells go back to the picture.
    `carried` is what evaluations keep for later ones, by name, tensors like the latents; it is the step's own, and goes
    on with what this step reaches.
    """

    dit: ZImageDiT
    latents: Tensor
    step: int
    sigmas: Tensor  # (steps + 1,)
    modulation: Modulation
    positive: Context
    negative: Context | None
    scale: float
    guidance: flow.Guidance
    controls: Sequence[Controlled]  # ControlNets that have a say in this step
    start: flow.Start
    carried: dict[str, Tensor]
    skipped: tuple[int, ...] = ()  # the DiT's layers that it goes without

    @property
    def branches(self) -> tuple[str, ...]:
        """What the model evaluates for it."""
        if self.negative is None:
            return (flow.PROMPT,)
        first = self.start.step
        return self.guidance.branches(self.scale, self.step - first, len(self.sigmas) - 1 - first)

    def alone(self, branch: str) -> "Evaluation":
        """One of its branches, without guidance."""
        positive = self.negative if branch == flow.NEGATIVE and self.negative is not None else self.positive
        skipped = self.guidance.layers if branch == flow.SKIPPED else self.skipped
        return self._replace(positive=positive, negative=None, scale=0.0, skipped=skipped)

    def guided(self, velocities: Mapping[str, Tensor]) -> Tensor:
        """The velocity that those of its branches make, zero without any; what the method remembers is carried."""
        if not velocities:
            return torch.zeros_like(self.latents)
        guided, average = self.guidance.combine(velocities, self.scale, self.carried.get(flow.AVERAGE))
        if average is not None:
            self.carried[flow.AVERAGE] = average
        return guided


Evaluate = Callable[[Evaluation], Tensor]  # → velocity (B, 16, h, w) fp32
Hook = Callable[[Evaluate], Evaluate]


def guided_velocity(e: Evaluation) -> Tensor:
    """The model's velocity, guided where there is any guidance."""
    branches = e.branches
    if branches == (flow.PROMPT,):
        return e.dit.velocity(e.latents, e.modulation, e.positive, e.controls, e.skipped)
    return e.guided({branch: guided_velocity(e.alone(branch)) for branch in branches})


# ------------------------------------------------------------------ one batch


class Sampling(NamedTuple):
    """How a batch is drawn; `seeds` are those of its images, from which whatever is random after the start comes.

    `variety` is that of `flow.varied`, `nag` the scale of normalised attention guidance (`dit.nag`), 1 where it is off.
    """

    sampler: str = "euler"
    guidance: flow.Guidance = flow.Guidance()
    seeds: Sequence[int] = ()
    variety: float = 0.0
    nag: float = 1.0

    @classmethod
    def of(cls, job: Job, batch: Sequence[int]) -> "Sampling":
        """That of some of a job's images."""
        request = job.request
        variety = request.variety if len(job.passes) == 1 else 0.0  # the first of two passes decides on the picture
        seeds = [job.seeds[i] for i in batch]
        return cls(request.solver, guidance_of(request), seeds, variety, request.nag)


class Reached(NamedTuple):
    """Where a run stands before step number `step`: its latents, and by name what else that step needs, like them."""

    step: int
    latents: Tensor
    carried: Mapping[str, Tensor]


class _Batch:
    """The steps of one batch. Between them it holds no component: one that is let go is gone."""

    def __init__(
        self,
        components: Components,
        start: flow.Start,
        sigmas: Tensor,
        sampling: Sampling,
        steering: Steering,
        hooks: Sequence[Hook],
    ):
        self.components, self.sigmas, self.sampling, self.steering = components, sigmas, sampling, steering
        self.start = start.to(components.device(DIT))
        self.solver = flow.SOLVERS[sampling.sampler]
        self.noise = flow.StepNoise(sampling.seeds, self.start.latents, start.step) if self.solver.draws else None
        self.evaluate: Evaluate = guided_velocity
        for hook in hooks:
            self.evaluate = hook(self.evaluate)

    def condition(self, positive: Sequence[Tensor], negative: Sequence[Tensor] | None) -> None:
        """What stays the same over the steps; captions come from where the text encoder runs."""
        device, size = self.components.device(DIT), self.start.noise.shape[-2:]
        with self.components.use(DIT) as dit, torch.no_grad():

            def refined(captions: Sequence[Tensor]) -> list[Tensor]:
                tokens: list[Tensor] = dit.refine([caption.to(device) for caption in captions])
                return tokens

            self.modulation = dit.modulate(self.sigmas[:-1])
            self.beside = Beside(self.steering, self.components.residency, dit, self.sigmas[:-1])
            away = refined(negative or ())
            nag = self.sampling.nag if away else 1.0

            def context(captions: Sequence[Tensor]) -> Context:
                toward = refined(captions)
                found: Context = dit.context_away(toward, away, nag, *size) if nag > 1 else dit.context(toward, *size)
                return found

            self.positive = context(positive)
            self.varied = self._varied(positive, context)
            self.negative: Context | None = (
                dit.context(away, *size) if self.sampling.guidance.scale > 0 and away else None
            )

    def _varied(self, captions: Sequence[Tensor], context: Callable[[Sequence[Tensor]], Context]) -> dict[int, Context]:
        """What stands for the prompts' context in the first steps, where there is variety between seeds."""
        sampling = self.sampling
        if sampling.variety <= 0:
            return {}
        pairs = zip(captions, sampling.seeds, strict=True)
        early = flow.varied_steps(self.start.step, len(self.sigmas) - 1)
        return dict.fromkeys(early, context([flow.varied(one, seed, sampling.variety) for one, seed in pairs]))

    def begin(self, reached: Reached | None) -> Reached:
        """Where the first step begins."""
        if reached is None:
            return Reached(self.start.step, self.start.latents, {})
        return reached._replace(latents=reached.latents.to(self.start.noise))

    def step(self, reached: Reached) -> Reached:
        """From a noise level to the next."""
        i, sigmas = reached.step, self.sigmas
        past, kept = _divided(reached.carried, reached.latents.device)
        with self.components.use(DIT) as dit, torch.no_grad():
            latents, past = self.solver.step(
                reached.latents,
                i,
                sigmas,
                lambda x, level: self.evaluate(self._evaluation(dit, self._shown(x, i, level), i, level, kept)),
                lambda: self._noise_of(i),
                past,
            )
            latents = self.start.kept(latents, i, sigmas[i + 1])
            if i in (self.start.step, len(sigmas) - 2):  # each look is a device sync; a bad weight shows at once
                finite(latents, "the DiT", dit)
        return Reached(i + 1, latents, {**kept, **{f"{PAST}.{k}": x for k, x in enumerate(past)}})

    def _shown(self, latents: Tensor, step: int, level: int) -> Tensor:
        """What the model sees where a step evaluates it: ahead of its own level, too, it sees what a mask keeps."""
        return latents if level == step else self.start.kept(latents, step, self.sigmas[level])

    def _evaluation(
        self, dit: ZImageDiT, latents: Tensor, step: int, level: int, kept: dict[str, Tensor]
    ) -> Evaluation:
        """What the model is asked at a noise level, by a step; all of a step see the same captions."""
        guidance = self.sampling.guidance
        return Evaluation(
            dit,
            latents,
            level,
            self.sigmas,
            self.modulation.step(level),
            self.varied.get(step, self.positive),
            self.negative,
            guidance.at(self.sigmas[level]),
            guidance,
            self.beside.step(level),
            self.start,
            kept,
        )

    def _noise_of(self, step: int) -> Tensor:
        assert self.noise is not None, "a solver that draws noise says so in its row"
        return self.noise.at(step)


def _divided(carried: Mapping[str, Tensor], device: torch.device) -> tuple[flow.Past, dict[str, Tensor]]:
    """Of what is carried, the solver's own, and what evaluations keep."""
    kept = {name: x.to(device) for name, x in carried.items()}
    count = sum(name.startswith(f"{PAST}.") for name in carried)
    return tuple(kept.pop(f"{PAST}.{k}") for k in range(count)), kept


def denoise_steps(
    components: Components,
    positive: Sequence[Tensor],
    negative: Sequence[Tensor] | None,
    start: flow.Start,
    sigmas: Tensor,
    sampling: Sampling,
    steering: Steering = NOTHING,
    hooks: Sequence[Hook] = (),
    reached: Reached | None = None,
) -> Iterator[Reached]:
    """Yield what each step reaches, for B captions (L, C) and as many negative ones; goes on from what is `reached`."""
    batch = _Batch(components, start, sigmas, sampling, steering, hooks)
    batch.condition(positive, negative)
    reached = batch.begin(reached)
    while reached.step < len(sigmas) - 1:
        reached = batch.step(reached)
        yield reached


# ------------------------------------------------------------------ a whole pass


class Sources(NamedTuple):
    """What a pass is given besides captions.

    `clean` are the latents (1, 16, h, w) that each image starts from, None where it starts from noise alone, and
    `controls` what ControlNets read.
    """

    clean: list[Tensor] | None
    controls: list[ControlInput]


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
    sigmas = torch.tensor(job.sigmas)
    mask = None if request.image is None else job.rendered().latent_mask(*_latent_size(components, job))
    for first in range(len(finished), job.count, request.batch_size):
        batch = range(first, min(first + request.batch_size, job.count))
        start, done, begun = _start(components, job, batch, sources.clean, mask, sigmas), 0, None
        total = len(sigmas) - 1 - start.step
        if first == len(state.finished) and state.latents is not None:
            done = state.step
            begun = Reached(start.step + done, state.latents, state.carried)
        positive = [conditions.prompts[i // request.images] for i in batch]
        negative = None if conditions.negative is None else [conditions.negative] * len(batch)
        sampling, steering = Sampling.of(job, batch), Steering.of(request, sources.controls, start.step)
        yield Event("denoise", done, total, first, job.count)
        steps = denoise_steps(components, positive, negative, start, sigmas, sampling, steering, hooks, begun)
        latents = start.latents
        for step, (_, latents, carried) in enumerate(steps, done + 1):
            yield Event("denoise", step, total, first, job.count, latents=latents, carried=carried)
        finished += latents.split(1)
    return finished


def _start(
    components: Components, job: Job, batch: range, clean: list[Tensor] | None, mask: Tensor | None, sigmas: Tensor
) -> flow.Start:
    """The noise (B, 16, h, w) of some images, each from its own seed, and what it is mixed with."""
    channels, (h, w) = components.config(DIT).in_channels, _latent_size(components, job)
    noise = torch.cat([_noise(job, i, channels, h, w) for i in batch])
    if clean is None:
        return flow.start(noise, sigmas)
    begin = torch.cat([clean[i] for i in batch]).cpu()
    return flow.start(noise, sigmas, job.request.strength or 1.0, begin, mask)


def _noise(job: Job, index: int, *shape: int) -> Tensor:
    """The start noise (1, 16, h, w) of an image, on its way to that of another seed where it is a variation."""
    noise = flow.start_noise(job.seeds[index], *shape)
    if job.request.variation is None:
        return noise
    seed, weight = job.request.variations[index]
    return flow.slerp(noise, flow.start_noise(seed, *shape), weight)


def _latent_size(components: Components, job: Job) -> tuple[int, int]:
    """(h, w) of a job's last pass."""
    factor = components.model.skeleton(VAE).spatial_factor
    width, height, _ = job.passes[-1]
    return height // factor, width // factor
