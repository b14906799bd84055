"""The memory plan, as `info --plan` and `gen --verbose` print it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from zimage.cli import terminal
from zimage.cli.progress import counted
from zimage.errors import RequestError
from zimage.loading.plan import MemoryPlan, StagePlan

if TYPE_CHECKING:
    from zimage.pipeline import ZImage
    from zimage.render.job import Job

DECODING = {"off": "decoded whole", "exact": "decoded in strips", "blend": "decoded in blended tiles"}


def plan_lines(job: "Job", refusal: RequestError | None = None) -> list[str]:
    """What each stage holds, what comes and goes, and the peak to expect; and why it was refused, if it was.

    And how many evaluations of the DiT a picture takes, on which most of its time goes.
    """
    plan = job.plan
    lines = [f"plan          {plan.work.width}×{plan.work.height}; {_limits(plan)}; {_strategy(plan)}"]
    lines.append(f"{'':14}{'device':8}{'weights':>10}{'activations':>13}{'other':>10}{'peak':>10}  streamed")
    for stage in plan.stages.values():
        figures = (stage.weights + stage.window, stage.activations, stage.base, stage.peak)
        weights, work, base, peak = (f"{size / 1e9:.2f} GB" for size in figures)
        lines.append(f"{stage.title:14}{stage.device:8}{weights:>10}{work:>13}{base:>10}{peak:>10}  {_streamed(stage)}")
    steps = sum(len(job.sigmas) - 1 - begin for begin in job.begins)
    lines.append(f"evaluations   {job.evaluations} of the DiT for each picture, in {counted(steps, 'step')}")
    return [*lines, f"refused       {refusal}"] if refusal else lines


def show_plan(pipe: "ZImage", job: "Job") -> None:
    """Print a job's plan to standard error. Raises RequestError after it where the job does not fit."""
    refusal = pipe.refusal(job)
    terminal.note("\n".join([*plan_lines(job, refusal), *_control_lines(job)]))
    if refusal:
        raise refusal


def _control_lines(job: "Job") -> Iterator[str]:
    for control in job.request.control or ():
        file = control.model
        yield f"{'control':14}{file.name} at {control.scale:g} ({file.hash}): {file.config.told}"


def plan_facts(job: "Job") -> dict[str, object]:
    """The same as plain values, in bytes."""
    plan = job.plan
    return {
        "width": plan.work.width,
        "height": plan.work.height,
        "fits": plan.fits,
        "tile_mode": plan.tile_mode,
        "kept": sorted(plan.kept),
        "keeps_all": plan.keeps_all,
        "limits": dict(plan.limits),
        "evaluations": job.evaluations,
        "stages": {
            name: {
                "device": stage.device,
                "weights": stage.weights,
                "activations": stage.activations,
                "other": stage.base,
                "peak": stage.peak,
                "streamed_blocks": len(stage.streamed),
                "streamed_bytes": stage.streamed_bytes,
                "streamed_at_once": stage.window,
                "page_locked_on_host": stage.pinned,
            }
            for name, stage in plan.stages.items()
        },
    }


def _limits(plan: MemoryPlan) -> str:
    limits = ", ".join(f"{limit / 1e9:.2f} GB on {device}" for device, limit in plan.limits.items())
    return f"at most {limits} ({'free now' if plan.budget is None else f'memory {plan.budget:g}'})"


def _strategy(plan: MemoryPlan) -> str:
    streamed = [stage.title for stage in plan.stages.values() if stage.streamed]
    kept = "all components stay loaded" if plan.keeps_all else _kept(plan)
    streaming = f"{' and '.join(streamed)} streamed" if streamed else ""
    return ", ".join(filter(None, [kept, DECODING[plan.tile_mode], streaming]))


def _kept(plan: MemoryPlan) -> str:
    titles = [stage.title for name, stage in plan.stages.items() if name in plan.kept]
    if not titles:
        return "components loaded one at a time"
    return f"{' and '.join(titles)} {'stay' if len(titles) > 1 else 'stays'} loaded"


def _streamed(stage: StagePlan) -> str:
    if not stage.streamed:
        return "-"
    at_once, total = stage.window / 1e9, stage.streamed_bytes / 1e9
    host = f", {stage.pinned / 1e9:.2f} GB page-locked on the host" if stage.pinned else ""
    return f"{len(stage.streamed)} of {stage.blocks} blocks, {total:.2f} GB, {at_once:.2f} GB at a time{host}"
