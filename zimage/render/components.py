"""The components of a pipeline as one job sees them."""

from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from zimage.events import Event
from zimage.loading.controls import ControlFiles
from zimage.loading.files import ModelFiles
from zimage.loading.loras import Adapters
from zimage.loading.memory import out_of_memory_in
from zimage.loading.plan import MemoryPlan
from zimage.loading.registry import ROWS
from zimage.loading.residency import Residency

R = TypeVar("R")


class Components:
    """By a job's plan, with its adapters and control files."""

    def __init__(self, residency: Residency, plan: MemoryPlan, adapters: Adapters = (), controls: ControlFiles = ()):
        self.residency, self.plan, self.adapters, self.controls = residency, plan, adapters, controls

    @property
    def model(self) -> ModelFiles:
        return self.residency.model

    def use(self, name: str) -> AbstractContextManager[Any]:
        """A component for one piece of work; see `Residency.use`."""
        return self.residency.use(name, self.plan, self.adapters, self.controls)

    def config(self, name: str) -> Any:
        return self.residency.model.config(name)

    def device(self, name: str) -> torch.device:
        return self.residency.places[name].device

    def stage(self, name: str, events: Generator[Event, None, R]) -> Generator[Event, None, R]:
        """A stage's events, its component loaded before and, unless it is kept, let go after them; "" loads nothing."""
        if not name:
            return (yield from events)
        yield Event("load", 0, 1, detail=name)
        with out_of_memory_in(ROWS[name].title):
            self.residency.begin(name, self.plan, self.adapters, self.controls)
        try:
            yield Event("load", 1, 1, detail=name)
            with out_of_memory_in(ROWS[name].title):
                return (yield from events)
        finally:
            self.residency.finish(name, self.plan)
