"""`batch`: rows of a file, or prompts times settings, drawn by many workers."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage import interrupts
from zimage.cli import terminal
from zimage.cli.options import PATH, GroupedCommand, options_of
from zimage.cli.pace import Pace
from zimage.cli.progress import Progress, counted
from zimage.cli.prompts import file_prompts
from zimage.cli.settings import configured, resolve_options
from zimage.cli.trust import check_address, check_folder, check_server
from zimage.errors import OutputError, RequestError, ZImageError, quoted
from zimage.settings.declared import Request
from zimage.settings.fields import Plain, nearest
from zimage.settings.loading import LoadSettings
from zimage.settings.profiles import Resolved
from zimage.settings.scale import BatchSettings

if TYPE_CHECKING:
    from zimage.batch.driver import Summary
    from zimage.batch.rows import Row
    from zimage.batch.sources import Source

NOT_OF_ROWS = ("prompt", "batch_size")
KEPT = "what is drawn is kept, and the same command goes on"


@click.command(cls=GroupedCommand)
@click.argument("jobs", required=False, type=PATH)
@click.option("--file", "prompt_file", type=PATH, help="Read prompts from a file, one per line, instead of JOBS.")
@click.option(
    "-o", "--output", "folder", type=PATH, required=True, metavar="FOLDER", help="Folder of the pictures and the index."
)
@click.option(
    "--vary",
    multiple=True,
    metavar="NAME=VALUE,…",
    help="Draw every row with each of these values of a setting; repeat it for all combinations. An empty value leaves "
    "the setting as it is; one with a comma stands in double quotes.",
)
@click.option("--parquet", is_flag=True, help="Also write the index as index.parquet.")
@configured
@options_of(BatchSettings)
@options_of(Request, skip=NOT_OF_ROWS)
@options_of(LoadSettings)
@click.option("-q", "--quiet", is_flag=True, help="Print only the name of the index, warnings and errors.")
@interrupts.telling(KEPT)
def batch(
    jobs: Path | None,
    prompt_file: Path | None,
    folder: Path,
    vary: tuple[str, ...],
    parquet: bool,
    quiet: bool,
    **options: object,
) -> None:
    """Draw the rows of JOBS on many workers.

    FOLDER gets their pictures and an index. JOBS is a file (.jsonl, .csv or .parquet); a row holds settings of a
    picture by their names, and an id, which names the picture's file. Options are the defaults of all
    rows. The same command goes on where it was interrupted; pictures are the ones that `gen` draws.
    """
    started, progress = time.perf_counter(), Progress(quiet)
    resolved = resolve_options(options)
    check_server(resolved, "encoder_url")
    check_address(resolved)
    check_folder(resolved, "cache_folder")
    if resolved.note:
        progress.note(resolved.note)
    rows = _rows(jobs, prompt_file, vary, resolved)
    _make(folder)
    summary = _run(rows, folder, resolved, progress)
    index = _index(folder, parquet)
    progress.note(_told(summary, time.perf_counter() - started))
    terminal.saved(str(index))
    if summary.failed:
        line = summary.failed[0]
        text = f"{counted(len(summary.failed), 'row')} of {summary.total} failed, such as {line['id']}: {line['error']}"
        raise ZImageError(f"{text} (all stand in {index}; the same command tries them again)")


def _rows(jobs: Path | None, prompts: Path | None, vary: tuple[str, ...], resolved: Resolved) -> "list[Row]":
    """Raises RequestError, which names the row or the option at fault."""
    from zimage.batch.rows import rows_of
    from zimage.batch.sources import multiplied

    if (jobs is None) == (prompts is None):
        raise RequestError("pass a file of rows, or prompts with --file: one of them")
    lists = dict(_lists(text) for text in vary)
    folder = Path(jobs.parent if jobs else ".")
    with resolved.naming_sources():
        rows = rows_of(multiplied(_sources(jobs, prompts), lists), resolved.of(Request), folder, resolved.presets)
    if not rows:
        raise RequestError(f"{jobs or prompts} holds no rows")
    return rows


def _sources(jobs: Path | None, prompts: Path | None) -> "Iterator[Source]":
    from zimage.batch.sources import Source, read_rows

    if jobs is not None:
        yield from read_rows(jobs)
    elif prompts is not None:
        for number, prompt in enumerate(file_prompts(prompts), 1):
            yield Source(f"{prompts.name} prompt {number}", {"prompt": prompt})


def _lists(text: str) -> tuple[str, list[Plain]]:
    """NAME=VALUE,… → (name, values). Raises RequestError."""
    from zimage.batch.sources import of_text
    from zimage.settings.varied import varied

    name, texts = varied(text)
    known = [known for known in Request.names() if known not in NOT_OF_ROWS]
    if name not in known:
        raise RequestError(f"vary {quoted(text)} names no setting of a row; {nearest(name, known)}")
    return name, [of_text(name, value) if value else None for value in texts]


def _make(folder: Path) -> None:
    """Raises RequestError or OutputError where no pictures can be written there."""
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise RequestError(f"output: {folder} is not a folder; name one, or a new one") from None
    except FileNotFoundError:
        raise RequestError(f"output: the folder {quoted(str(folder.parent))} does not exist; create it first") from None
    if not os.access(folder, os.W_OK):
        raise OutputError(f"output: the folder {quoted(str(folder))} is not writable")


def _run(rows: "list[Row]", folder: Path, resolved: Resolved, progress: Progress) -> "Summary":
    from zimage.batch.driver import run

    settings = BatchSettings.from_mapping(resolved.of(BatchSettings))
    progress.show("starting workers")
    with resolved.naming_sources():
        summary = run(rows, folder, resolved.of(LoadSettings), settings, Pace(progress))
    progress.close()
    return summary


def _index(folder: Path, parquet: bool) -> Path:
    """Where the index lies, in the form that was asked for."""
    from zimage.batch.index import NAME, read_index

    path = folder / NAME
    if not parquet:
        return path
    from zimage.batch.parquet import write_parquet

    write_parquet(path.with_suffix(".parquet"), read_index(path))
    return path.with_suffix(".parquet")


def _told(summary: "Summary", seconds: float) -> str:
    kept = f", {summary.kept} were drawn before" if summary.kept else ""
    return f"{counted(summary.drawn, 'picture')} in {seconds:.1f} s{kept}"
