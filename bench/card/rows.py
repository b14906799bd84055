"""What the rows of `bench card` are: a name, what measures it, and what came of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench.peaks import Peaks, peaks_of

Row = dict[str, Any]  # figures, plain values; with `error` it failed, with `absent` there was nothing to measure


ROOM = 1.05  # of a peak over the plan's figure
GRAIN_MB = 2  # in which CUDA's allocator takes memory


class Absent(Exception):
    """Nothing to measure: a package is not installed, or the GPU cannot do it. Not a failure."""


class Wrong(Exception):
    """What was measured is wrong: the figures are kept, and the row failed."""

    def __init__(self, text: str, row: Row):
        super().__init__(text)
        self.row = row


class Task(NamedTuple):
    """One row that can be measured."""

    name: str
    measure: Callable[[], Row]


@dataclass(frozen=True)
class Bench:
    """What all sections need to know."""

    device: torch.device
    sizes: tuple[int, ...] = (512, 1024, 2048)
    repeats: int = 10
    small: bool = False  # small models, whose times mean nothing
    folder: str = ""  # where model files are written

    @property
    def peaks(self) -> Peaks | None:
        """The maker's figures of this GPU, if they are listed."""
        return peaks_of(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None


class Section(NamedTuple):
    """Rows that belong together, and how many seconds of a run of 10 minutes they may take."""

    name: str
    title: str
    seconds: float
    rows: Callable[[Bench], Iterator[Task]]


def attempt(task: Task) -> Row:
    """The row, or in one line what went wrong: kernels and packages raise what they please."""
    try:
        with torch.no_grad():
            return task.measure()
    except Absent as reason:
        return {"absent": str(reason)}
    except Wrong as error:
        return {**error.row, "error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def must(row: Row, holds: bool, text: str) -> Row:
    """The row, if what must hold of it does. Raises Wrong, which keeps its figures."""
    if not holds:
        raise Wrong(text, row)
    return row


def as_planned(row: Row, beside_mb: float = 0) -> Row:
    """The row, if its peak is what the plan counts with, and `beside_mb`. Raises Wrong."""
    text = f"a peak of {row['peak_mb']} MB where {row['planned_mb']} were planned"
    return must(row, row["peak_mb"] <= ROOM * row["planned_mb"] + GRAIN_MB + beside_mb, text)


def needs(module: str) -> None:
    """Raise Absent where a package is not installed."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise Absent(f"{module} is not installed")
