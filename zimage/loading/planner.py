"""Decides which components are in memory and when: before anything is loaded, from sizes alone.

On each device the planner takes the first of these that fits, the least costly first:

    keep     all components stay loaded between stages and requests
    part     on a GPU, those stay whose loading costs most: the text encoder goes first, since known captions do
             without it
    stage    each component is loaded for its stage and then released
    strips   … and the picture is decoded in exact strips
    stream   … and the weights of some blocks of the text encoder or the DiT, as few as possible, are in memory
             only while these run (`loading.streaming`)

The peak of a stage is the memory in use anyway, plus the weights in memory during it, plus what its work needs
(`loading.sizes`). On a CPU it is the whole process's resident memory, with pages of mapped files, as Linux counts it
(VmHWM); on a GPU what the process holds of the card: the driver's context, and PyTorch's memory as it rounds it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import combinations

import torch

from zimage.errors import RequestError
from zimage.loading.allocator import page_locked_bytes
from zimage.loading.devices import Place
from zimage.loading.files import ModelFiles
from zimage.loading.memory import available_memory, process_memory
from zimage.loading.plan import MemoryPlan, StagePlan, Workload
from zimage.loading.registry import DIT, ROWS, TEXT_ENCODER, VAE, VISION, VISION_TOWER
from zimage.loading.sizes import ComponentSizes, measure, window_bytes
from zimage.settings.declared import MAX_SIDE, SIZE_MULTIPLE
from zimage.settings.loading import LoadSettings

# By default weights stay loaded on a CPU only if they leave as much memory free: other programs live there too, and
# releasing mapped pages costs little, since the kernel keeps them cached. A GPU is used to the full.
KEEP_SHARE = 0.5
# Pictures are decoded whole up to this size and in strips beyond it, however much memory is free: strips equal the
# whole only up to rounding, and a request should give the same bits on every machine that has some 4 GB.
WHOLE_BYTES = 3e9
# What is in use besides weights and maps once a render runs. Measured on a CPU: code pages of libraries first used in a
# render, thread stacks, freed memory that is not returned. On a GPU: workspaces and modules of libraries, and holes
# between maps; on an H200 PyTorch held up to 0.6 GB more than weights in its units and maps (bench/NOTES.md).
RESERVE_BYTES = {"cpu": 40_000_000, "cuda": 800_000_000}
ELSEWHERE_BYTES = 300_000_000  # an unmeasured allowance
CONTEXT_BYTES = 500_000_000  # of a GPU, by the driver for each process; free memory is counted without it
NOTHING: Mapping[str, int] = {}


class Planner:
    """Knows the sizes of a model's components in their places, and the available memory."""

    def __init__(self, model: ModelFiles, places: Mapping[str, Place], settings: LoadSettings):
        self.settings, self._places = settings, places
        self.ranks = self.shares = 1
        devices = dict.fromkeys(place.device for place in places.values())
        self._held = {device: _held_bytes(device) for device in devices}
        self._base = {device: _base_bytes(device) for device in devices}
        # A component may compute in fp32 though its file is bf16; casting it whole would double its memory.
        self.sizes = {name: self._measured(model, name, place) for name, place in places.items()}
        self._vision = [name for name in self.sizes if name in (VISION, VISION_TOWER)]

    def _measured(self, model: ModelFiles, name: str, place: Place) -> ComponentSizes:
        component, (device, dtype) = model.components[name], place
        room = KEEP_SHARE * (self._limit(device) - self._base[device])
        whole = sum(component.weight_sizes(dtype).values())
        late = whole > max(room, 1.5 * component.stored_bytes())
        precision = self.settings.precision if ROWS[name].transformed else "bf16"
        return measure(component, device, dtype, late, precision, self.settings.cuda_graphs)

    def divide(self, ranks: int, halves: bool = False) -> None:
        """Plan for one of so many ranks that draw each picture together, each half of them an evaluation of its own."""
        self.ranks, self.shares = ranks, ranks // 2 if halves else ranks

    # ------------------------------------------------------------------ the decision

    def plan(self, work: Workload, loaded: Mapping[str, int] = NOTHING) -> MemoryPlan:
        """How to run a workload in the memory that is free once the `loaded` components are released.

        `loaded` says how many bytes each returns. Always returns a plan; `check` refuses one that does not fit.
        """
        work = replace(work, ranks=self.shares)
        stages: dict[str, StagePlan] = {}
        kept: set[str] = set()
        limits = {}
        for device in self._base:
            names = [n for n, sizes in self.sizes.items() if sizes.device == device and not ROWS[n].optional]
            limits[str(device)] = limit = self._limit(device, loaded)
            all_of_them = self._together(names, work, self._keeping_limit(device, limit))
            found = all_of_them or {name: self._accompanied(name, names, work, limit) for name in names}
            kept.update(names if all_of_them else self._staying(found))
            stages |= found
        seeing = {name: self._seeing(name, kept, work, limits) for name in self._vision if work.vision_patches}
        ordered = seeing | {name: stages[name] for name in self.sizes if name in stages}
        return MemoryPlan(work, ordered, frozenset(kept), limits, self.settings.memory)

    def _seeing(self, name: str, kept: set[str], work: Workload, limits: Mapping[str, int]) -> StagePlan:
        """The stage of a vision model, which is let go after it: beside what is kept on its device, else alone."""
        device = self.sizes[name].device
        limit, there = limits[str(device)], [n for n in self.sizes if n in kept and self.sizes[n].device == device]
        beside = self._stage(name, work, (name, *there))
        if there and beside.peak <= self._keeping_limit(device, limit):
            return beside
        return self._alone(name, work, limit)

    def plan_writing(self, tokens: int, loaded: Mapping[str, int] = NOTHING) -> MemoryPlan:
        """How the text encoder writes a text of `tokens` in total. Raises RequestError if it does not fit."""
        work = Workload(SIZE_MULTIPLE, SIZE_MULTIPLE, tokens, tile_mode="off", stored_tokens=tokens)
        plan = self.plan(work, loaded)
        stage = plan.stages[TEXT_ENCODER]
        limit = plan.limits[stage.device]
        if plan.excess(stage) > 0:  # also where all should be kept: then only while it writes are they not
            stage = self._accompanied(TEXT_ENCODER, [TEXT_ENCODER], work, limit)
            kept = frozenset(n for n in plan.kept if plan.stages[n].device != stage.device)
            plan = replace(plan, stages={**plan.stages, TEXT_ENCODER: stage}, kept=kept)
        instead = "fewer max_tokens, more memory or a rewriter_url"
        self.check_stage(plan, TEXT_ENCODER, f"writing a text of {tokens} tokens", instead, ("max_tokens", "memory"))
        return plan

    def check_stage(self, plan: MemoryPlan, name: str, what: str, instead: str, fields: tuple[str, ...]) -> None:
        """Raise RequestError, with the figures and what to set instead, where this stage alone does not fit."""
        stage = plan.stages[name]
        if plan.excess(stage) > 0:
            limit = plan.limits[stage.device]
            text = f"{what} needs {stage.peak / 1e9:.2f} GB; {limit / 1e9:.2f} GB may be used; set {instead}"
            raise RequestError(text, fields=fields)

    def tile_mode(self, width: int, height: int, loaded: Mapping[str, int] = NOTHING) -> str:
        """How to decode a picture of any size: "off" (whole) or "exact" (strips)."""
        width, height = (min(-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE, MAX_SIDE) for side in (width, height))
        return self.plan(Workload(width, height, 0), loaded).tile_mode

    def check(self, plan: MemoryPlan, loaded: Mapping[str, int] = NOTHING) -> None:
        """Raise RequestError, with the figures and a size that fits, for a plan that does not fit."""
        if not plan.fits:
            fitting = self._largest(plan.work, loaded)
            fields = ("width", "height", "memory") if fitting else ("memory",)
            text = self._refusal(plan, fitting, loaded)
            if plan.work.controls and self.plan(replace(plan.work, controls=0, control_streams=0), loaded).fits:
                text, fields = f"{text}; without control it fits", (*fields, "control")
            raise RequestError(text, fields=fields)
        streamed = [stage for name, stage in plan.stages.items() if stage.pinned and name not in loaded]
        most = max(streamed, key=lambda stage: stage.pinned, default=None)
        if most and most.pinned > (free := available_memory(torch.device("cpu"))):
            larger = _is_allowed(plan, most) and plan.limits[most.device] < self._room(most.device, loaded)
            advice = "set a larger memory, so that more blocks stay on the GPU" if larger else "use quantised weights"
            raise RequestError(
                f"streaming needs {most.pinned / 1e9:.1f} GB page-locked on the host; {free / 1e9:.1f} GB are free; "
                + advice,
                fields=("memory",),
            )

    def _together(self, names: list[str], work: Workload, limit: int) -> dict[str, StagePlan]:
        """The stages of components that all stay loaded, or nothing if these do not fit."""
        if self.settings.residency == "stage":
            return {}
        must = self.settings.residency == "keep"
        stages: dict[str, StagePlan] = {}
        for mode in self._tile_modes(work) if must else self._tile_modes(work)[:1]:
            stages = {name: self._stage(name, replace(work, tile_mode=mode), names) for name in names}
            if all(stage.peak <= limit for stage in stages.values()):
                break
            if not must:
                return {}
        return stages

    def _shares(self, name: str) -> bool:
        """Whether some components may stay where all do not fit; a CPU's are in the page cache anyway."""
        return self.sizes[name].device.type == "cuda" and self.settings.residency == "auto"

    def _accompanied(self, name: str, names: list[str], work: Workload, limit: int) -> StagePlan:
        """A stage beside as many other components on its device as fit, the text encoder only if all do."""
        others = [n for n in names if n != name] if self._shares(name) else []
        companies = [beside for count in range(1, len(others) + 1) for beside in combinations(others, count)]
        for beside in sorted(companies, key=self._worth, reverse=True):
            mode = self._tile_modes(work)[0]
            stage = self._stage(name, replace(work, tile_mode=mode), (name, *beside))
            if stage.peak <= limit:
                return stage
        return self._alone(name, work, limit)

    def _worth(self, names: tuple[str, ...]) -> tuple[int, bool]:
        """What it saves that these stay: bytes that every request needs, then those that only new captions need."""
        return sum(self.sizes[n].resident for n in names if n != TEXT_ENCODER), TEXT_ENCODER in names

    def _staying(self, stages: Mapping[str, StagePlan]) -> set[str]:
        """What stays loaded after its stage: what may be in memory during the others that every request has.

        The text encoder's is not among these, since a caption that is known needs none.
        """
        others = {n: [s for m, s in stages.items() if m not in (n, TEXT_ENCODER)] for n in stages if self._shares(n)}
        return {name for name, rest in others.items() if all(name in stage.beside for stage in rest)}

    def _alone(self, name: str, work: Workload, limit: int) -> StagePlan:
        """The least costly way of running one stage that fits, else the tightest."""
        for stage in self._ways(name, work, limit):
            if stage.peak <= limit:
                break
        return stage

    def _ways(self, name: str, work: Workload, limit: int) -> Iterable[StagePlan]:
        sizes = self.sizes[name]
        for mode in self._tile_modes(work) if name == VAE else ("",):
            yield (whole := self._stage(name, replace(work, tile_mode=mode), (name,)))
        if any(block.loaded for block in sizes.blocks):
            yield self._streamed(whole, sizes, work, limit)

    def _streamed(self, whole: StagePlan, sizes: ComponentSizes, work: Workload, limit: int) -> StagePlan:
        """As few blocks streamed as the limit allows, spread evenly, so that reading keeps pace with computing."""
        blocks, on_cpu = sizes.blocks, whole.device == "cpu"
        candidates = [i for i, block in enumerate(blocks) if block.loaded]
        stage = whole
        for count in range(1, len(candidates) + 1):
            chosen = tuple(candidates[(2 * j + 1) * len(candidates) // (2 * count)] for j in range(count))
            beside = work.loras * count // len(blocks) if sizes.merges else 0  # LoRAs that cannot be merged there
            stage = replace(
                whole,
                weights=whole.weights - sum(blocks[i].resident for i in chosen) + beside,
                streamed=chosen,
                streamed_bytes=sum(blocks[i].loaded for i in chosen),
                window=window_bytes(on_cpu, [blocks[i] for i in chosen]),
            )
            if stage.peak <= limit:
                break
        return stage if on_cpu else replace(stage, pinned=page_locked_bytes([blocks[i].loaded for i in stage.streamed]))

    def _stage(self, name: str, work: Workload, there: Iterable[str]) -> StagePlan:
        """A stage with the weights of all components that are `there`, its own among them."""
        sizes = self.sizes[name]
        weights = sum(self.sizes[n].resident + self.sizes[n].graphs(work) for n in there)
        needed = sizes.work(work)
        weights += work.controls if DIT in there else 0
        # Writing reads all layers and the head; encoding does not.
        weights += sizes.unread if work.stored_tokens and name == TEXT_ENCODER else 0
        if work.loras and DIT in there and not self.sizes[DIT].merges:
            weights += work.loras
        elif work.loras and name == DIT:
            needed = max(needed, sizes.merging)  # before the first step
        return StagePlan(
            name,
            ROWS[name].title,
            str(sizes.device),
            base=self._base[sizes.device],
            weights=weights,
            activations=needed,
            blocks=len(sizes.blocks),
            beside=tuple(n for n in there if n != name),
            tile_mode=work.tile_mode if name == VAE else "",
            passing=ROWS[name].optional,
        )

    # ------------------------------------------------------------------ limits

    def _limit(self, device: torch.device, loaded: Mapping[str, int] = NOTHING) -> int:
        """Bytes that may be used on a device: all that could be, or what was allowed."""
        room = self._room(device, loaded)
        return room if self.settings.memory is None else min(room, round(self.settings.memory * 1e9))

    def _room(self, device: torch.device | str, loaded: Mapping[str, int]) -> int:
        """Bytes that could be used on a device, once what is `loaded` there is released."""
        place = torch.device(device)
        copies = sum(loaded.get(name, 0) for name, at in self._places.items() if at.device == place)
        return self._held[place] + available_memory(place) + copies

    def _keeping_limit(self, device: torch.device, limit: int) -> int:
        if device.type != "cpu" or self.settings.memory is not None or self.settings.residency == "keep":
            return limit
        return self._base[device] + int(KEEP_SHARE * (limit - self._base[device]))

    def _tile_modes(self, work: Workload) -> tuple[str, ...]:
        """The ways of decoding that the request leaves open, the preferred one first."""
        if work.tile_mode:
            return (work.tile_mode,)
        if self.ranks > 1:
            return ("exact",)  # divided over the ranks; each would do all of the whole
        whole = replace(work, tile_mode="off", tile_size=0)
        decode = self.sizes[VAE].component.work_bytes(whole, self.sizes[VAE].dtype)
        return ("off", "exact") if decode <= WHOLE_BYTES else ("exact",)

    # ------------------------------------------------------------------ refusing

    def _refusal(self, plan: MemoryPlan, fitting: tuple[int, int] | None, loaded: Mapping[str, int]) -> str:
        work, stage, limit = plan.work, plan.tightest, plan.limits[plan.tightest.device]
        allowed = _is_allowed(plan, stage)
        held = 0 if allowed else self._held[torch.device(stage.device)]  # what is free does not include it
        return (
            f"{work.width}×{work.height} needs at least {(stage.peak - held) / 1e9:.2f} GB in the "
            f"{stage.title}'s stage; {(limit - held) / 1e9:.2f} GB are "
            + (f"allowed (memory {plan.budget:g})" if allowed else f"free on {stage.device}")
            + f"; {self._advice(plan, fitting, loaded)}"
        )

    def _advice(self, plan: MemoryPlan, fitting: tuple[int, int] | None, loaded: Mapping[str, int]) -> str:
        """What to do about a plan that does not fit: a larger budget only where the device has as much."""
        stage, auto = plan.tightest, self.settings.residency == "keep"
        room = self._room(stage.device, loaded) if _is_allowed(plan, stage) else 0
        if fitting:
            advice = f"choose at most {fitting[0]}×{fitting[1]}"
            advice += f" or set memory {_gb(stage.peak)}" if stage.peak <= room else ""
        elif stage.peak <= room:
            advice = f"no size fits: set memory {_gb(stage.peak)} or more"
        else:
            least = self.plan(replace(plan.work, width=SIZE_MULTIPLE, height=SIZE_MULTIPLE), loaded).tightest.peak
            if least > room:
                return "no size fits: its weights alone are larger" + ("; set residency auto" if auto else "")
            advice = f"no size fits: choose a smaller one and set memory {_gb(least)} or more"
        return advice + (", or residency auto" if auto else "")

    def _largest(self, work: Workload, loaded: Mapping[str, int]) -> tuple[int, int] | None:
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


def _is_allowed(plan: MemoryPlan, stage: StagePlan) -> bool:
    """Whether a stage's limit is the budget, and not what is free."""
    return plan.budget is not None and plan.limits[stage.device] == round(plan.budget * 1e9)


def _gb(size: int) -> str:
    """A budget in GB that is not below a size."""
    return f"{-(-size // 10**8) / 10:.1f}"


def _held_bytes(device: torch.device) -> int:
    """The memory that the process has before the model is loaded."""
    if device.type == "cuda":
        return CONTEXT_BYTES + torch.cuda.memory_allocated(device)
    return process_memory() if device.type == "cpu" else 0


def _base_bytes(device: torch.device) -> int:
    """The same, and what the libraries will add."""
    return _held_bytes(device) + RESERVE_BYTES.get(device.type, ELSEWHERE_BYTES)
