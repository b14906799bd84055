"""`gen`: prompts in, picture files out."""

import time
from pathlib import Path

import click

from zimage import interrupts
from zimage.cli import local, ranks, remote, terminal
from zimage.cli.drawing import Drawing
from zimage.cli.options import PATH, GroupedCommand, given, options_of
from zimage.cli.origin import read_origin, with_lora_names, with_loras
from zimage.cli.patterns import FIELDS
from zimage.cli.progress import Progress
from zimage.cli.prompts import given_prompts, named_prompts
from zimage.cli.resume import open_state
from zimage.cli.rewrite import check_rewriting
from zimage.cli.settings import configured, resolve_options
from zimage.cli.target import PIPED, Piped, Target
from zimage.errors import RequestError, one_line
from zimage.settings.declared import Request
from zimage.settings.loading import LoadSettings
from zimage.settings.rewriting import RewriteSettings
from zimage.settings.scale import ParallelSettings
from zimage.settings.serving import TOKEN


@click.command(cls=GroupedCommand)
@click.argument("prompt", nargs=-1)
@named_prompts
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
    help=f"File to write (.png, .jpg, .webp, .avif), a folder, a pattern with {FIELDS}, or - for standard output. "
    "Default: named after prompt and seed, numbered rather than overwritten.",
)
@click.option(
    "--server",
    metavar="URL",
    help=f"Draw on the `zimage serve` at this URL, whose token is read from {TOKEN}. LoRAs and templates are the "
    "server's, by their names.",
)
@click.option("--save-state", type=PATH, help="Keep the render's state in this file until all pictures are saved.")
@click.option("--checkpoint", "save_state", type=PATH, hidden=True)  # its former name
@click.option("--resume", type=PATH, help="Continue the render whose state is in this file; needs no prompt.")
@configured
@options_of(Request, skip=("prompt",))
@options_of(RewriteSettings)
@options_of(LoadSettings)
@options_of(ParallelSettings)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Print the memory plan first, and whole reasons of warnings.")
@click.option("-q", "--quiet", is_flag=True, help="Print only file names, warnings and errors.")
@interrupts.telling("the unfinished picture was not saved")
def gen(
    prompt: tuple[str, ...],
    named_prompts: tuple[str, ...],
    each: bool,
    prompt_file: Path | None,
    picture: Path | None,
    output: str | None,
    server: str | None,
    save_state: Path | None,
    resume: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **options: object,
) -> None:
    """Render one or more PROMPTs; - reads one from standard input. Words without quotes form one prompt."""
    if server is None and ranks.launches(beginning := ranks.settings(options)):
        ranks.launch(beginning, click.get_current_context().obj)
        return
    started, progress = time.perf_counter(), Progress(quiet or as_json, names=not as_json)
    if verbose:
        terminal.tell_more()
    options["prompt"] = given_prompts(prompt, prompt_file, each, named_prompts)
    if server is not None:
        remote.check_options(options, save_state, resume)
    keeping = open_state(save_state, resume, picture, given(options, Request))
    origin = read_origin(picture, options)
    resolved = resolve_options(options, keeping.settings if keeping.begun else origin.get("request"))
    find_loras = with_loras if server is None else with_lora_names
    resolved = find_loras(picture, origin, options, resolved)
    wanted = resolved.of(Request)
    if "prompt" not in wanted and "embeddings" not in wanted:
        raise RequestError("a prompt is needed; pass it as an argument, with --file, or - to read standard input")
    rewriting = check_rewriting(resolved, again=bool(origin) or keeping.begun)
    request = Request.from_mapping(wanted)
    output = keeping.output(output)
    if output == PIPED:
        target: Target = Piped(request.count, as_json, keeping.path is not None)
    else:
        target = Target(output, request.count)
    drawing = Drawing(resolved, request, rewriting, origin, target, progress)
    joined = isinstance(options.get("prompt"), str) and len(prompt) > 1
    for note in filter(
        None, (_said_of_joined(request) if joined else "", origin.get("note"), keeping.note, resolved.note)
    ):
        progress.note(note)
    progress.show("starting")
    if server is None:
        saved = local.draw(drawing, keeping, output, verbose)
    else:
        saved = remote.draw(drawing, server)
    if as_json:
        seconds = round(time.perf_counter() - started, 3)
        with terminal.warned():
            terminal.out_json({"images": saved, "seconds": seconds})
    progress.summary(len(saved), time.perf_counter() - started)


def _said_of_joined(request: Request) -> str:
    return f"one prompt: {one_line(str(request.prompt), 80)} (quote prompts, or pass --each, for one per argument)"
