"""`gen`: prompts in, picture files out."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage import interrupts
from zimage.cli import terminal
from zimage.cli.options import PATH, GroupedCommand, given, options_of
from zimage.cli.origin import Record, read_origin, warn_of_differences, with_loras
from zimage.cli.patterns import FIELDS
from zimage.cli.progress import Progress
from zimage.cli.prompts import file_prompts, one_prompt
from zimage.cli.resume import Keeping, open_state
from zimage.cli.rewrite import check_rewriting, prepared
from zimage.cli.settings import configured, load_pipeline, resolve_options
from zimage.cli.target import Target
from zimage.errors import RequestError, one_line
from zimage.settings.declared import LoadSettings, Request, RewriteSettings

if TYPE_CHECKING:
    from zimage.pipeline import ZImage
    from zimage.render.job import Job


@click.command(cls=GroupedCommand)
@click.argument("prompt", nargs=-1)
@click.option("--each", is_flag=True, help="Make every argument a prompt of its own, even single words.")
@click.option("--file", "prompt_file", type=PATH, help="Read prompts from a file, one per line.")
@click.option(
    "--from",
    "picture",
    type=PATH,
    help="Take all settings from a picture, also from one that another program saved; options override them.",
)
@click.option(
    "-o",
    "--output",
    help=f"File to write (.png, .jpg, .webp), a folder, or a pattern with {FIELDS}. "
    "Default: named after prompt and seed, numbered rather than overwritten.",
)
@click.option("--save-state", type=PATH, help="Keep the render's state in this file until all pictures are saved.")
@click.option("--checkpoint", "save_state", type=PATH, hidden=True)  # its former name
@click.option("--resume", type=PATH, help="Continue the render whose state is in this file; needs no prompt.")
@configured
@options_of(Request, skip=("prompt",))
@options_of(RewriteSettings)
@options_of(LoadSettings)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Print the memory plan first, and whole reasons of warnings.")
@click.option("-q", "--quiet", is_flag=True, help="Print only file names, warnings and errors.")
@interrupts.telling("the unfinished picture was not saved")
def gen(
    prompt: tuple[str, ...],
    each: bool,
    prompt_file: Path | None,
    picture: Path | None,
    output: str | None,
    save_state: Path | None,
    resume: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **options: object,
) -> None:
    """Render one or more PROMPTs; - reads one from standard input. Words without quotes form one prompt."""
    started, progress = time.perf_counter(), Progress(quiet or as_json, names=not as_json)
    if verbose:
        terminal.tell_more()
    options |= _prompts(prompt, prompt_file, each)
    keeping = open_state(save_state, resume, picture, given(options, Request))
    origin = read_origin(picture, options)
    resolved = resolve_options(options, keeping.settings if keeping.begun else origin.get("request"))
    resolved = with_loras(picture, origin, options, resolved)
    wanted = resolved.of(Request)
    if "prompt" not in wanted and "embeddings" not in wanted:
        raise RequestError("a prompt is needed; pass it as an argument, with --file, or - to read standard input")
    rewriting = check_rewriting(resolved, again=bool(origin) or keeping.begun)
    request = Request.from_mapping(wanted)
    output = keeping.output(output)
    target = Target(output, request.count)
    joined = isinstance(options.get("prompt"), str) and len(prompt) > 1
    for note in filter(
        None, (_said_of_joined(request) if joined else "", origin.get("note"), keeping.note, resolved.note)
    ):
        progress.note(note)
    progress.show("starting")
    pipe = load_pipeline(resolved)
    with resolved.naming_sources():
        job, rewrites = prepared(pipe, request, rewriting, progress, verbose)
    for line in _introduction(pipe, job):
        progress.note(line)
    records = _records(pipe, job, [r.describe() for r in rewrites], keeping.record)
    target.check(records)
    warn_of_differences(origin, records[0])
    saved = _render(pipe, job, records, target, progress, keeping, resolved.of(LoadSettings), output)
    if as_json:
        seconds = round(time.perf_counter() - started, 3)
        with terminal.warned():
            terminal.out_json({"images": saved, "seconds": seconds})
    progress.summary(len(saved), time.perf_counter() - started)


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
    pipe: "ZImage",
    job: "Job",
    records: list[Record],
    target: Target,
    progress: Progress,
    keeping: Keeping,
    loading: Record,
    output: str | None,
) -> list[Record]:
    """Run to the end, save each picture, and keep the state; returns what was saved where."""
    saved, kept = [], keeping.start(pipe, job, records, loading, output)
    for event in pipe.run(job, kept.state if kept else None):
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


def _prompts(arguments: tuple[str, ...], file: Path | None, each: bool) -> Record:
    if arguments and file:
        raise RequestError("pass prompts as arguments or with --file, not both")
    if file:
        return {"prompt": file_prompts(file)}
    if not arguments:
        return {}
    apart = each or all(len(argument.split()) > 1 for argument in arguments)
    several = apart and len(arguments) > 1 and "-" not in arguments
    return {"prompt": list(arguments) if several else one_prompt(arguments)}


def _said_of_joined(request: Request) -> str:
    return f"one prompt: {one_line(str(request.prompt), 80)} (quote prompts, or pass --each, for one per argument)"


def _introduction(pipe: "ZImage", job: "Job") -> Iterator[str]:
    """What the user did not choose and should know."""
    from zimage.cli.hints import unknown_words
    from zimage.render.defaults import is_base
    from zimage.text.compress import describe

    r = job.request
    yield from pipe.model.assumptions
    if pipe.is_demo:
        yield "model: the bundled demo, which draws simple scenes; for Z-Image itself pass --model PATH/Z-Image-Turbo"
    if pipe.is_demo and (r.system_prompt or r.thinking_content or r.assistant_content):
        yield "the demo was trained on bare prompts: templates and other chat parts mislead it"
    yield (
        f"{r.width}×{r.height}, {r.steps} step{'' if r.steps == 1 else 's'}, guidance {r.guidance:g}, "
        f"shift {r.shift:g}, {str(pipe.dtype).removeprefix('torch.')} on {pipe.device}"
    )
    if r.guidance == 1 and not is_base(pipe.model):
        yield "guidance 1 runs the model twice per step; ComfyUI's CFG 1, which is off, is --guidance 0"
    if hint := unknown_words(pipe.model.origin, r.prompts):
        yield hint
    longest = max(job.token_counts)
    if r.long_prompt != "none" and longest > pipe.texts.limit:
        yield describe(longest, pipe.texts.limit, r.long_prompt)
