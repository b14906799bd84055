"""A folder of cells, opened to be looked at. It may come from anybody: what it says is checked, and leads nowhere else.

An axis is a name under which cells have different values: the settings that a sweep varied, and prompt and seed.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from PIL import Image

from zimage.errors import RequestError, one_line, quoted
from zimage.experiments.axes import shown as shown_plain
from zimage.experiments.record import Record, read_records
from zimage.formats.files import is_inside
from zimage.pictures.image import open_image
from zimage.settings.fields import Plain

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
DEFAULT = "null"  # the value of a cell that does not have an axis, and of what was left open
LONGEST = 200  # characters of a shown value


@dataclass(frozen=True)
class Cell:
    """A record with its value on every axis, as JSON text, and where its picture lies."""

    record: Record
    values: Mapping[str, str]
    path: Path | None

    @property
    def id(self) -> str:
        return self.record.id

    def picture(self) -> Image.Image:
        """RGB. Raises RequestError where there is none that can be read."""
        if self.path is None:
            raise RequestError(self.fault)
        return open_image(self.path)

    @property
    def fault(self) -> str:
        """Why there is no picture; empty where there should be one."""
        if self.record.error is not None:
            return one_line(self.record.error) or "failed without a reason"
        return "" if self.path is not None else "not rendered"


@dataclass(frozen=True)
class Experiment:
    """The cells of a folder, and the axes on which they differ: name → values as JSON text, in their natural order."""

    folder: Path
    cells: Sequence[Cell]
    axes: Mapping[str, Sequence[str]]

    @classmethod
    def open(cls, folder: Path) -> "Experiment":
        """Raises RequestError for a folder without records, and for records that are not as they should be."""
        cells = [_cell(folder, record) for record in read_records(folder) if record.kind == "cell"]
        if not cells:
            raise RequestError(f"{quoted(str(folder))} holds no cells; pass the folder of a sweep")
        names = dict.fromkeys(name for cell in cells for name in cell.values)
        cells = [replace(cell, values={name: cell.values.get(name, DEFAULT) for name in names}) for cell in cells]
        return cls(folder, cells, varying(cells))

    def cell(self, id: str) -> Cell:
        """By its id or the beginning of it. Raises RequestError."""
        found = [cell for cell in self.cells if cell.id.startswith(id)]
        exact = [cell for cell in found if cell.id == id]
        if len(exact or found) != 1:
            text = f"the ids of {len(found)} cells begin with {quoted(id)}" if found else f"no cell is {quoted(id)}"
            raise RequestError(f"{text}; pass an id of {self.folder.name}, or AXIS=VALUE")
        return (exact or found)[0]

    def value(self, text: str) -> tuple[str, str]:
        """The axis and the value that AXIS=VALUE names. Raises RequestError."""
        axis, equals, wanted = text.partition("=")
        known = self._known
        if not equals or axis not in known:
            raise RequestError(f"{quoted(text)} should be AXIS=VALUE, where AXIS is one of {', '.join(known)}")
        for value in known[axis]:
            if wanted in (value, shown(value)) or _is_number(wanted, json.loads(value)):
                return axis, value
        values = ", ".join(one_line(shown(value), 40) for value in known[axis][:20])
        raise RequestError(f"{axis} has no value {quoted(wanted)} here; it has {values}")

    @property
    def names(self) -> list[str]:
        """Every axis, also with one value only."""
        return list(self.cells[0].values)

    def only(self, texts: Iterable[str]) -> "Experiment":
        """The cells that have the values named as AXIS=VALUE; of one axis any of them. Raises RequestError."""
        wanted: dict[str, list[str]] = {}
        for axis, value in map(self.value, texts):
            wanted.setdefault(axis, []).append(value)
        kept = [cell for cell in self.cells if all(cell.values[a] in values for a, values in wanted.items())]
        if not kept:
            raise RequestError("no cell has all of these values; leave some out")
        return Experiment(self.folder, kept, varying(kept))

    def pair(self, left: str, right: str) -> tuple["Experiment", str, tuple[str, ...]]:
        """Two cells, or those of two values of an axis, the left one first; the left as a base, and the axes between.

        Raises RequestError.
        """
        if ("=" in left) != ("=" in right):
            raise RequestError("name two cells by their ids, or two values of one axis as AXIS=VALUE")
        if "=" in left:
            (axis, first), (other, second) = self.value(left), self.value(right)
            if axis != other or first == second:
                raise RequestError(f"{left} and {right} should be two values of one axis")
            kept = self.only([left, right])
            return replace(kept, axes={**kept.axes, axis: [first, second]}), left, (axis,)
        cells = [self.cell(left), self.cell(right)]
        apart = {name: [cell.values[name] for cell in cells] for name in varying(cells)}
        if not apart:
            raise RequestError(f"{left} and {right} do not differ on any axis")
        return Experiment(self.folder, cells, apart), cells[0].id, tuple(apart)

    def partner(self, cell: Cell, base: str) -> Cell:
        """The cell that another is compared with: a cell by its id, or AXIS=VALUE with all else as in that cell.

        Raises RequestError where there is none.
        """
        if "=" not in base:
            return self.cell(base)
        axis, value = self.value(base)
        found = self._by_values.get(frozenset({**cell.values, axis: value}.items()))
        if found is None:
            raise RequestError(f"no cell has {axis} {shown(value)} and all else as {cell.id}")
        return found

    @cached_property
    def _known(self) -> dict[str, list[str]]:
        return {name: _distinct(cell.values[name] for cell in self.cells) for name in self.names}

    @cached_property
    def _by_values(self) -> dict[frozenset[tuple[str, str]], Cell]:
        return by_values(self.cells)


def by_values(cells: Iterable[Cell]) -> dict[frozenset[tuple[str, str]], Cell]:
    """Cells by their values on all axes; of several with the same ones, as in a folder of two sweeps, the last."""
    return {frozenset(cell.values.items()): cell for cell in cells}


def varying(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """The axes on which cells differ, in the order in which they first come."""
    axes = {name: _distinct(cell.values[name] for cell in cells) for name in cells[0].values}
    return {name: values for name, values in axes.items() if len(values) > 1}


def shown(value: str) -> str:
    """A value on an axis, as JSON text, as people read it: on one line."""
    return one_line(shown_plain(json.loads(value)), LONGEST) or "(empty)"


def _cell(folder: Path, record: Record) -> Cell:
    fault = "" if ID.fullmatch(record.id) else f"its id is {quoted(record.id)}"
    if fault := fault or _unsayable(record):
        raise RequestError(f"a record of {quoted(folder.name)} cannot be used: {fault}")
    plain: dict[str, Plain] = {**record.axes, "prompt": record.prompt, "seed": record.seed}
    values = {name: json.dumps(value, sort_keys=True) for name, value in plain.items()}
    return Cell(record, values, _path(folder, record))


def _unsayable(record: Record) -> str:
    """What JSON or UTF-8 cannot say: NaN, infinity, half a character."""
    try:
        json.dumps(vars(record), ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return "it holds NaN, infinity or text that is not valid Unicode"
    return ""


def _path(folder: Path, record: Record) -> Path | None:
    """Of a record's picture, where it lies in the folder and is there."""
    if record.path is None or record.error is not None or "\0" in record.path:
        return None
    path = folder / record.path
    return path if is_inside(folder, path) and path.is_file() else None


def _is_number(text: str, value: Plain) -> bool:
    """Whether a text is this number: people write 3 for 3.0."""
    try:
        return value is not None and float(text) == value
    except ValueError:
        return False


def _distinct(values: Iterable[str]) -> list[str]:
    """Numbers by size, all else as it first comes."""
    found = list(dict.fromkeys(values))
    plain = [json.loads(value) for value in found]
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in plain):
        return [value for _, value in sorted(zip(plain, found, strict=True), key=lambda pair: pair[0])]
    return found
