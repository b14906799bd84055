"""`metrics`: scores of the cells of a sweep, and which settings are best by them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage.cli import terminal
from zimage.cli.options import PATH, PlainCommand
from zimage.cli.progress import Progress, counted
from zimage.errors import RequestError

if TYPE_CHECKING:
    from zimage.experiments.folder import Experiment
    from zimage.experiments.ranking import Interval, Row

NAMES = "psnr, ssim, lpips, lpips-vgg (against --base); diversity (over seeds); grid; ocr; clip=FOLDER; siglip=FOLDER"
USUAL, AGAINST_BASE = ("grid",), ("psnr", "ssim")
ENOUGH = 10  # prompts; of fewer, resamples repeat one another


@click.command(cls=PlainCommand)
@click.argument("folder", type=PATH)
@click.option(
    "--metric",
    "names",
    multiple=True,
    metavar="NAME[=PATH]",
    help=f"{NAMES}. Repeat it, or put commas between. Default: grid, and with --base also psnr and ssim.",
)
@click.option(
    "--base",
    multiple=True,
    metavar="CELL|AXIS=VALUE",
    help="What cells are compared with, prompt and seed being equal: those with CELL's values, or VALUE (repeatable).",
)
@click.option("--by", multiple=True, metavar="AXIS", help="Rank settings by these axes only. Default: all.")
@click.option("--stored", is_flag=True, help="Rank by the scores that the records have; compute none.")
@click.option("--device", default="cpu", help="Where LPIPS, CLIP and SigLIP run: cpu, cuda, auto … Default: cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def metrics(
    folder: Path,
    names: tuple[str, ...],
    base: tuple[str, ...],
    by: tuple[str, ...],
    stored: bool,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Score the cells of a sweep's FOLDER, and rank settings.

    The scores are written into the cells' records. Settings are compared on the same prompts, and the intervals (95 %)
    come from resampled prompts: where a setting's distance "behind the first" may be 0, other prompts may change the
    order.
    """
    from zimage.experiments.folder import Experiment
    from zimage.experiments.metrics.catalogue import KINDS, parse_metrics
    from zimage.experiments.ranking import rank_table, telling_axes

    experiment = Experiment.open(folder)
    telling_axes([cell.record for cell in experiment.cells], by)  # before hours of work
    if stored:
        if base:
            text = "base: it has no effect on stored scores; leave out --base, or --stored to score anew"
            raise RequestError(text, fields=("base", "stored"))
        wanted = [metric.name for metric in parse_metrics(names)] if names else _scored(experiment)
    else:
        usual = (*USUAL, *(AGAINST_BASE if base else ()))
        wanted = _score(experiment, names or usual, base, device, Progress(quiet))
        experiment = Experiment.open(folder)
    records = [cell.record for cell in experiment.cells]
    tables = {name: rank_table(records, name, KINDS[name].higher_is_better, by or None) for name in wanted}
    if as_json:
        terminal.out_json({name: [_facts(row) for row in rows] for name, rows in tables.items()})
        return
    for name, rows in tables.items():
        direction = "higher" if KINDS[name].higher_is_better else "lower"
        count = sum(name in record.scores for record in records)
        terminal.out(f"{name}: {KINDS[name].title} ({direction} is better), {count} of {len(records)} cells", bold=True)
        terminal.out("\n".join(_table(rows) if count else ["  no cell has a score"]))


def _score(
    experiment: "Experiment", names: Sequence[str], base: Sequence[str], device: str, progress: Progress
) -> list[str]:
    """Each metric over all cells; its scores are stored as soon as it is through. Returns the metrics' names.

    Meanwhile no other command may write the records.
    """
    from zimage.experiments.metrics.catalogue import parse_metrics
    from zimage.experiments.metrics.scoring import base_of, need_base, score, store
    from zimage.experiments.record import Journal
    from zimage.loading.devices import choose_device

    metrics, partner, place = parse_metrics(names), base_of(experiment, base), choose_device(device)
    need_base(metrics, partner)
    with Journal(experiment.folder) as journal:
        for metric in metrics:
            progress.show(f"{metric.name} 0/{len(experiment.cells)}")
            found = dict[str, float]()
            for number, (cell, value) in enumerate(score(experiment, metric, partner, place), 1):
                progress.show(f"{metric.name} {number}/{len(experiment.cells)}")
                if value is not None:
                    found[cell.id] = value
            store(journal, {metric.name: found})
    progress.close()
    return [metric.name for metric in metrics]


def _scored(experiment: "Experiment") -> list[str]:
    """The metrics that some record has a score in."""
    from zimage.experiments.metrics.catalogue import KINDS

    return [name for name in KINDS if any(name in cell.record.scores for cell in experiment.cells)]


# ------------------------------------------------------------------ tables


def _table(rows: Sequence["Row"]) -> list[str]:
    if not rows:
        return ["  no prompt has a score in all settings; rank by fewer axes, or render the missing cells"]
    prompts = rows[0].prompts
    few = ": the intervals are narrower than they should be" if 1 < prompts < ENOUGH else ""
    return [*_aligned(_lines(rows)), f"  over {counted(prompts, 'prompt')}{few}"]


def _lines(rows: Sequence["Row"]) -> list[list[str]]:
    from zimage.experiments.folder import shown

    axes = [axis for axis, _ in rows[0].setting]
    lines = [["rank", "mean", "behind the first", "best in", *axes]]
    for row in rows:
        values = [shown(json.dumps(value)) for _, value in row.setting]
        figures = [_figure(row.rank, row.rank_interval), _figure(row.mean, row.mean_interval)]
        lines.append([*figures, _figure(row.behind, row.behind_interval), f"{row.best:.0%}", *values])
    return lines


def _figure(value: float, interval: "Interval | None") -> str:
    return f"{value:.4g}" + (f" ({interval.low:.4g} to {interval.high:.4g})" if interval else "")


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  " + "  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def _facts(row: "Row") -> Mapping[str, object]:
    """A row as plain values."""
    return {**vars(row), "setting": dict(row.setting)}
