"""A job as clients see it: what is kept of it, and how far it is now."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zimage.serve.jobs import JobRow
from zimage.settings.fields import Plain

DRAWING = "denoise"


@dataclass
class Progress:
    """How far a running job is. `remaining`: seconds until its pictures are denoised, once a step tells; else None."""

    stage: str = ""
    step: int = 0
    total: int = 0
    index: int = 0
    count: int = 1
    remaining: float | None = None
    _begun: float = field(default=0.0, repr=False)
    _first: int = field(default=0, repr=False)

    def update(self, message: Mapping[str, Any]) -> None:
        """Take in a worker's message of this kind."""
        entered = message["stage"] != self.stage
        self.stage, self.step, self.total = message["stage"], message["step"], message["total"]
        self.index, self.count = message.get("index", 0), message.get("count", 1)
        done = self.index * self.total + self.step
        if entered:
            self._begun, self._first, self.remaining = time.monotonic(), done, None
        elif self.stage == DRAWING and done > self._first:
            rate = (time.monotonic() - self._begun) / (done - self._first)
            self.remaining = round(rate * (self.count * self.total - done), 2)

    def plain(self) -> dict[str, Plain]:
        names = ("stage", "step", "total", "index", "count", "remaining")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class JobView:
    """A job at one moment. `position`: the jobs before it, None unless it waits; `images` as the history has them."""

    id: str
    kind: str
    state: str
    position: int | None
    created: float
    started: float | None
    finished: float | None
    request: dict[str, Plain]
    seeds: list[int]
    stage: str
    step: int
    total: int
    index: int
    count: int
    remaining: float | None
    images: list[dict[str, Plain]]
    timings: dict[str, float]
    notes: list[str]
    rewritten: list[dict[str, Plain]]
    error: dict[str, Plain] | None

    @classmethod
    def of(cls, row: JobRow, progress: Progress, position: int | None, images: list[dict[str, Plain]]) -> "JobView":
        kept = ("id", "state", "created", "started", "finished", "request", "seeds", "timings", "rewritten", "error")
        values = {name: getattr(row, name) for name in kept}
        return cls(**values, **progress.plain(), kind=row.form, notes=list(row.notes), position=position, images=images)

    def plain(self) -> dict[str, Plain]:
        """As JSON has it."""
        return dict(vars(self))
