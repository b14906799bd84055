"""How far `--variety` takes the demo's pictures apart, and whether they still show what was asked for."""

import itertools
import json
from collections.abc import Sequence

import click
import torch
from torch import Tensor

import zimage
from bench.machine import describe_machine
from zimage import flow
from zimage.weights.recipe.judge import find
from zimage.weights.recipe.prompts import Trial, open_trials, scored_trials
from zimage.weights.recipe.score import right

LATENT = (16, 16, 16)  # of the demo's usual size
TOGETHER = 16  # pictures in a batch


@click.command()
@click.option("--values", default="0,0.25,0.5,1,1.5,2,4,8", show_default=True, help="Varieties to draw with.")
@click.option("--prompts", default=16, show_default=True, help="Prompts that leave colour and size open.")
@click.option("--seeds", default=4, show_default=True, help="Seeds of each.")
@click.option("--scored", default=120, show_default=True, help="Prompts of the scorer, of 332.")
@click.option("--steps", default=8, show_default=True)
def variety(values: str, prompts: int, seeds: int, scored: int, steps: int) -> None:
    """Draw the demo's pictures with several varieties: distances between seeds, and the scorer's share of right ones.

    `one noise` holds the start noise of a prompt's seeds equal: what is left is what the variety does. Distances are
    root mean squares of latents. The scorer needs Debian's fonts-noto-color-emoji.
    """
    pipe = zimage.ZImage.load(device="cpu", dtype="fp32")
    opens = open_trials(prompts, seeds)
    every = scored_trials()
    trials = every[:: max(1, len(every) // scored)]
    rows = []
    click.echo(f"{'variety':>8}{'one noise':>12}{'seeds':>10}{'choices':>10}{'right':>8}")
    for value in map(float, values.split(",")):
        held = drawn(pipe, opens, [trial.seed for trial in opens[::seeds] for _ in range(seeds)], value, steps)
        free = drawn(pipe, opens, [trial.seed for trial in opens], value, steps)
        right_ones = shown(pipe, trials, drawn(pipe, trials, [trial.seed for trial in trials], value, steps))
        rows.append((value, apart(held, seeds), apart(free, seeds), chosen(pipe, opens, held, seeds), right_ones))
        click.echo("{:8g}{:12.4f}{:10.4f}{:10.3f}{:8.3f}".format(*rows[-1]))
    names = ("variety", "one noise", "seeds", "choices", "right")
    told = {"rows": [dict(zip(names, row, strict=True)) for row in rows], "steps": steps, "scored": len(trials)}
    click.echo(json.dumps({**told, "machine": describe_machine()}))


def drawn(
    pipe: zimage.ZImage, trials: Sequence[Trial], noises: Sequence[int], value: float, steps: int
) -> list[Tensor]:
    """Latents (16, 16, 16) of each trial, from the start noise of these seeds and with captions varied by its own."""
    found = list[Tensor]()
    for first in range(0, len(trials), TOGETHER):
        part = slice(first, first + TOGETHER)
        captions = [pipe.encode(trial.prompt)[0] for trial in trials[part]]
        noise = torch.cat([flow.start_noise(seed, *LATENT) for seed in noises[part]])
        own = [trial.seed for trial in trials[part]]
        found += pipe.denoise(captions, noise, steps=steps, variety=value, seeds=own).unbind()
    return found


def apart(latents: Sequence[Tensor], seeds: int) -> float:
    """The mean distance of two seeds of a prompt, over all prompts and pairs; seeds lie side by side."""
    groups = [latents[i : i + seeds] for i in range(0, len(latents), seeds)]
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    return sum(float((a - b).square().mean().sqrt()) for a, b in pairs) / len(pairs)


def chosen(pipe: zimage.ZImage, trials: Sequence[Trial], latents: Sequence[Tensor], seeds: int) -> float:
    """Of pairs of seeds, how many differ in what the prompt leaves open: background, size or place."""
    pictures = pipe.decode(torch.stack(list(latents)))
    found = [find(picture, len(trial.objects)) for picture, trial in zip(pictures, trials, strict=True)]
    views = [(f.background, f.size, f.objects[0].x, f.objects[0].y) for f in found]
    groups = [views[i : i + seeds] for i in range(0, len(views), seeds)]
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    return sum(a != b for a, b in pairs) / len(pairs)


def shown(pipe: zimage.ZImage, trials: Sequence[Trial], latents: Sequence[Tensor]) -> float:
    """The share of pictures that show what was asked for, and are clean."""
    pictures = pipe.decode(torch.stack(list(latents)))
    return sum(right(t, find(p, len(t.objects))) for p, t in zip(pictures, trials, strict=True)) / len(trials)
