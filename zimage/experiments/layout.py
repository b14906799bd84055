"""Which cell stands where: columns, rows and pages of a sheet, as people know them from X/Y/Z plots.

Each of the three is a list of axes, and its headings are those combinations of values that any cell has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from zimage.errors import RequestError, quoted
from zimage.experiments.folder import Cell, Experiment, shown

Heading = tuple[str, ...]  # a value per axis, as JSON text


@dataclass(frozen=True)
class Axes:
    """What stands along each side. Every axis that varies is in one of the three."""

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    pages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """One page: its own values, the headings of both sides, and the cells by (row, column)."""

    axes: Axes
    page: Heading
    rows: Sequence[Heading]
    columns: Sequence[Heading]
    places: Mapping[tuple[int, int], Cell]

    def part(self, rows: range, columns: range) -> "Grid":
        """Some of the rows and columns as a grid of their own."""
        places = {
            (r, c): self.places[row, column]
            for r, row in enumerate(rows)
            for c, column in enumerate(columns)
            if (row, column) in self.places
        }
        picked = [self.rows[row] for row in rows], [self.columns[column] for column in columns]
        return Grid(self.axes, self.page, *picked, places)


def placed(
    experiment: Experiment, columns: Sequence[str] = (), rows: Sequence[str] = (), pages: Sequence[str] = ()
) -> Axes:
    """The sides as they are asked for; of the other axes that vary the first becomes columns where there are none yet,
    the second rows, and the rest pages. Raises RequestError for unknown axes and those that are named twice."""
    named = [*columns, *rows, *pages]
    known = experiment.names
    for name in named:
        if name not in known:
            raise RequestError(f"no cell has an axis {quoted(name)}; there are {', '.join(known)}")
        if named.count(name) > 1:
            raise RequestError(f"the axis {name} is named twice; pass it as rows, as columns or as pages")
    rest = [name for name in experiment.axes if name not in named]
    wide = tuple(columns) or tuple(rest[:1])
    rest = rest if columns else rest[1:]
    high = tuple(rows) or tuple(rest[:1])
    return Axes(wide, high, (*pages, *(rest if rows else rest[1:])))


def arranged(experiment: Experiment, axes: Axes) -> list[Grid]:
    """A grid per page. Where several cells have one place, as in a folder of two sweeps, the last of them stands."""
    pages: dict[Heading, list[Cell]] = {page: [] for page in _headings(experiment, axes.pages)}
    for cell in experiment.cells:
        pages[_of(cell, axes.pages)].append(cell)
    return [_grid(replace(experiment, cells=cells), axes, page) for page, cells in pages.items()]


def told(names: Sequence[str], heading: Heading) -> str:
    """A heading in words: "steps 4 · shift 3"."""
    return " · ".join(f"{name} {shown(value)}" for name, value in zip(names, heading, strict=True))


def _grid(of_page: Experiment, axes: Axes, page: Heading) -> Grid:
    rows, columns = _headings(of_page, axes.rows), _headings(of_page, axes.columns)
    row, column = ({heading: i for i, heading in enumerate(side)} for side in (rows, columns))
    places = {(row[_of(cell, axes.rows)], column[_of(cell, axes.columns)]): cell for cell in of_page.cells}
    return Grid(axes, page, rows, columns, places)


def _of(cell: Cell, names: Sequence[str]) -> Heading:
    return tuple(cell.values[name] for name in names)


def _headings(experiment: Experiment, names: Sequence[str]) -> list[Heading]:
    """The combinations that any cell has, each axis in its order of values."""
    order = {name: {value: i for i, value in enumerate(experiment.axes.get(name, ()))} for name in names}
    found = {_of(cell, names) for cell in experiment.cells}
    return sorted(found, key=lambda heading: [order[n].get(v, 0) for n, v in zip(names, heading, strict=True)])
