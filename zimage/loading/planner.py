"""Decides which components are in memory and when: before anything is loaded, from sizes alone.

On each device the planner takes the first of these that fits, the least costly first:

    keep     all components stay loaded between stages and requests
    stage    each component is loaded for its stage and then released
    strips   … and the picture is decoded in exact strips
    stream   … and the weights of some blocks of the text encoder or the DiT, as few as possible, are in memory
             only while these run (`loading.streaming`)

The peak of a stage is the memory in use anyway, plus the weights in memory during it, plus what its work needs
(`loading.sizes`). On a CPU it is the whole process's resident memory, with pages of mapped files, as Linux counts it
(VmHWM); on a GPU what PyTorch allocates there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from zimage.errors import RequestError
from zimage.loading.devices import Place
from zimage.loading.files import ModelFiles
from zimage.loading.memory import available_memory, process_memory
from zimage.loading.plan import MemoryPlan, StagePlan, Workload
from zimage.loading.registry import ROWS, TEXT_ENCODER, VAE
from zimage.loading.sizes import BlockBytes, ComponentSizes, measure
from zimage.settings.declared import MAX_SIDE, SIZE_MULTIPLE, LoadSettings

# By default weights stay loaded on a CPU only if they leave as much memory free: other programs live there too, and
# releasing mapped pages costs little, since the kernel keeps them cached. A GPU is used to the full.
KEEP_SHARE = 0.5
# Pictures are decoded whole up to this size and in strips beyond it, however much memory is free: strips equal the
# whole only up to rounding, and a request should give the same bits on every machine that has some 4 GB.
WHOLE_BYTES = 3e9
# Measured: code pages of libraries first used in a render, thread stacks, freed memory that is not returned.
RUNTIME_BYTES = {"cpu": 40_000_000}
ELSEWHERE_BYTES = 300_000_000  # on a GPU: workspaces of libraries, rounding of the allocator; an unmeasured allowance
STREAMING_DEVICES = ("cpu", "cuda")


class Planner:
    """Knows the sizes of a model's components in their places, and the available memory."""

    def __init__(self, model: ModelFiles, places: Mapping[str, Place], settings: LoadSettings):
        self.settings = settings
        devices = dict.fromkeys(place.device for place in places.values())
        self._base = {device: _base_bytes(device) for device in devices}
        # A component may compute in fp32 though its file is bf16; casting it whole would double its memory.
        self.sizes = {name: self._measured(model, name, place) for name, place in places.items()}

    def _measured(self, model: ModelFiles, name: str, place: Place) -> ComponentSizes:
        component, (device, dtype) = model.components[name], place
        room = KEEP_SHARE * (self._limit(device) - self._base[device])
        late = component.weight_bytes(dtype) > max(room, 1.5 * component.stored_bytes())
        precision = self.settings.precision if ROWS[name].transformed else "bf16"
        return measure(component, device, dtype, late, precision, device.type in STREAMING_DEVICES)

    # ------------------------------------------------------------------ the decision

    def plan(self, work: Workload, loaded: Iterable[str] = ()) -> MemoryPlan:
        """How to run a workload in the memory that is free once the `loaded` components are released.

        Always returns a plan; `check` refuses one that does not fit.
        """
        copies = {name: self.sizes[name].copied for name in loaded if name in self.sizes}
        stages: dict[str, StagePlan] = {}
        kept: set[str] = set()
        limits = {}
        for device in self._base:
            names = [name for name, sizes in self.sizes.items() if sizes.device == device]
            limits[str(device)] = limit = self._limit(device, sum(copies.get(name, 0) for name in names))
            together = self._together(names, work, self._keeping_limit(device, limit))
            if together:
                kept.update(names)
            stages |= together or {name: self._alone(name, work, limit) for name in names}
        ordered = {name: stages[name] for name in self.sizes}
        return MemoryPlan(work, ordered, frozenset(kept), limits, self.settings.memory)

    def plan_writing(self, tokens: int, loaded: Iterable[str] = ()) -> MemoryPlan:
        """How the text encoder writes a text of `tokens` in total. Raises RequestError if it does not fit."""
        work = Workload(SIZE_MULTIPLE, SIZE_MULTIPLE, tokens, tile_mode="off", stored_tokens=tokens)
        plan = self.plan(work, loaded)
        stage = plan.stages[TEXT_ENCODER]
        limit = plan.limits[stage.device]
        if plan.excess(stage) > 0:  # also where all should be kept: then only while it writes are they not
            stage = self._alone(TEXT_ENCODER, work, limit)
            kept = frozenset(n for n in plan.kept if plan.stages[n].device != stage.device)
            plan = replace(plan, stages={**plan.stages, TEXT_ENCODER: stage}, kept=kept)
        if plan.excess(stage) > 0:
            raise RequestError(
                f"writing a text of {tokens} tokens needs {stage.peak / 1e9:.2f} GB; {limit / 1e9:.2f} GB may be "
                "used; set fewer max_tokens, more memory or a rewriter_url",
                fields=("max_tokens", "memory"),
            )
        return plan

    def tile_mode(self, width: int, height: int, loaded: Iterable[str] = ()) -> str:
        """How to decode a picture of any size: "off" (whole) or "exact" (strips)."""
        width, height = (min(-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE, MAX_SIDE) for side in (width, height))
        return self.plan(Workload(width, height, 0), loaded).tile_mode

    def check(self, plan: MemoryPlan, loaded: Iterable[str] = ()) -> None:
        """Raise RequestError, with the figures and a size that fits, for a plan that does not fit."""
        if not plan.fits:
            fitting = self._largest(plan.work, list(loaded))
            fields = ("width", "height", "memory") if fitting else ("memory",)
            raise RequestError(self._refusal(plan, fitting), fields=fields)
        pinned = max(stage.pinned for stage in plan.stages.values())
        free = available_memory(torch.device("cpu")) if pinned else 0
        if pinned > free:
            raise RequestError(
                f"streaming needs {pinned / 1e9:.1f} GB page-locked on the host; {free / 1e9:.1f} GB are free; "
                "set a larger memory, so that more blocks stay on the GPU",
                fields=("memory",),
            )

    def _together(self, names: list[str], work: Workload, limit: int) -> dict[str, StagePlan]:
        """The stages of components that all stay loaded, or nothing if these do not fit."""
        if self.settings.residency == "stage":
            return {}
        must = self.settings.residency == "keep"
        weights = sum(self.sizes[name].resident for name in names)
        stages: dict[str, StagePlan] = {}
        for mode in self._tile_modes(work) if must else self._tile_modes(work)[:1]:
            stages = {name: self._stage(name, replace(work, tile_mode=mode), weights) for name in names}
            if all(stage.peak <= limit for stage in stages.values()):
                break
            if not must:
                return {}
        return stages

    def _alone(self, name: str, work: Workload, limit: int) -> StagePlan:
        """The least costly way of running one stage that fits, else the tightest."""
        for stage in self._ways(name, work, limit):
            if stage.peak <= limit:
                break
        return stage

    def _ways(self, name: str, work: Workload, limit: int) -> Iterable[StagePlan]:
        sizes = self.sizes[name]
        for mode in self._tile_modes(work) if name == VAE else ("",):
            yield (whole := self._stage(name, replace(work, tile_mode=mode), sizes.resident))
        if any(block.loaded for block in sizes.blocks):
            yield self._streamed(whole, sizes.blocks, limit)

    def _streamed(self, whole: StagePlan, blocks: tuple[BlockBytes, ...], limit: int) -> StagePlan:
        """As few blocks streamed as the limit allows, spread evenly, so that reading keeps pace with computing."""
        candidates = [i for i, block in enumerate(blocks) if block.loaded]
        stage, on_cpu = whole, whole.device == "cpu"
        for count in range(1, len(candidates) + 1):
            chosen = tuple(candidates[(2 * j + 1) * len(candidates) // (2 * count)] for j in range(count))
            size = sum(blocks[i].loaded for i in chosen)
            stage = replace(
                whole,
                weights=whole.weights - size,
                streamed=chosen,
                streamed_bytes=size,
                window=_window(on_cpu, [blocks[i] for i in chosen]),
                pinned=0 if on_cpu else size,
            )
            if stage.peak <= limit:
                break
        return stage

    def _stage(self, name: str, work: Workload, weights: int) -> StagePlan:
        sizes = self.sizes[name]
        # Writing reads all layers and the head; encoding does not.
        weights += sizes.unread if work.stored_tokens and name == TEXT_ENCODER else 0
        return StagePlan(
            name,
            ROWS[name].title,
            str(sizes.device),
            base=self._base[sizes.device],
            weights=weights,
            activations=sizes.work(work),
            blocks=len(sizes.blocks),
            tile_mode=work.tile_mode if name == VAE else "",
        )

    # ------------------------------------------------------------------ limits

    def _limit(self, device: torch.device, copies: int = 0) -> int:
        """Bytes that may be used on a device: what is free without our own `copies`, or what was allowed."""
        free = self._base[device] + available_memory(device) + copies
        return free if self.settings.memory is None else min(free, round(self.settings.memory * 1e9))

    def _keeping_limit(self, device: torch.device, limit: int) -> int:
        if device.type != "cpu" or self.settings.memory is not None or self.settings.residency == "keep":
            return limit
        return self._base[device] + int(KEEP_SHARE * (limit - self._base[device]))

    def _tile_modes(self, work: Workload) -> tuple[str, ...]:
        """The ways of decoding that the request leaves open, the preferred one first."""
        if work.tile_mode:
            return (work.tile_mode,)
        whole = replace(work, tile_mode="off", tile_size=0)
        decode = self.sizes[VAE].component.work_bytes(whole, self.sizes[VAE].dtype)
        return ("off", "exact") if decode <= WHOLE_BYTES else ("exact",)

    # ------------------------------------------------------------------ refusing

    def _refusal(self, plan: MemoryPlan, fitting: tuple[int, int] | None) -> str:
        work, stage, limit = plan.work, plan.tightest, plan.limits[plan.tightest.device]
        budget, needed = plan.budget, f"{-(-stage.peak // 10**8) / 10:.1f}"
        allowed = budget is not None and limit == round(budget * 1e9)
        if fitting:
            advice = f"choose at most {fitting[0]}×{fitting[1]}" + (f" or set memory {needed}" if allowed else "")
        elif allowed:
            advice = f"no size fits: set memory {needed} or more"
        else:
            advice = "no size fits: its weights alone are larger"
        if self.settings.residency == "keep":
            advice += ", or residency auto"
        return (
            f"{work.width}×{work.height} needs at least {stage.peak / 1e9:.2f} GB in the "
            f"{stage.title}'s stage; {limit / 1e9:.2f} GB are "
            + (f"allowed (memory {budget:g})" if allowed else f"free on {stage.device}")
            + f"; {advice}"
        )

    def _largest(self, work: Workload, loaded: list[str]) -> tuple[int, int] | None:
        """The largest size of the request's shape that fits."""
        short = min(work.width, work.height) // SIZE_MULTIPLE
        low, high = 0, short

        def sized(n: int) -> Workload:
            width, height = (
                max(1, side // SIZE_MULTIPLE * n // short) * SIZE_MULTIPLE for side in (work.width, work.height)
            )
            return replace(work, width=width, height=height)

        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.plan(sized(middle), loaded).fits else (low, middle - 1)
        return (sized(low).width, sized(low).height) if low else None


def _window(on_cpu: bool, blocks: list[BlockBytes]) -> int:
    """Bytes of the running block and the next one; a block that is cast is read ahead as it is stored."""
    loaded = max(block.loaded for block in blocks)
    if not on_cpu:
        return 2 * loaded
    if len(blocks) == 1:
        return loaded + blocks[0].stored
    return loaded + max(block.stored or block.loaded for block in blocks)


def _base_bytes(device: torch.device) -> int:
    """The memory in use before the model is loaded, and what the libraries will add."""
    held = process_memory() if device.type == "cpu" else 0
    return held + RUNTIME_BYTES.get(device.type, ELSEWHERE_BYTES)
