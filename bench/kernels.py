"""Every fused op at the published sizes: the kernel beside its reference and the compiled reference."""

import json
import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

from bench.machine import describe_machine
from bench.options import JSON
from bench.peaks import Peaks, peaks_of
from bench.timing import timed
from zimage.kernels import specs
from zimage.kernels.backend import Spec

SIDES = ("kernel", "torch", "compiled")
TOLERANCE = 0.02  # RMS of the difference over RMS of the reference: a kernel beyond it gets no speed figure


@click.command()
@JSON
@click.option("--repeats", default=20, show_default=True)
@click.option("--op", "names", multiple=True, help="Measure only this op; may be repeated.")
def kernels(as_json: bool, repeats: int, names: tuple[str, ...]) -> None:
    """Time the fused ops: the kernel (on a GPU), its reference, and the reference under torch.compile.

    On a GPU the times are between CUDA events, and the L2 cache holds none of the inputs. The floor is the least time
    by the maker's figures, where these are known (`bench roofline --help` lists the cards).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [measure(spec, device, repeats) for spec in specs() if not names or spec.name in names]
    if not as_json:
        print(f"{'op':24}{'MB':>8}{'floor ms':>10}" + "".join(f"{side + ' ms':>13}{'GB/s':>7}" for side in SIDES))
        for row in rows:
            print(f"{row['op']:24}{row['megabytes']:>8.1f}{_floor(row)}" + "".join(_cells(row, side) for side in SIDES))
    print(json.dumps({"machine": describe_machine(), "device": device, "ops": rows}))


def measure(spec: Spec, device: str, repeats: int, sides: Collection[str] = SIDES, seconds: float = 60) -> dict:
    """Median milliseconds of an op in bf16, for each way to run it, and what its least bytes and FLOPs are."""
    arguments = arguments_of(spec, device)
    row: dict[str, Any] = {"op": spec.name, **work(spec, arguments, device)}
    calls: dict[str, Callable] = {"torch": spec.reference}
    if "compiled" in sides:
        calls["compiled"] = torch.compile(spec.reference)
    if device == "cuda" and torch.cuda.get_device_capability() >= divmod(spec.least_capability, 10):
        row["difference"] = disagreement(spec, arguments)
        if row["difference"] <= TOLERANCE:  # NaN is not
            calls = {"kernel": spec.launch, **calls}
        else:
            row["error"] = f"the kernel disagrees with its reference by {row['difference']:.3g}"
    with torch.inference_mode():
        for side in (side for side in calls if side in sides):
            row[side] = timed(partial(calls[side], *arguments), device, repeats, seconds).ms
    return row


def arguments_of(spec: Spec, device: str) -> tuple:
    """Inputs of the published sizes in bf16, the same in every run."""
    torch.manual_seed(0)
    return spec.inputs(lambda *shape: torch.randn(shape, device=device).bfloat16(), **spec.model)


def work(spec: Spec, arguments: tuple, device: str) -> dict[str, Any]:
    """Megabytes and TFLOP of an op, and its least milliseconds on a GPU whose figures are known."""
    traffic, flops = spec.least_bytes(*arguments), flops_of(spec, arguments)
    row: dict[str, Any] = {"megabytes": traffic / 1e6, **({"tflop": flops / 1e12} if flops else {})}
    peaks: Peaks | None = peaks_of(torch.cuda.get_device_name()) if device == "cuda" else None
    if peaks:
        row["floor_ms"] = peaks.seconds(flops, traffic, peaks.rate(factors(arguments), fp16_sums=True)) * 1e3
    return row


def flops_of(spec: Spec, arguments: tuple) -> int:
    """The arithmetic of a product or of attention; 0 for ops that only move numbers."""
    return spec.flops(*arguments) if spec.flops else 0


def factors(arguments: tuple) -> torch.dtype:
    """The dtype that a product multiplies."""
    return next(argument.dtype for argument in arguments if isinstance(argument, Tensor))


def disagreement(spec: Spec, arguments: tuple) -> float:
    """The largest relative RMS difference between what the kernel and the reference return."""
    copies = [tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments) for _ in range(2)]
    results = (r if isinstance(r, tuple) else (r,) for r in (spec.launch(*copies[0]), spec.reference(*copies[1])))
    return max((relative(*pair) for pair in zip(*results, strict=True)), key=lambda error: (error != error, error))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The RMS of the difference over the RMS of the reference; NaN where either holds NaN."""
    ours, theirs = ours.double(), theirs.double()
    error, size = (float(x.square().mean().sqrt()) for x in (ours - theirs, theirs))
    return error / size if size else error and math.inf


def _floor(row: dict[str, Any]) -> str:
    return f"{row['floor_ms']:>10.3f}" if "floor_ms" in row else f"{'–':>10}"


def _cells(row: dict[str, Any], side: str) -> str:
    if side not in row:
        return f"{'–':>13}{'–':>7}"
    return f"{row[side]:>13.3f}{row['megabytes'] / row[side]:>7.0f}"
