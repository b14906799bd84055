"""What the page is told of an experiment, as plain values: the same for the viewer and for a file that holds all of it.

Words are made here, so that the page arranges and formats nothing by itself.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from zimage.errors import RequestError
from zimage.experiments.folder import Cell, Experiment, shown
from zimage.experiments.layout import Axes, Grid, told
from zimage.experiments.metrics.catalogue import KINDS
from zimage.experiments.ranking import Interval, Row, rank_table
from zimage.pictures.opening import opened
from zimage.settings.fields import Plain

KEPT = 20_000  # sizes of pictures that are remembered


def described(whole: Experiment, grids: Sequence[Grid], axes: Axes) -> dict[str, Plain]:
    """Axes with their values, the pages with a cell's id in each place, and the cells that stand on them."""
    cells = {cell.id: cell for grid in grids for cell in grid.places.values()}
    return {
        "name": whole.folder.absolute().name,
        "total": len(whole.cells),
        "axes": {name: [shown(value) for value in values] for name, values in whole.axes.items()},
        "sides": dataclasses.asdict(axes),
        "pages": [_page(grid) for grid in grids],
        "cells": {id: summary(cell, whole) for id, cell in cells.items()},
    }


def summary(cell: Cell, experiment: Experiment) -> dict[str, Plain]:
    """What the grid shows of a cell."""
    width, height = size_of(cell)
    return {
        "id": cell.id,
        "label": label(cell, [name for name in experiment.axes if name != "prompt"]),
        "prompt": cell.record.prompt,
        "seed": None if cell.record.seed is None else str(cell.record.seed),
        "fault": "" if width else cell.fault or "the picture cannot be read",
        "width": width,
        "height": height,
        "facts": facts(cell),
    }


def label(cell: Cell, names: Iterable[str]) -> str:
    """What tells a cell from the others."""
    return " · ".join(f"{name} {shown(cell.values[name])}" for name in names) or cell.id


def facts(cell: Cell) -> list[str]:
    """Scores, and the seconds that it took."""
    scores = [f"{name} {value:.3g}" for name, value in cell.record.scores.items()]
    seconds = sum(cell.record.timings.values())
    return [*scores, f"{seconds:.3g} s"] if seconds else scores


def details(cell: Cell) -> dict[str, Plain]:
    """The whole record."""
    return dataclasses.asdict(cell.record)


def ranks(experiment: Experiment) -> list[dict[str, Plain]]:
    """A table per metric that the cells have scores in: settings, the best first, with intervals over prompts."""
    records = [cell.record for cell in experiment.cells]
    scored = [name for name in KINDS if any(name in record.scores for record in records)]
    return [
        {
            "title": f"{name}, {'higher' if KINDS[name].higher_is_better else 'lower'} is better",
            "rows": [_rank(row) for row in rank_table(records, name, KINDS[name].higher_is_better)],
        }
        for name in scored
    ]


def size_of(cell: Cell) -> tuple[int, int]:
    """Width and height in pixels; 0 × 0 where there is no picture that can be read."""
    try:
        return _size(cell.path, cell.path.stat().st_mtime_ns) if cell.path else (0, 0)
    except (RequestError, OSError):
        return 0, 0


@functools.lru_cache(maxsize=KEPT)
def _size(path: Path, changed: int) -> tuple[int, int]:
    with opened(path) as picture:
        return picture.size


def _rank(row: Row) -> dict[str, Plain]:
    """A row in words."""
    setting = " · ".join(f"{name} {shown(json.dumps(value))}" for name, value in row.setting)
    mean, rank = _with(row.mean, row.mean_interval), _with(row.rank, row.rank_interval)
    return {"setting": setting or "all", "mean": mean, "rank": rank, "best": f"{row.best:.0%}"}


def _with(value: float, interval: Interval | None) -> str:
    return f"{value:.3g}" + (f" ({interval.low:.3g} to {interval.high:.3g})" if interval else "")


def _page(grid: Grid) -> dict[str, Plain]:
    places = [[_id(grid, row, column) for column in range(len(grid.columns))] for row in range(len(grid.rows))]
    return {
        "title": told(grid.axes.pages, grid.page),
        "rows": [told(grid.axes.rows, row) for row in grid.rows],
        "columns": [told(grid.axes.columns, column) for column in grid.columns],
        "places": places,
    }


def _id(grid: Grid, row: int, column: int) -> str | None:
    cell = grid.places.get((row, column))
    return None if cell is None else cell.id
