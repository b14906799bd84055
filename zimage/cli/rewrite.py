"""`rewrite`: a short idea becomes a full prompt, and how `gen` does the same before it renders."""

import dataclasses
from typing import TYPE_CHECKING

import click

from zimage.cli import terminal
from zimage.cli.drawing import rewriting_told
from zimage.cli.options import GroupedCommand, options_of
from zimage.cli.plan import show_plan
from zimage.cli.progress import Progress
from zimage.cli.prompts import prompt_argument
from zimage.cli.settings import configured, load_pipeline, resolve_options
from zimage.cli.trust import check_server
from zimage.errors import RequestError
from zimage.settings.declared import Request
from zimage.settings.loading import LoadSettings
from zimage.settings.profiles import Resolved
from zimage.settings.rewriting import RewriteSettings

if TYPE_CHECKING:
    from zimage.pipeline import ZImage
    from zimage.render.job import Job
    from zimage.render.rewriting import Rewrite


@click.command(cls=GroupedCommand)
@prompt_argument
@click.option("--show-thinking", is_flag=True, help="Also print the thoughts, on standard error.")
@configured
@options_of(RewriteSettings)
@options_of(LoadSettings)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the prompt, warnings and errors.")
def rewrite(prompt: str, show_thinking: bool, as_json: bool, quiet: bool, **options: object) -> None:
    """Turn a short PROMPT into a full one. `gen --rewrite NAME` also renders it."""
    progress = Progress(quiet or as_json)
    resolved = resolve_options(options)
    settings = RewriteSettings.from_mapping(resolved.of(RewriteSettings))
    check_server(resolved, "rewriter_url")
    if resolved.note:
        progress.note(resolved.note)
    pipe = load_pipeline(resolved)
    with resolved.naming_sources():
        _warn_of_demo(pipe, settings, progress)
        result = write(pipe, prompt, settings, progress)
    if as_json:
        terminal.out_json({"prompt": result.prompt, "thinking": result.thinking, **result.describe()})
        return
    progress.note(f"{result.rewriter}, seed {result.seed}")
    if show_thinking and result.thinking:
        terminal.note(result.thinking)
    terminal.out(result.prompt)


def check_rewriting(resolved: Resolved, again: bool) -> RewriteSettings | None:
    """The settings of `gen`'s rewriting, or None where there is none.

    `again`: the request is that of an earlier render, whose prompt is drawn as it is unless --rewrite is given now.
    Raises RequestError for options that would have no effect.
    """
    settings = RewriteSettings.from_mapping(resolved.of(RewriteSettings))
    given = [name for name in resolved.of(RewriteSettings) if resolved.source(name).startswith("--")]
    if settings.rewriter is None and given:
        raise RequestError(f"{given[0]}: it has no effect without --rewrite; pass that too or leave it out")
    return None if settings.rewriter is None or (again and "rewriter" not in given) else settings


def prepared(
    pipe: "ZImage", request: Request, settings: RewriteSettings | None, progress: Progress, verbose: bool
) -> tuple["Job", list["Rewrite"]]:
    """The job of a request, its prompts rewritten first where that is asked for, and what came of each.

    `verbose` prints its memory plan before anything is written.
    """
    job = pipe.prepare(request, must_fit=not verbose)
    if verbose:
        show_plan(pipe, job)
    if settings is None:
        return job, []
    if request.embeddings is not None:
        raise RequestError(
            "rewriter: embeddings hold no prompt to rewrite; leave out one of them", fields=("rewriter", "embeddings")
        )
    _warn_of_demo(pipe, settings, progress)
    results = [write(pipe, prompt, settings, progress) for prompt in request.prompts]
    for result in results:
        progress.note(rewriting_told(result.describe(), result.prompt))
    prompts = [result.prompt for result in results]
    prompt = prompts if isinstance(request.prompt, list) else prompts[0]
    return pipe.prepare(dataclasses.replace(job.request, prompt=prompt)), results


def write(pipe: "ZImage", prompt: str, settings: RewriteSettings, progress: Progress) -> "Rewrite":
    """The rewritten prompt, its pieces counted while they come."""
    progress.show("rewriting")
    pieces, count = pipe.rewriter.pieces(prompt, settings), 0
    while True:
        try:
            next(pieces)
        except StopIteration as finished:
            progress.close()
            return finished.value
        count += 1
        progress.show(f"rewriting {count}/{settings.max_tokens}")


def _warn_of_demo(pipe: "ZImage", settings: RewriteSettings, progress: Progress) -> None:
    if pipe.is_demo and not (settings.rewriter_url or pipe.settings.encoder_url):
        progress.note("the bundled demo's text encoder was not trained to write; use another model or --rewriter-url")
