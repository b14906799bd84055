"""What a cell shows: its picture or how it differs from another, and the words below."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from zimage.errors import RequestError
from zimage.experiments.difference import GAIN, MOST_GAIN, Kind, difference, distance
from zimage.experiments.folder import Cell, Experiment


@dataclass(frozen=True)
class Shown:
    """A picture, or why there is none; and captions, one line each."""

    picture: Image.Image | None
    captions: Sequence[str] = ()
    fault: str = ""


@dataclass(frozen=True)
class Showing:
    """How cells are shown: as differences of a `kind` from a `base` (a cell's id, or AXIS=VALUE); which scores.

    The base is looked for in the whole `experiment`, whatever part of it is shown. `gain` multiplies differences.
    Raises RequestError for a base and for scores that are not there.
    """

    experiment: Experiment
    kind: Kind | None = None
    base: str = ""
    gain: float = GAIN
    scores: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 < self.gain <= MOST_GAIN:
            raise RequestError(f"gain {self.gain:g} should be above 0 and at most {MOST_GAIN:g}", fields=("gain",))
        if self.base:
            self.experiment.value(self.base) if "=" in self.base else self.experiment.cell(self.base)
        elif self.kind:
            raise RequestError("a difference needs a base; pass the id of a cell or AXIS=VALUE", fields=("base",))
        known = {name for cell in self.experiment.cells for name in cell.record.scores}
        for name in self.scores:
            if name not in known:
                raise RequestError(f"no cell has a score {name!r}; {_scored(known)}", fields=("score",))

    @property
    def note(self) -> str:
        """A line for the whole sheet; empty where pictures are shown as they are."""
        if not self.kind:
            return ""
        strength = "" if self.kind == "highlight" else f", × {self.gain:g}"
        return f"{self.kind} difference from {self.base.replace('=', ' ', 1)}{strength}"

    @property
    def lines(self) -> int:
        """How many captions a cell has."""
        return len(self.scores) + (2 if self.base else 0)

    def of(self, cell: Cell) -> Shown:
        """What cannot be shown is a fault in its own place; the rest of the sheet stands."""
        scores = [f"{name} {_number(cell.record.scores.get(name))}" for name in self.scores]
        try:
            picture = cell.picture()
            if not self.base:
                return Shown(picture, scores)
            base = self.experiment.partner(cell, self.base)
            if base.id == cell.id:
                return Shown(picture, ["base", "", *scores])
            other = base.picture()
            image = difference(picture, other, self.kind, self.gain) if self.kind else picture
            return Shown(image, [*distance(picture, other).lines, *scores])
        except RequestError as error:
            return Shown(None, scores, cell.fault or str(error))


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


def _scored(known: set[str]) -> str:
    return f"there are {', '.join(sorted(known))}" if known else "write some with `zimage metrics`"
