"""The three ways of metrics through cells: each alone, each beside its base, all seeds among themselves."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from PIL import Image

from zimage.errors import RequestError
from zimage.experiments.folder import Cell, by_values

log = logging.getLogger("zimage")

Base: TypeAlias = Mapping[str, str]  # the values of some axes, as cells hold them
Scored: TypeAlias = Iterator[tuple[Cell, float | None]]  # None where a metric says nothing of a cell


class Walk(Protocol):
    """A metric, made ready: it takes the cells in an order that opens few pictures twice."""

    def __call__(self, cells: Sequence[Cell], base: Base) -> Scored: ...


class Pairs(Protocol):
    """Compares two "RGB" pictures of one size. What it reads of each is made ready once; None: it is too small."""

    def prepare(self, picture: Image.Image) -> Any: ...
    def distance(self, one: Any, other: Any) -> float | None: ...


@dataclass(frozen=True)
class Alone:
    """Each picture with its prompt."""

    score: Callable[[Image.Image, str], float | None]

    def __call__(self, cells: Sequence[Cell], base: Base) -> Scored:
        for cell in cells:
            picture = _picture(cell)
            yield cell, None if picture is None else self.score(picture, cell.record.prompt)


@dataclass(frozen=True)
class BesideBase:
    """Each picture and that of its base. The cells of one base come one after another."""

    pairs: Pairs

    def __call__(self, cells: Sequence[Cell], base: Base) -> Scored:
        found, groups = partners(cells, base), dict[str, list[Cell]]()
        for cell in cells:
            if cell.id in found:
                groups.setdefault(found[cell.id].id, []).append(cell)
            else:
                yield cell, None
        for group in groups.values():
            first = _Prepared.of(self.pairs, found[group[0].id])
            for cell in group:
                yield cell, _distance(self.pairs, first, _Prepared.of(self.pairs, cell))


@dataclass(frozen=True)
class AmongSeeds:
    """The mean distance of all pairs of seeds with all else equal, the same for each of them; none for one seed."""

    pairs: Pairs

    def __call__(self, cells: Sequence[Cell], base: Base) -> Scored:
        groups: dict[frozenset[tuple[str, str]], list[Cell]] = defaultdict(list)
        for cell in cells:
            groups[frozenset((axis, value) for axis, value in cell.values.items() if axis != "seed")].append(cell)
        for group in groups.values():
            mean = self._mean(group) if len(group) > 1 else None
            yield from ((cell, mean) for cell in group)

    def _mean(self, group: Sequence[Cell]) -> float | None:
        prepared = [_Prepared.of(self.pairs, cell) for cell in group]
        distances = [_distance(self.pairs, *pair) for pair in itertools.combinations(prepared, 2)]
        told = [distance for distance in distances if distance is not None]
        return sum(told) / len(told) if told else None


def partners(cells: Sequence[Cell], base: Base) -> dict[str, Cell]:
    """The base of each cell, by the cell's id: equal on all axes but those that `base` fixes.

    A cell that is a base itself has none, nor has one whose base is not there.
    """
    places = by_values(cells)
    found = {cell.id: places.get(frozenset({**cell.values, **base}.items())) for cell in cells}
    return {id: other for id, other in found.items() if other is not None and other.id != id}


@dataclass(frozen=True)
class _Prepared:
    """What a metric reads of a picture, and its size."""

    values: object
    size: tuple[int, int]

    @classmethod
    def of(cls, pairs: Pairs, cell: Cell) -> "_Prepared | None":
        picture = _picture(cell)
        values = None if picture is None else pairs.prepare(picture)
        return None if picture is None or values is None else cls(values, picture.size)


def _distance(pairs: Pairs, one: _Prepared | None, other: _Prepared | None) -> float | None:
    """None also for pictures of unequal size, which have no places in common."""
    if one is None or other is None or one.size != other.size:
        return None
    return pairs.distance(one.values, other.values)


def _picture(cell: Cell) -> Image.Image | None:
    """A damaged picture costs its own scores only, and is told."""
    try:
        return cell.picture()
    except RequestError as error:
        log.warning("the cell %s has no score: %s", cell.id, error)
        return None
