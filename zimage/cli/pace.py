"""How fast the rows of a batch end, and how long the rest will take at that pace: one line that is replaced."""

import time
from typing import TYPE_CHECKING

from zimage.cli.progress import Progress

if TYPE_CHECKING:
    from zimage.batch.index import Line


class Pace:
    """Told how far a batch is, it shows it."""

    def __init__(self, progress: Progress):
        self._progress, self._first = progress, 0.0
        self._total = self._kept = self._done = self._failed = 0

    def begun(self, total: int, kept: int) -> None:
        """So many rows are asked for, and these of them are drawn already."""
        self._total, self._kept = total, kept
        self._show()

    def ended(self, line: "Line") -> None:
        """A row has ended."""
        self._done += 1
        self._failed += line["error"] is not None
        self._first = self._first or time.monotonic()
        self._show()

    def _show(self) -> None:
        parts = [f"{self._kept + self._done - self._failed} of {self._total} rendered"]
        parts += [f"{self._failed} failed"] if self._failed else []
        seconds = time.monotonic() - self._first
        if self._done > 1 and seconds > 0:  # models are loaded before the first one ends
            each = seconds / (self._done - 1)
            left = each * (self._total - self._kept - self._done)
            parts += [f"{60 / each:.1f} pictures a minute", f"{_span(left)} left"]
        self._progress.show(", ".join(parts))


def _span(seconds: float) -> str:
    """A span of time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
