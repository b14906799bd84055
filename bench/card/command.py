"""`python -m bench card`: check and time everything on one GPU, in one command."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import click

from bench.card import report, watch
from bench.card.record import Record, key
from bench.card.sections import MINUTES, ROW_SECONDS, SECTIONS
from bench.card.worker import Message, Work
from bench.machine import command_line

NAMES = [section.name for section in SECTIONS]
WITH_FILES, ROOM = ("packed", "memory", "render"), 18e9  # sections, and bytes of disk
SIZES, SMALL_SIZES = (512, 1024, 2048), (64, 128)


def check_only(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """SECTION or SECTION/ROW."""
    for text in value:
        if text.split("/")[0] not in NAMES:
            raise click.BadParameter(f"{text!r} is not a section; use {', '.join(NAMES)}")
    return value


@click.command()
@click.option(
    "--only",
    metavar="SECTION[/ROW]",
    multiple=True,
    callback=check_only,
    help=f"Measure only this section, or rows of it (* stands for any text); repeat for several. Sections: "
    f"{', '.join(NAMES)}.",
)
@click.option(
    "--size", "sizes", type=int, multiple=True, help="Side of a picture; repeat it.  [default: 512 1024 2048]"
)
@click.option("--repeats", default=10, show_default=True, help="Most timed calls per row.")
@click.option("--minutes", default=float(MINUTES), show_default=True, help="Time for all sections together.")
@click.option("--small", is_flag=True, help="Small models: shows whether everything runs; the times mean nothing.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="For 15 GB of files.  [default: a temporary one]"
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default="card.json", show_default=True)
@click.option("--resume", is_flag=True, help="Go on with OUTPUT: measure what it lacks and what failed.")
def card(
    only: tuple[str, ...],
    sizes: tuple[int, ...],
    repeats: int,
    minutes: float,
    small: bool,
    folder: Path | None,
    output: Path,
    resume: bool,
) -> None:
    """Check and time everything on this machine's NVIDIA GPU: kernels, pictures, steps, files, memory, whole renders.

    Takes at most 10 minutes and 15 GB of disk; weights are made from a seed, and nothing is downloaded. Every row is
    checked and timed by itself. One that fails or hangs is stopped, and the others go on. What is not installed is a
    row that says so. The exit status is 0 if no row failed.

    To put the results into README, save them as bench/results/card.json and run `python -m bench tables`.
    """
    if output.exists() and not resume:
        raise click.UsageError(f"{output} exists; pass --resume to go on with it, or another --output")
    if not small:
        check_room(folder or Path(tempfile.gettempdir()), only)
    record = Record.resumed(output) if resume and output.exists() else Record(output)
    with tempfile.TemporaryDirectory(prefix="bench-card-") as temporary:
        where = folder or Path(temporary)
        where.mkdir(parents=True, exist_ok=True)
        share = minutes / MINUTES
        left = {section.name: share * section.seconds for section in SECTIONS}
        chosen = list(sizes or (SMALL_SIZES if small else SIZES))
        work = Work(chosen, repeats, small, str(where.absolute()), list(only), record.done, left)
        settings = {"sizes": chosen, "repeats": repeats, "small": small}
        clock = watch.Clock(dict(left), share * ROW_SECONDS)
        follow(watch.watched(work, clock), record, settings, minutes, left)
    for text in report.summary(record.rows.values(), str(output)):
        click.echo(text)
    for row in record.failed():
        click.echo(f"FAILED {key(row)}: {row['error']}")
    if list(record.failed()):
        raise SystemExit(1)


def check_room(folder: Path, only: tuple[str, ...]) -> None:
    """Raise UsageError if the files that are asked for do not fit; in /tmp they may lie in memory."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < ROOM and (not only or any(text.split("/")[0] in WITH_FILES for text in only)):
        text = f"{folder} has {free / 1e9:.0f} GB free and {ROOM / 1e9:.0f} are needed; pass another --folder"
        raise click.UsageError(f"{text}, or --only other sections than {', '.join(WITH_FILES)}")


def follow(
    messages: Iterable[Message], record: Record, settings: dict, minutes: float, seconds: dict[str, float]
) -> None:
    """Record and print what the worker tells. Raises ClickException where nothing can be measured."""
    begun = ""
    for kind, *values in messages:
        if kind == "no":
            raise click.ClickException(values[0])
        if kind == "about" and not begun:
            record.begin({**values[0], "settings": settings, "command": command_line()})
            for text in report.heading(values[0], minutes, str(record.file)):
                click.echo(text)
        if kind == "section" and values[0] != begun:
            begun = values[0]
            click.echo(report.title(SECTIONS[NAMES.index(begun)], seconds[begun]))
        if kind == "row":
            record.add(values[0])
            click.echo(report.line(values[0]))
