"""The memory plan, as `info --plan` and `gen --verbose` print it."""

from typing import Any

import click

from zimage.cli.progress import STAGES
from zimage.errors import RequestError


def plan_lines(pipe: Any, request: Any) -> list[str]:
    """The plan of a resolved request: what each stage holds, what comes and goes, and the peak to expect."""
    schedule = pipe.schedule(request)
    lines = [f"plan          {request.width}×{request.height}; {_limits(schedule)}; {_strategy(schedule)}"]
    lines.append(f"{'':14}{'device':8}{'weights':>10}{'activations':>13}{'other':>10}{'peak':>10}  streamed")
    for stage in schedule.stages.values():
        figures = (stage.weights + stage.window, stage.activations, stage.base, stage.peak)
        weights, work, base, peak = (f"{size / 1e9:.2f} GB" for size in figures)
        lines.append(
            f"{STAGES[stage.name]:14}{stage.device!s:8}{weights:>10}{work:>13}{base:>10}{peak:>10}  {_streamed(stage)}"
        )
    return lines + _refusal(pipe, request)


def plan_facts(pipe: Any, request: Any) -> dict[str, Any]:
    """The same as plain values, in bytes."""
    schedule = pipe.schedule(request)
    return {
        "width": request.width,
        "height": request.height,
        "fits": schedule.fits,
        "tile_mode": schedule.tile_mode,
        "kept": sorted(schedule.kept),
        "limits": {str(device): limit for device, limit in schedule.limits.items()},
        "stages": {
            stage.name: {
                "device": str(stage.device),
                "weights": stage.weights,
                "activations": stage.activations,
                "other": stage.base,
                "peak": stage.peak,
                "streamed_blocks": len(stage.streamed),
                "streamed_bytes": stage.streamed_bytes,
                "streamed_at_once": stage.window,
                "page_locked_on_host": stage.pinned,
            }
            for stage in schedule.stages.values()
        },
    }


def show_plan(pipe: Any, request: Any) -> None:
    """Print the plan to standard error, as `gen` does with all but the pictures' names."""
    for line in plan_lines(pipe, request):
        click.echo(line, err=True)


def _limits(schedule: Any) -> str:
    limits = ", ".join(f"{limit / 1e9:.2f} GB on {device}" for device, limit in schedule.limits.items())
    return f"at most {limits} ({'free now' if schedule.given is None else f'memory {schedule.given:g}'})"


def _strategy(schedule: Any) -> str:
    streamed = [STAGES[stage.name] for stage in schedule.stages.values() if stage.streamed]
    loading = "all parts stay loaded" if len(schedule.kept) == len(schedule.stages) else "each part loaded in its turn"
    decoding = {"off": "decoded whole", "exact": "decoded in strips", "blend": "decoded in blended tiles"}
    parts = [loading, decoding[schedule.tile_mode], f"{' and '.join(streamed)} streamed" if streamed else ""]
    return ", ".join(filter(None, parts))


def _streamed(stage: Any) -> str:
    if not stage.streamed:
        return "-"
    at_once, total = stage.window / 1e9, stage.streamed_bytes / 1e9
    host = f", {stage.pinned / 1e9:.2f} GB page-locked on the host" if stage.pinned else ""
    return f"{len(stage.streamed)} of {stage.blocks} blocks, {total:.2f} GB, {at_once:.2f} GB at a time{host}"


def _refusal(pipe: Any, request: Any) -> list[str]:
    try:
        pipe.check(request)
    except RequestError as error:
        return [f"refused       {error}"]
    return []
