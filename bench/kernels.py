"""Every fused op at the published sizes: the kernel beside its reference and the compiled reference."""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

from bench.machine import describe_machine
from bench.options import JSON
from zimage.kernels import specs
from zimage.kernels.backend import Spec

SIDES = ("kernel", "torch", "compiled")
TOLERANCE = 0.02  # RMS of the difference over RMS of the reference: a kernel beyond it gets no speed figure


@click.command()
@JSON
@click.option("--repeats", default=20, show_default=True)
@click.option("--op", "names", multiple=True, help="Measure only this op; may be repeated.")
def kernels(as_json: bool, repeats: int, names: tuple[str, ...]) -> None:
    """Time the fused ops: the kernel (on a GPU), its reference, and the reference under torch.compile."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [measure(spec, device, repeats) for spec in specs() if not names or spec.name in names]
    if not as_json:
        print(f"{'op':20}{'MB':>8}" + "".join(f"{side + ' ms':>14}{'GB/s':>8}" for side in SIDES))
        for row in rows:
            cells = "".join(_cells(row, side) for side in SIDES)
            print(f"{row['op']:20}{row['megabytes']:>8.1f}{cells}")
    print(json.dumps({"machine": describe_machine(), "device": device, "ops": rows}))


def measure(spec: Spec, device: str, repeats: int) -> dict[str, Any]:
    """Median milliseconds of an op in bf16, for each way to run it."""
    generator = torch.Generator(device).manual_seed(0)
    arguments = spec.inputs(
        lambda *shape: torch.randn(shape, generator=generator, device=device).bfloat16(), **spec.model
    )
    row: dict[str, Any] = {"op": spec.name, "megabytes": spec.least_bytes(*arguments) / 1e6}
    sides: dict[str, Callable] = {"torch": spec.reference, "compiled": torch.compile(spec.reference)}
    if device == "cuda" and torch.cuda.get_device_capability() >= divmod(spec.least_capability, 10):
        difference = disagreement(spec, arguments)
        row["difference"] = difference
        if difference <= TOLERANCE:
            sides = {"kernel": spec.launch, **sides}
        else:
            row["error"] = "the kernel disagrees with its reference"
    with torch.inference_mode():
        for side, call in sides.items():
            row[side] = milliseconds(partial(call, *arguments), device, repeats)
    return row


def disagreement(spec: Spec, arguments: tuple) -> float:
    """The largest relative RMS difference between what the kernel and the reference return."""
    copies = [tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments) for _ in range(2)]
    worst = 0.0
    results = (r if isinstance(r, tuple) else (r,) for r in (spec.launch(*copies[0]), spec.reference(*copies[1])))
    for ours, theirs in zip(*results, strict=True):
        ours, theirs = ours.double(), theirs.double()
        worst = max(worst, float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()))
    return worst


def milliseconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:]) * 1e3


def _cells(row: dict[str, Any], side: str) -> str:
    if side not in row:
        return f"{'–':>14}{'–':>8}"
    return f"{row[side]:>14.3f}{row['megabytes'] / row[side]:>8.0f}"
