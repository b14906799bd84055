"""A memory plan as plain values: what a request needs, and what is in memory while each stage runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zimage.settings.fields import Hint


@dataclass(frozen=True)
class Workload:
    """What determines the memory of a request: sizes in pixels, tokens of its longest text, images denoised together.

    `tile_mode` "" leaves the choice to the planner; `tile_size` 0 is the default. `stored_tokens` is the room, in
    tokens, of the text encoder's cache when it writes; 0 when it only encodes. `loras` are the bytes of LoRAs where
    they are computed beside their layers, `controls` those of the weights of ControlNets, and `control_streams` is how
    many run beside the DiT. `vision_patches` are those of the largest reference picture, and `vision_tokens` the tokens
    of the longest text that is read with such pictures; 0 without any. `nag_tokens` are those of the negative text in
    the DiT's sequence; 0 without NAG. `ranks` share the work on each image: the memory is that of one of them, which
    holds all weights.
    """

    width: int
    height: int
    tokens: int
    batch: int = 1
    tile_mode: str = ""
    tile_size: int = 0
    stored_tokens: int = 0
    loras: int = 0
    controls: int = 0
    control_streams: int = 0
    vision_patches: int = 0
    vision_tokens: int = 0
    nag_tokens: int = 0
    ranks: int = 1

    @property
    def pixels(self) -> int:
        return self.width * self.height


@dataclass(frozen=True)
class StagePlan:
    """The memory of the stage in which one component works, on its device, in bytes."""

    component: str
    title: str  # of the component, in sentences
    device: str
    base: int  # what is there before anything is loaded
    weights: int  # in memory throughout, including other components'
    activations: int
    streamed: tuple[int, ...] = ()  # indices of the blocks that come and go
    streamed_bytes: int = 0
    window: int = 0  # bytes of them that are in memory at once
    blocks: int = 0  # in all
    pinned: int = 0  # page-locked on the host, for streaming to a GPU
    beside: tuple[str, ...] = ()  # other components that may be in memory meanwhile; `weights` counts them
    tile_mode: str = ""  # of the VAE's stage
    passing: bool = False  # whether its component is let go after it, whatever room there is

    @property
    def peak(self) -> int:
        return self.base + self.weights + self.window + self.activations


# What a plan is as plain values, for `settings.plain.mistake`.
PLAN: dict[str, Hint] = {
    "work": Workload,
    "stages": dict[str, StagePlan],
    "kept": list[str],
    "limits": dict[str, int],
    "budget": float | None,
}


@dataclass(frozen=True)
class MemoryPlan:
    """How a workload runs: its stages, the components that stay loaded afterwards, and the limit of each device."""

    work: Workload
    stages: Mapping[str, StagePlan]  # by component
    kept: frozenset[str]
    limits: Mapping[str, int]  # bytes, by device
    budget: float | None  # the setting `memory` in GB; None: what is free

    @property
    def tile_mode(self) -> str:
        return next((stage.tile_mode for stage in self.stages.values() if stage.tile_mode), "off")

    @property
    def keeps_all(self) -> bool:
        """Whether all components stay that may."""
        return all(name in self.kept or stage.passing for name, stage in self.stages.items())

    def excess(self, stage: StagePlan) -> int:
        """Bytes by which a stage exceeds what its device allows; negative where there is room."""
        return stage.peak - self.limits[stage.device]

    @property
    def tightest(self) -> StagePlan:
        """The stage with the least room left, or with the largest excess."""
        return max(self.stages.values(), key=self.excess)

    @property
    def fits(self) -> bool:
        return self.excess(self.tightest) <= 0

    def to_dict(self) -> dict[str, object]:
        """Plain values, as JSON holds them."""
        lists = {n: {"streamed": list(s.streamed), "beside": list(s.beside)} for n, s in self.stages.items()}
        stages = {name: {**asdict(stage), **lists[name]} for name, stage in self.stages.items()}
        kept, limits = sorted(self.kept), dict(self.limits)
        return {"work": asdict(self.work), "stages": stages, "kept": kept, "limits": limits, "budget": self.budget}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "MemoryPlan":
        """The inverse of `to_dict`; `plain` is a PLAN."""
        lists = ("streamed", "beside")
        stages = {n: StagePlan(**{**s, **{x: tuple(s[x]) for x in lists}}) for n, s in plain["stages"].items()}
        work, kept = Workload(**plain["work"]), frozenset(plain["kept"])
        return cls(work, stages, kept, dict(plain["limits"]), plain["budget"])
