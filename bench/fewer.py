"""Fewer evaluations on Base: how far from a run of 50 steps a run ends that takes 25, 17 or 13 evaluations.

Rows at equal cost: the candidates of `bench.shortcuts` beside plain steps by the solvers and schedules of the library.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

import zimage
from bench.machine import command_line, describe_machine
from bench.options import JSON
from bench.shortcuts import EVALUATED, STEPS, Evaluate, HalfSize, MeanCache, extrapolated
from bench.weights import TRANSFORMER as WIDE
from zimage import flow
from zimage.dit import ZImageDiT

SHIFT = 6.0
FINE = 100  # steps of Heun's method that stand for the exact solution
HALVED = (9, 17, 25)  # first steps at half size
HALF_COST = 1 / 4.4  # FLOPs of a step at 512² over one at 1024², by `bench.roofline.costs` with 32 tokens of caption
PROMPTS = (
    "a sun on a pink background", "a pizza and a sun on a yellow background", "a small cat on a white background",
    "a robot next to a ghost", "a cookie on a gray background", "a rocket and a tree on a blue background",
    "a dragon on a red background", "a large owl on a black background",
)  # fmt: skip
BUDGETS = list(map(str, EVALUATED))
Decode = Callable[[Tensor], Tensor]


class Model:
    """The guided velocity of a DiT at any noise level, for captions (L, width) that steer to and away; counted."""

    def __init__(self, dit: Any, positive: Sequence[Tensor], negative: Sequence[Tensor], guidance: float):
        self.dit, self.guidance, self.count = dit, guidance, 0.0
        self.captions = [dit.refine(list(positive)), dit.refine(list(negative))][: 1 + (guidance > 0)]
        self.contexts: dict[tuple[int, int], list[Any]] = {}

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: float, cost: float = 1.0) -> Tensor:
        """(B, 16, h, w), at any size."""
        self.count += cost
        size = (x.shape[-2], x.shape[-1])
        if size not in self.contexts:
            self.contexts[size] = [self.dit.context(refined, *size) for refined in self.captions]
        modulation = self.dit.modulate(torch.tensor([sigma])).step(0)
        velocity, *away = (self.dit.velocity(x, modulation, context) for context in self.contexts[size])
        return flow.guide(velocity, away[0], self.guidance) if away else velocity

    def small(self, x: Tensor, sigma: float) -> Tensor:
        """The same of a picture of half the width and height."""
        return self.velocity(x, sigma, HALF_COST)

    def at(self, sigmas: Tensor) -> Evaluate:
        """As a solver evaluates it."""
        levels = sigmas.tolist()
        return lambda x, i: self.velocity(x, levels[i])


class Method(NamedTuple):
    """A row: its levels (N + 1,), a solver, and what this evaluates."""

    name: str
    sigmas: Tensor
    sampler: str = "euler"
    evaluates: Callable[[Model, Tensor], Evaluate] = Model.at

    def run(self, model: Model, x: Tensor) -> Tensor:
        """The finished latents of a start noise (B, 16, h, w)."""
        step, evaluate = flow.SOLVERS[self.sampler].step, self.evaluates(model, self.sigmas)
        past: flow.Past = ()
        for i in range(len(self.sigmas) - 1):
            x, past = step(x, i, self.sigmas, evaluate, _no_noise, past)
        return x


def _no_noise() -> Tensor:
    raise AssertionError("none of the rows adds noise")


def candidates(budget: int) -> list[Method]:
    """All rows that take `budget` evaluations."""
    full = flow.sigmas(STEPS, SHIFT)
    skipped = extrapolated(budget)
    levels = torch.cat((full[list(EVALUATED[budget])], torch.zeros(1)))
    plain = flow.sigmas(budget, SHIFT)
    return [
        Method("MeanCache", full, evaluates=lambda model, at: MeanCache(model.at(at), at, skipped)),
        Method("its levels, euler", levels),
        Method("euler", plain),
        Method("euler, shift 3", flow.sigmas(budget, 3.0)),
        Method("euler, beta_shifted", flow.sigmas(budget, SHIFT, "beta_shifted")),
        Method("euler, beta_shifted, shift 3", flow.sigmas(budget, 3.0, "beta_shifted")),
        Method("dpmpp_2m", plain, "dpmpp_2m"),
        Method("res_multistep", plain, "res_multistep"),
    ]


def halved(steps: int) -> list[Method]:
    """The first steps at half size; and plain steps of about the same cost."""
    full, cost = flow.sigmas(STEPS, SHIFT), round(STEPS - steps * (1 - HALF_COST))
    name = f"first {steps} of {STEPS} at half size"
    return [
        Method(name, full, evaluates=lambda model, at: HalfSize(model.at(at), model.small, at, steps)),
        Method("euler", flow.sigmas(cost, SHIFT)),
        Method("euler, shift 3", flow.sigmas(cost, 3.0)),
    ]


@click.command()
@JSON
@click.option("--model", type=click.Path(path_type=Path), help="A model folder of Base. Default: the demo.")
@click.option("--wide", type=int, help="Instead: a random DiT of full width with that many layers, 64 × 64 pixels.")
@click.option("--size", default=128, show_default=True, help="Side of the pictures in pixels.")
@click.option("--guidance", default=4.0, show_default=True)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    type=click.Choice(BUDGETS),
    default=("25", "17", "13"),
    show_default=True,
    help="Evaluations for which there are rows; repeatable.",
)
@click.option("--halves/--no-halves", default=True, help="Rows whose first steps are at half size.")
def fewer(
    as_json: bool,
    model: Path | None,
    wide: int | None,
    size: int,
    guidance: float,
    budgets: Sequence[str],
    halves: bool,
) -> None:
    """Compare ways to take fewer evaluations than a run of 50 Euler steps at shift 6.

    Errors are relative L2 norms of the final latents, in the middle and on average over pictures, against that run and
    against the exact solution; PSNR is that of the decoded pictures, in dB. Cost counts evaluations at full size.
    """
    field, x, decode = random_model(wide, guidance) if wide else drawing(model, size, guidance)
    full = Method("full", flow.sigmas(STEPS, SHIFT)).run(field, x)
    exact = None if wide else Method("exact", flow.sigmas(FINE, SHIFT), "heun").run(field, x)
    methods = [method for budget in budgets for method in candidates(int(budget))]
    methods += [method for steps in HALVED for method in halved(steps) if halves and not wide]
    rows = []
    for method in methods:
        field.count = 0.0
        found = method.run(field, x)
        row = {"method": method.name, "cost": round(field.count, 1), **errors(found, full, exact, decode)}
        rows.append(row)
        if not as_json:
            print(json.dumps(row), flush=True)
    print(json.dumps({"machine": describe_machine(), "command": command_line(), "rows": rows}))


def drawing(folder: Path | None, size: int, guidance: float) -> tuple[Model, Tensor, Decode]:
    """A model in fp32, the start noises of PROMPTS, and its decoder."""
    pipe = zimage.ZImage.load(folder, dtype=None if folder else "fp32")
    captions = pipe.encode(PROMPTS)
    noise = torch.cat([flow.start_noise(seed, 16, size // 8, size // 8) for seed in range(len(PROMPTS))])
    return Model(pipe.dit, captions, pipe.encode([""]) * len(PROMPTS), guidance), noise, pipe.decode


def random_model(layers: int, guidance: float) -> tuple[Model, Tensor, None]:
    """A DiT of full width with random weights in fp32, and one start noise of 64 × 64 pixels."""
    dit = random_dit(layers)
    captions = torch.randn(2, 24, dit.config.cap_feat_dim, generator=torch.Generator().manual_seed(1))
    model = Model(dit, captions[:1].unbind(), captions[1:].unbind(), guidance)
    return model, flow.start_noise(1, 16, 8, 8), None


def random_dit(layers: int) -> ZImageDiT:
    """Matrices keep the scale of their input, norms vary, and fast waves of the time have little say.

    With equal weights for all waves of the time embedding the velocity would have no likeness to that of a level a
    hundredth away. Values are cut from one pool: to draw them all takes longer than the measurement.
    """
    with torch.device("meta"):
        dit = ZImageDiT.from_config({**WIDE, "n_layers": layers, "n_refiner_layers": 1})
    generator = torch.Generator().manual_seed(0)
    pool, piece = torch.randn(1 << 24, generator=generator), 1 << 20
    state = {}
    for name, weight in dit.state_dict().items():
        places = torch.randint(0, len(pool) - piece, (-(-weight.numel() // piece),), generator=generator).tolist()
        values = torch.cat([pool[at : at + piece] for at in places])[: weight.numel()].reshape(weight.shape)
        if weight.ndim == 1:
            values = 1 + 0.3 * values if name.endswith("weight") else 0.1 * values
        elif not name.endswith("pad_token"):
            values = values / weight.shape[-1] ** 0.5
        state[name] = values * _slow(weight.shape[1]) if name == "t_embedder.mlp.0.weight" else values
    dit.load_state_dict(state, assign=True)
    return dit.eval()


def _slow(waves: int) -> Tensor:
    """(waves,): a factor of each wave of the time embedding, falling with its frequency over σ."""
    half = waves // 2
    frequency = 1000 * 10000 ** (-torch.arange(half).double() / half)
    return (6 / (3 + frequency)).float().repeat(2)


def errors(found: Tensor, full: Tensor, exact: Tensor | None, decode: Decode | None) -> dict[str, float]:
    """What a row says of its latents (B, 16, h, w)."""
    row: dict[str, float] = {}
    for name, wanted in (("50 steps", full), ("solution", exact)):
        if wanted is not None:
            each = ((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).tolist()
            row[f"{name}, median"], row[f"{name}, mean"] = (
                round(f(each), 4) for f in (statistics.median, statistics.mean)
            )
    if decode is not None:
        difference = (decode(found) - decode(full)).square().flatten(1).mean(dim=1).clamp(min=4e-10)
        row["PSNR"] = round(statistics.median((10 * torch.log10(4 / difference)).tolist()), 1)
    return row
