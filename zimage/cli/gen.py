"""`gen`: prompts in, picture files out."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from zimage.cli.options import GroupedCommand, given, options_of
from zimage.cli.origin import read_origin, warn_of_differences
from zimage.cli.plan import show_plan
from zimage.cli.progress import Progress
from zimage.cli.resume import open_state
from zimage.cli.rewrite import check_rewriting, rewritten
from zimage.cli.settings import configured, load_pipeline, resolve_options
from zimage.cli.target import FIELDS, Target
from zimage.errors import RequestError
from zimage.settings.declared import LoadSettings, Request, RewriteSettings

PATH = click.Path(path_type=Path)


@click.command(cls=GroupedCommand)
@click.argument("prompt", nargs=-1)
@click.option("--file", "prompt_file", type=PATH, help="Read prompts from a file, one per line.")
@click.option("--from", "source", type=PATH, help="Take all settings from a picture; options override them.")
@click.option(
    "-o",
    "--output",
    help=f"File to write (.png, .jpg, .webp), a folder, or a pattern with {FIELDS}. "
    "Default: named after prompt and seed, numbered rather than overwritten.",
)
@click.option("--checkpoint", type=PATH, help="Keep the state of the render in this file until its pictures are saved.")
@click.option(
    "--resume",
    type=PATH,
    help="Go on with the render whose state is in this file, and keep it there. No prompt needed.",
)
@configured
@options_of(Request, skip=("prompt",))
@options_of(RewriteSettings)
@options_of(LoadSettings)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Print the memory plan first.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the files' names, warnings and errors.")
def gen(
    prompt: tuple[str, ...],
    prompt_file: Path | None,
    source: Path | None,
    output: str | None,
    checkpoint: Path | None,
    resume: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Render PROMPT (several, or - to read one from standard input)."""
    started, progress = time.perf_counter(), Progress(quiet or as_json, names=not as_json)
    options |= _prompts(prompt, prompt_file)
    keeping = open_state(checkpoint, resume, source, given(options, Request))
    origin = read_origin(source, options)
    resolved = resolve_options(options, keeping.settings if keeping.begun else origin.get("request"))
    wanted = resolved.of(Request)
    if "prompt" not in wanted and "embeddings" not in wanted:
        raise RequestError("no prompt was given; write it as an argument, as - for standard input, or with --file")
    rewriting = check_rewriting(resolved, again=bool(origin) or keeping.begun)
    request = Request.from_mapping(wanted)
    output = keeping.record["output"] if keeping.begun and output is None else output
    target = Target(output, request.count)
    for note in filter(None, (keeping.note, resolved.note)):
        progress.note(note)
    progress.show("starting")
    pipe = load_pipeline(resolved)
    with resolved.naming_sources():
        request, rewrites = rewritten(pipe, pipe.resolve(request), rewriting, progress)
    _introduce(progress, pipe, request)
    if verbose:
        show_plan(pipe, request)
    records = _records(pipe, request, [r.describe() for r in rewrites], keeping.record)
    warn_of_differences(origin, records[0])
    kept = keeping.start(request, records, wanted | resolved.of(LoadSettings), output)
    saved = _render(pipe, request, records, target, progress, kept, keeping.begun)
    if as_json:
        seconds = round(time.perf_counter() - started, 3)
        click.echo(json.dumps({"images": saved, "seconds": seconds}, ensure_ascii=False))
    progress.summary(len(saved), time.perf_counter() - started)


def _records(pipe: Any, request: Request, rewrites: list[dict], begun: dict[str, Any]) -> list[dict[str, Any]]:
    """The metadata of each image, with what only the run that began the render knew."""
    records = [pipe.metadata(request, i) for i in range(request.count)]
    rewrites = rewrites or begun.get("rewritten") or []
    if begun:
        records = [{**record, "template": begun["template"]} for record in records]
    if rewrites:
        records = [{**record, "rewritten": rewrites[i // request.images]} for i, record in enumerate(records)]
    return records


def _render(
    pipe: Any,
    request: Request,
    records: list[dict[str, Any]],
    target: Target,
    progress: Progress,
    kept: Any,
    again: bool,
) -> list[dict[str, Any]]:
    """Run to the end, save each picture, and keep the state; returns what was saved where.

    `again`: an earlier run may have saved a picture, and been killed before it could note that.
    """
    saved = []
    for event in pipe.run(request, kept and kept.state):
        progress.update(event)
        if event.image is not None:
            record = records[event.index]
            path = (again and target.find(record, event.index)) or target.save(event.image, record, event.index)
            saved.append({"path": str(path), **record})
            progress.finished(saved[-1])
        if kept:
            kept.update(event)
    progress.close()
    if kept:
        kept.remove()
    return saved


def _prompts(arguments: tuple[str, ...], file: Path | None) -> dict[str, Any]:
    if arguments and file:
        raise RequestError("give prompts as arguments or with --file, not both")
    if file:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"prompts cannot be read from {file}: {error}") from error
        return {"prompt": [line.strip() for line in lines if line.strip()]}
    if arguments == ("-",):
        return {"prompt": sys.stdin.read().strip()}
    if not arguments:
        return {}
    return {"prompt": arguments[0] if len(arguments) == 1 else list(arguments)}


def _introduce(progress: Progress, pipe: Any, request: Request) -> None:
    r = dataclasses.asdict(request)
    for line in pipe.model.assumptions:
        progress.note(line)
    if pipe.is_demo:
        progress.note(
            "model: the bundled demo, which draws simple scenes; for the real one: --model PATH/Z-Image-Turbo"
        )
    if pipe.is_demo and any(r[name] for name in ("system_prompt", "thinking_content", "assistant_content")):
        progress.note("the demo learned from bare prompts: templates and other chat parts lead it astray")
    progress.note(
        f"{r['width']}×{r['height']}, {r['steps']} steps, guidance {r['guidance']:g}, shift {r['shift']:g}, "
        f"{str(pipe.dtype).removeprefix('torch.')} on {pipe.device}"
    )
    from zimage.cli.hints import unknown_words

    hint = unknown_words(pipe.model.origin, request.prompts)
    if hint:
        progress.note(hint)
    if request.long_prompt != "none" and (longest := pipe.captions.longest(request)) > pipe.captions.limit:
        from zimage.text.compress import describe

        progress.note(describe(longest, pipe.captions.limit, request.long_prompt))
