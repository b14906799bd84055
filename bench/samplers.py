"""How near each sampler and each schedule comes to the end of the path, at the same numbers of steps."""

import json
from typing import Any

import click
from torch import Tensor

import zimage
from bench.machine import command_line, describe_machine
from bench.options import JSON
from zimage import flow

PROMPTS = ("a cat face on a blue background", "a fox and an owl", "a red apple", "a green tree under a yellow sky")
SEEDS = (1, 2, 3, 4)
STEPS = (4, 8, 30)
EXACT = {"sampler": "heun", "steps": 100}


@click.command()
@JSON
def samplers(as_json: bool) -> None:
    """Measure the error of the finished latents against 100 steps of Heun's, on the demo model in fp32.

    Samplers on the usual schedule, then schedules with Euler's sampler. Those that add noise end elsewhere.
    """
    pipe = zimage.ZImage.load(device="cpu", dtype="fp32")
    exact, rows = finished(pipe, **EXACT), []
    settings = [{"sampler": name} for name in flow.SOLVERS] + [{"schedule": name} for name in list(flow.SCHEDULES)[1:]]
    for setting in settings:
        errors = {f"{steps} steps": error(finished(pipe, steps=steps, **setting), exact) for steps in STEPS}
        rows.append({"sampler or schedule": " ".join(setting.values()), **errors})
        if not as_json:
            print(json.dumps(rows[-1]))
    print(json.dumps({"machine": describe_machine(), "command": command_line(), "rows": rows}))


def finished(pipe: zimage.ZImage, **setting: Any) -> Tensor:
    """The latents (B, 16, h, w) of all prompts."""
    request = zimage.Request(prompt=list(PROMPTS), seed=list(SEEDS), batch_size=len(PROMPTS), **setting)
    *_, latents = (event.latents for event in pipe.run(request) if event.latents is not None)
    return latents


def error(found: Tensor, exact: Tensor) -> float:
    """The RMS error over the exact latents' own deviation; two pictures that have nothing in common are near √2."""
    return float(f"{(found - exact).square().mean().sqrt() / exact.std():.2g}")
