"""`gen` on this computer: load the model, render, save each picture, keep the state."""

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from zimage.cli import ranks
from zimage.cli.drawing import Drawing, introduced
from zimage.cli.origin import Record, warn_of_differences
from zimage.cli.resume import Keeping
from zimage.cli.rewrite import prepared
from zimage.cli.trust import check_server
from zimage.settings.loading import LoadSettings

if TYPE_CHECKING:
    from zimage.events import Event
    from zimage.pipeline import ZImage
    from zimage.render.job import Job
    from zimage.render.state import StateFile


def draw(drawing: Drawing, keeping: Keeping, output: str | None, verbose: bool) -> list[Record]:
    """Draw all pictures; returns what was saved where."""
    resolved, progress = drawing.resolved, drawing.progress
    if drawing.rewriting is not None:
        check_server(resolved, "rewriter_url")
    with ranks.drawing(resolved) as (pipe, painter):
        with resolved.naming_sources():
            job, rewrites = prepared(pipe, drawing.request, drawing.rewriting, progress, verbose)
        for line in _introduction(pipe, job):
            progress.note(line)
        records = _records(pipe, job, [r.describe() for r in rewrites], keeping.record)
        drawing.target.check(records)
        warn_of_differences(drawing.origin, records[0])
        kept = keeping.start(pipe, job, records, resolved.of(LoadSettings), output)
        return _render(painter.run(job, kept.state if kept else None), kept, records, drawing, keeping)


def _records(pipe: "ZImage", job: "Job", rewrites: list[Record], begun: Record) -> list[Record]:
    """The metadata of each image, with what only the run that began the render knew."""
    records = [pipe.metadata(job, i) for i in range(job.count)]
    rewrites = rewrites or begun.get("rewritten") or []
    if begun:
        records = [{**record, "template": begun["template"]} for record in records]
    if rewrites:
        records = [{**record, "rewritten": rewrites[i // job.request.images]} for i, record in enumerate(records)]
    return records


def _render(
    events: Iterable["Event"], kept: "StateFile | None", records: list[Record], drawing: Drawing, keeping: Keeping
) -> list[Record]:
    """Go to the end, save each picture, and keep the state; returns what was saved where."""
    target, progress, saved = drawing.target, drawing.progress, list[Record]()
    for event in events:
        progress.update(event)
        if event.image is not None:
            record = records[event.index]
            # An earlier run may have saved a picture, and been killed before it could note that.
            path = (keeping.begun and target.find(record, event.index)) or target.save(event.image, record, event.index)
            saved.append({"path": str(path), **record})
            progress.finished(saved[-1])
            if kept:
                kept.record["saved"].append(os.path.abspath(path))
        if kept:
            kept.update(event)
    progress.close()
    if kept:
        kept.remove()
    return saved


def _introduction(pipe: "ZImage", job: "Job") -> Iterator[str]:
    """What the user did not choose and should know."""
    from zimage.cli.hints import unknown_words
    from zimage.render.defaults import adapters_told, is_base
    from zimage.text.compress import describe

    r = job.request
    yield from pipe.model.assumptions
    if pipe.is_demo:
        yield "model: the bundled demo, which draws simple scenes; for Z-Image itself pass --model PATH/Z-Image-Turbo"
    if pipe.is_demo and (r.system_prompt or r.thinking_content or r.assistant_content):
        yield "the demo was trained on bare prompts: templates and other chat parts mislead it"
    yield from adapters_told(job.loras, pipe.model)
    yield introduced(vars(r), f"{str(pipe.dtype).removeprefix('torch.')} on {pipe.device}", job.evaluations)
    if job.size != job.passes[-1][:2]:
        yield f"rendered at that size and pasted back: the picture comes out in {job.size[0]}×{job.size[1]}"
    if r.guidance == 1 and not is_base(pipe.model):
        yield "guidance 1 runs the model twice per step; ComfyUI's CFG 1, which is off, is --guidance 0"
    if hint := unknown_words(pipe.model.origin, r.prompts):
        yield hint
    longest = max(job.token_counts)
    if r.long_prompt != "none" and longest > pipe.texts.limit:
        yield describe(longest, pipe.texts.limit, r.long_prompt)
    if note := pipe.describe_references(r, longest):
        yield note
