"""`sweep`: prompts × values of settings × seeds, one picture and one record per cell."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage import interrupts
from zimage.cli import terminal
from zimage.cli.options import PATH, GroupedCommand, options_of
from zimage.cli.progress import Progress, counted
from zimage.cli.prompts import given_prompts, named_prompts
from zimage.cli.settings import configured, resolver
from zimage.cli.trust import check_address, check_folder, check_server
from zimage.errors import RequestError, ZImageError, one_line
from zimage.settings.declared import Request
from zimage.settings.fields import Plain
from zimage.settings.loading import LoadSettings
from zimage.settings.profiles import Resolved
from zimage.settings.sampling import drawn_seed
from zimage.settings.scale import FIXED, BatchSettings

if TYPE_CHECKING:
    from zimage.events import Event
    from zimage.experiments.axes import Axis
    from zimage.experiments.cells import Cell
    from zimage.experiments.record import Record
    from zimage.experiments.sweep_file import SweepFile


@click.command(cls=GroupedCommand)
@click.argument("prompt", nargs=-1)
@named_prompts
@click.option("--each", is_flag=True, help="Make every argument a prompt of its own, even single words.")
@click.option("--file", "prompt_file", type=PATH, help="Read prompts from a file, one per line.")
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    metavar="FOLDER",
    help="Folder for pictures and records; the sweep that lies there goes on.",
)
@click.option(
    "--vary",
    multiple=True,
    metavar="NAME=VALUE,…",
    help="Setting to vary and its values; repeat it for a grid. An empty value leaves the setting as it is; one with "
    'a comma stands in "double quotes".',
)
@click.option("--zip", "together", is_flag=True, help="Change all settings of --vary together, not as a grid.")
@click.option(
    "--seeds",
    metavar="FIRST-LAST,…",
    help="Seeds of each cell; -1 draws one for all. Default: that of the settings file, else 0.",
)
@click.option("--toml", type=PATH, help="Read prompts, seeds, settings and axes from a file; options override them.")
@click.option("--dry-run", is_flag=True, help="Draw nothing; list all cells in their order.")
@configured
@options_of(Request, skip=tuple(FIXED))
@options_of(LoadSettings)
@options_of(BatchSettings)
@click.option("-q", "--quiet", is_flag=True, help="Print only file names, warnings and errors.")
@interrupts.telling("what is drawn is kept; the same command goes on from there")
def sweep(
    prompt: tuple[str, ...],
    named_prompts: tuple[str, ...],
    each: bool,
    prompt_file: Path | None,
    output: Path,
    vary: tuple[str, ...],
    together: bool,
    seeds: str | None,
    toml: Path | None,
    dry_run: bool,
    quiet: bool,
    **options: Plain,
) -> None:
    """Draw PROMPTs under every combination of settings.

    FOLDER gets a picture and a record of each cell; options are the settings of all.
    """
    from zimage.experiments.axes import parse_seeds
    from zimage.experiments.cells import cells_of
    from zimage.experiments.sweep_file import SweepFile, read_sweep

    file = read_sweep(toml) if toml else SweepFile([], [], {}, [])
    left = {name: value for name, value in file.settings.items() if options.get(name) in (None, ())}
    resolve = resolver({**options, **left})
    base, progress = resolve({}), Progress(quiet)
    check_server(base, "encoder_url")
    check_folder(base, "cache_folder")
    axes = _axes(vary, together, file)
    _check_effect(axes, {**options, **left})
    prompts = _prompts(given_prompts(prompt, prompt_file, each, named_prompts), file, base, axes)
    wanted = parse_seeds(seeds) if seeds else file.seeds or _seeds(base)
    cells = cells_of(axes, prompts, _drawn(wanted, progress), resolve)
    if base.note:
        progress.note(base.note)
    if dry_run:
        _list(cells)
    else:
        _draw(cells, output, _workers(base), progress)


def _axes(vary: Sequence[str], together: bool, file: "SweepFile") -> "list[Axis]":
    """Those of --vary, and those of the file that they do not replace. Raises RequestError."""
    from zimage.experiments.axes import check_axes, parse_axis, zipped

    own = [parse_axis(text) for text in vary]
    names = {name for one in own for name in one.names}
    axes = [*(one for one in file.axes if not names.issuperset(one.names)), *(zipped(own) if together else own)]
    check_axes(axes)
    return axes


def _check_effect(axes: "Sequence[Axis]", options: Mapping[str, Plain]) -> None:
    """Raise RequestError for an option that no cell would use, since each has a value of an axis instead."""
    for one in axes:
        for name, values in zip(one.names, zip(*one.points, strict=True), strict=True):
            if options.get(name) not in (None, ()) and None not in values:
                text = f"{name}: every cell takes it from its axis; leave out one of the two, or give the axis an empty"
                raise RequestError(f"{text} value, which leaves the setting as it is", fields=(name,))


def _prompts(given: str | list[str] | None, file: "SweepFile", base: Resolved, axes: "Sequence[Axis]") -> list[str]:
    prompts = file.prompts if given is None else [given] if isinstance(given, str) else given
    embedded = "embeddings" in base.entries or any("embeddings" in one.names for one in axes)
    if not prompts and not embedded:
        raise RequestError("a prompt is needed; pass it as an argument, with --file, or - to read standard input")
    return prompts or [""]


def _seeds(base: Resolved) -> list[int]:
    """Those of the settings file: a number or a list."""
    seed = base.of(Request).get("seed", 0)
    return seed if isinstance(seed, list) else [seed]


def _drawn(seeds: list[int], progress: Progress) -> list[int]:
    """The seeds with a random one for each that is open. It is told, since a sweep goes on with the same seeds only."""
    found = [drawn_seed(seed) for seed in seeds]
    if found != seeds:
        progress.note(f"seeds: --seeds {','.join(map(str, found))} goes on with this sweep")
    return found


def _list(cells: "Sequence[Cell]") -> None:
    from zimage.experiments.order import by_caption, ordered

    groups = ordered(cell for cell in cells if not cell.error)
    for cell in (cell for group in groups for cell in group.cells):
        terminal.out(f"{cell.id}  {cell.label}  {one_line(cell.prompt, 60)}")
    for cell in cells:
        if cell.error:
            terminal.out(f"{cell.id}  {cell.label}  error: {cell.error}")
    captions = sum(len(by_caption(group.cells)) for group in groups)
    loads, changes = len(groups), sum(len(group.parts) for group in groups)
    told = ", ".join([counted(loads, "load"), counted(changes, "set") + " of LoRAs", counted(captions, "caption")])
    terminal.note(f"{counted(len(cells), 'cell')}: {told}")


def _workers(base: Resolved) -> BatchSettings | None:
    """Where workers draw the cells: only if an option asks for it. Raises RequestError."""
    settings = BatchSettings.from_mapping(base.of(BatchSettings))
    asked = [name for name in BatchSettings.names() if base.source(name).startswith("--")]
    if asked == ["encoders"]:
        text = "encoders: they have no effect without workers; pass --workers too, or leave them out"
        raise RequestError(text, fields=("encoders", "workers"))
    if asked:
        check_address(base)
    return settings if asked else None


def _draw(cells: "Sequence[Cell]", folder: Path, workers: BatchSettings | None, progress: Progress) -> None:
    """Draw the cells that are missing. Raises ZImageError where cells failed."""
    from zimage.experiments.record import RECORDS, Journal
    from zimage.experiments.running import Sweep

    begun = time.perf_counter()
    with Journal(folder) as journal:
        running = Sweep(cells, folder, journal)
        there = len(cells) - len(running.pending)
        if there:
            progress.note(f"{counted(there, 'cell')} of {len(cells)} there already")
        told = _Told(progress, folder, len(cells), there)
        if workers is None or not running.pending:
            for cell, what in running.run():
                told.of(cell, what)
        else:
            from zimage.experiments.spread import spread

            progress.show("starting workers")
            spread(running, workers, told.of)
        progress.close()
        failed = len(running.failed)
    drawn = len(cells) - there - failed
    progress.note(f"{counted(drawn, 'cell')} in {time.perf_counter() - begun:.1f} s")
    if failed:
        told_of = f"{failed} of {counted(len(cells), 'cell')} failed; the same command tries them again"
        raise ZImageError(f"{told_of} (errors are in {folder / RECORDS})")


class _Told:
    """Shows where a sweep is."""

    def __init__(self, progress: Progress, folder: Path, total: int, done: int):
        self._progress, self._folder, self._total, self._done = progress, folder, total, done

    def of(self, cell: "Cell", what: "Event | Record") -> None:
        from zimage.experiments.record import Record

        if not isinstance(what, Record):
            self._progress.head = f"{self._done + 1}/{self._total} {one_line(cell.label, 60)} · "
            self._progress.update(what)
            return
        self._done += 1
        self._progress.close()
        if what.error is not None:
            terminal.note(one_line(f"{cell.label}: {what.error}"))
        else:
            terminal.saved(str(self._folder / str(what.path)))
            self._progress.note(cell.label)
