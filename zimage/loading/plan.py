"""What a memory plan says of one request: the memory of each stage, what stays loaded, what each device allows."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Stage:
    """One stage's memory on its device, in bytes."""

    name: str
    device: torch.device
    base: int  # what is there before anything is loaded
    weights: int  # in memory throughout, other parts' included
    activations: int
    streamed: tuple[int, ...] = ()  # indices of the blocks that come and go
    streamed_bytes: int = 0
    window: int = 0  # of their weights in memory at once
    blocks: int = 0  # in all
    pinned: int = 0  # page-locked on the host, for streaming to a GPU
    tile_mode: str | None = None

    @property
    def peak(self) -> int:
        return self.base + self.weights + self.window + self.activations


@dataclass(frozen=True)
class Schedule:
    """How one request is run: its stages, the parts that stay loaded, and what each device allows."""

    stages: dict[str, Stage]
    kept: frozenset[str]
    limits: dict[torch.device, int]
    given: float | None  # the setting `memory`

    @property
    def tile_mode(self) -> str:
        return self.stages["vae"].tile_mode

    def excess(self, stage: Stage) -> int:
        return stage.peak - self.limits[stage.device]

    @property
    def tightest(self) -> Stage:
        """The stage with the least room left, or the most lacking."""
        return max(self.stages.values(), key=self.excess)

    @property
    def fits(self) -> bool:
        return self.excess(self.tightest) <= 0
