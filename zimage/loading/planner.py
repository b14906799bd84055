"""What of a model is in memory and when: decided before anything is loaded, from sizes alone.

On each device the first of these is taken that fits, from the least costly on:

    keep     all parts stay loaded between stages and requests
    stage    each part is loaded in its turn and let go
    strips   … and the picture is decoded in exact strips
    stream   … and of the text encoder or the DiT some blocks' weights are in memory only while they run,
             as few as possible (`loading.streaming`)

The peak of a stage is what is there anyway, plus the weights in memory meanwhile, plus its activations, which each
model estimates for itself. On a CPU it is the whole process's resident memory, with pages of mapped files, as Linux
counts it (VmHWM); on a GPU what PyTorch allocates there.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import nn

from zimage.errors import RequestError
from zimage.loading.devices import Place
from zimage.loading.files import BlockBytes, Model
from zimage.loading.memory import available_memory, process_memory
from zimage.loading.plan import Schedule, Stage
from zimage.nn.quant import quantised_bytes
from zimage.settings.declared import BLEND_TILE, MAX_SIDE, SIZE_MULTIPLE, LoadSettings, Request

# By default a CPU's weights stay loaded only when they leave as much memory free: other programs live there too, and
# letting go of mapped pages costs little, since the kernel keeps them cached. A GPU is used to the full.
KEEP_SHARE = 0.5
# Decoded whole up to this, in strips beyond it, whatever memory there is: strips equal the whole to rounding only, and
# the same request should give the same bits on every machine that has some 4 GB.
WHOLE_BYTES = 3e9
# Measured: code pages of libraries first used in a render, thread stacks, freed memory that is not handed back.
RUNTIME_BYTES = {"cpu": 40_000_000}
ELSEWHERE_BYTES = (
    300_000_000  # on a GPU: workspaces of libraries, rounding of the allocator; an allowance, not measured
)
STREAMING_DEVICES = ("cpu", "cuda")


class MemoryPlan:
    """Knows a model's sizes, its places and the memory there is."""

    def __init__(self, model: Model, places: Mapping[str, Place], settings: LoadSettings):
        self.model, self.places, self.settings = model, places, settings
        self.precision = settings.precision
        devices = dict.fromkeys(place.device for place in places.values())
        self._base = {device: _base_bytes(device) for device in devices}
        # A CPU without bf16 arithmetic runs bf16 files in fp32; casting them whole would double their memory.
        self._known: dict[str, tuple[int, list[BlockBytes]]] = {}
        self._widened_late = {
            name
            for name, component in model.components.items()
            if places[name].device.type == "cpu"
            and component.weight_bytes(places[name].dtype)
            > max(self._keeping_room(places[name].device), 1.5 * component.checkpoint.stored_bytes())
        }

    def widens_late(self, name: str) -> bool:
        """Whether a component's weights stay as stored and are widened when used."""
        return name in self._widened_late

    def weight_bytes(self, name: str) -> int:
        """Bytes that the weights of a component take when loaded."""
        dtype = self.places[name].dtype
        if self._is_quantised(name):
            return quantised_bytes(self.model.skeleton("dit"), self.precision, dtype)
        return self.model.components[name].weight_bytes(dtype, self.widens_late(name))

    # ------------------------------------------------------------------ the decision

    def schedule(self, request: Request, tokens: int, loaded: Iterable[str] = ()) -> Schedule:
        """How to run a request whose longest text has `tokens`, on what is free when `loaded` parts were let go.

        Always gives a schedule; `check` refuses one that does not fit.
        """
        loaded = set(loaded)
        stages, kept, limits = {}, set(), {}
        for device in self._base:
            names = [name for name, place in self.places.items() if place.device == device]
            limits[device] = limit = self._limit(device, loaded)
            together = self._together(names, request, tokens, self._keeping_limit(device, limit))
            if together:
                kept.update(names)
            stages |= together or {name: self._alone(name, request, tokens, limit) for name in names}
        ordered = {name: stages[name] for name in self.places}
        return Schedule(ordered, frozenset(kept), limits, self.settings.memory)

    def writing(self, tokens: int, loaded: Iterable[str] = ()) -> Schedule:
        """How the text encoder writes a text of `tokens` in all. Raises RequestError where it does not fit."""
        name, request = "text_encoder", Request(width=SIZE_MULTIPLE, height=SIZE_MULTIPLE, tile_mode="off")
        (device, dtype), component = self.places[name], self.model.components[name]
        usual = self.schedule(request, tokens, loaded)
        # All layers and the head are read, which encoding does without.
        more = self.model.skeleton(name).writing_bytes(tokens, dtype)
        more += component.unread_bytes(dtype, self.widens_late(name)) if device.type == "cpu" else 0
        stage, kept, limit = usual.stages[name], usual.kept, usual.limits[device]
        if name not in kept or stage.peak + more > limit:
            stage = self._alone(name, request, tokens, limit - more)
            kept = frozenset(n for n in kept if self.places[n].device != device)
        stage = dataclasses.replace(stage, activations=stage.activations + more)
        if stage.peak > limit:
            raise RequestError(
                f"writing a text of {tokens} tokens needs {stage.peak / 1e9:.2f} GB; {limit / 1e9:.2f} GB may be "
                "taken; give fewer max_tokens or more memory, or a rewriter_url"
            )
        return dataclasses.replace(usual, stages={**usual.stages, name: stage}, kept=kept)

    def tile_mode(self, width: int, height: int, loaded: Iterable[str] = ()) -> str:
        """How to decode a picture of any size: "off" (whole) or "exact" (strips)."""
        sides = (min(-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE, MAX_SIDE) for side in (width, height))
        request = Request("", **dict(zip(("width", "height"), sides, strict=True)))
        return self.schedule(request, 0, loaded).tile_mode

    def check(self, request: Request, tokens: int, loaded: Iterable[str] = ()) -> Schedule:
        """The schedule of a resolved request. Raises RequestError, with the figures and what would fit."""
        schedule = self.schedule(request, tokens, loaded)
        if not schedule.fits:
            raise RequestError(self._refusal(schedule, request, tokens, set(loaded)))
        pinned = max(stage.pinned for stage in schedule.stages.values())
        free = available_memory(torch.device("cpu"))
        if pinned > free:
            raise RequestError(
                f"streaming needs {pinned / 1e9:.1f} GB page-locked on the host; {free / 1e9:.1f} GB are free; "
                "give a larger memory, so that more blocks stay on the GPU"
            )
        return schedule

    def _together(self, names: list[str], request: Request, tokens: int, limit: int) -> dict[str, Stage]:
        """The stages of parts that all stay loaded, or nothing where they do not fit."""
        if self.settings.residency == "stage":
            return {}
        must = self.settings.residency == "keep"
        weights = sum(map(self._resident_bytes, names))
        for mode in self._tile_modes(request) if must else self._tile_modes(request)[:1]:
            stages = {name: self._stage(name, request, tokens, mode, weights=weights) for name in names}
            if all(stage.peak <= limit for stage in stages.values()):
                break
            if not must:
                return {}
        return stages

    def _alone(self, name: str, request: Request, tokens: int, limit: int) -> Stage:
        """The least costly way of running one stage that fits, else the tightest."""
        for stage in self._ways(name, request, tokens, limit):
            if stage.peak <= limit:
                break
        return stage

    def _ways(self, name: str, request: Request, tokens: int, limit: int) -> Iterable[Stage]:
        for mode in self._tile_modes(request) if name == "vae" else (None,):
            yield (whole := self._stage(name, request, tokens, mode, weights=self._resident_bytes(name)))
        blocks = self._blocks(name)
        if any(block.loaded for block in blocks):
            yield self._streamed(whole, blocks, limit)

    def _streamed(self, whole: Stage, blocks: list[BlockBytes], limit: int) -> Stage:
        """As few blocks streamed as the limit allows, spread evenly, so that reading keeps pace with computing."""
        candidates = [i for i, block in enumerate(blocks) if block.loaded]
        for count in range(1, len(candidates) + 1):
            chosen = tuple(candidates[(2 * j + 1) * len(candidates) // (2 * count)] for j in range(count))
            size = sum(blocks[i].loaded for i in chosen)
            stage = dataclasses.replace(
                whole,
                weights=whole.weights - size,
                streamed=chosen,
                streamed_bytes=size,
                window=self._window(whole.device, [blocks[i] for i in chosen]),
                pinned=size if whole.device.type != "cpu" else 0,
            )
            if stage.peak <= limit:
                break
        return stage

    def _window(self, device: torch.device, blocks: list[BlockBytes]) -> int:
        """The block that runs and the next one; a block that is cast is read ahead as it is stored."""
        loaded = max(block.loaded for block in blocks)
        if device.type != "cpu":
            return 2 * loaded
        if len(blocks) == 1:
            return loaded + blocks[0].source
        return loaded + max(block.source or block.loaded for block in blocks)

    def _stage(self, name: str, request: Request, tokens: int, mode: str | None, weights: int) -> Stage:
        device = self.places[name].device
        return Stage(
            name,
            device,
            base=self._base[device],
            weights=weights,
            activations=self._activations(name, request, tokens, mode),
            blocks=len(self._blocks(name)),
            tile_mode=mode if name == "vae" else None,
        )

    # ------------------------------------------------------------------ limits

    def _limit(self, device: torch.device, loaded: set[str]) -> int:
        """Bytes that may be taken on a device: what is free if our own parts were let go, or what was allowed."""
        copies = sum(self._copied_bytes(name) for name in loaded if self.places[name].device == device)
        free = self._base[device] + available_memory(device) + copies
        return free if self.settings.memory is None else min(free, round(self.settings.memory * 1e9))

    def _keeping_limit(self, device: torch.device, limit: int) -> int:
        if device.type != "cpu" or self.settings.memory is not None or self.settings.residency == "keep":
            return limit
        return self._base[device] + int(KEEP_SHARE * (limit - self._base[device]))

    def _keeping_room(self, device: torch.device) -> float:
        limit = self._limit(device, set())
        return KEEP_SHARE * (limit - self._base[device])

    def _refusal(self, schedule: Schedule, request: Request, tokens: int, loaded: set[str]) -> str:
        stage, size = schedule.tightest, f"{request.width}×{request.height}"
        limit = schedule.limits[stage.device]
        allowed = self.settings.memory is not None and limit == round(self.settings.memory * 1e9)
        fitting = self._largest(request, tokens, loaded)
        if fitting:
            advice = f"choose at most {fitting[0]}×{fitting[1]}" + (
                f" or give memory {-(-stage.peak // 10**8) / 10:.1f}" if allowed else ""
            )
        elif allowed:
            advice = f"no size fits: give memory {-(-stage.peak // 10**8) / 10:.1f} or more"
        else:
            advice = "no size fits: its weights alone are larger"
        if self.settings.residency == "keep":
            advice += ", or residency auto"
        return (
            f"{size} needs at least {stage.peak / 1e9:.2f} GB in the {stage.name} stage; {limit / 1e9:.2f} GB are "
            + (f"allowed (memory {self.settings.memory:g})" if allowed else f"free on {stage.device}")
            + f"; {advice}"
        )

    def _largest(self, request: Request, tokens: int, loaded: set[str]) -> tuple[int, int] | None:
        """The largest size of the request's shape that fits."""
        low, high = 0, min(request.width, request.height) // SIZE_MULTIPLE
        short = high

        def size(n: int) -> tuple[int, int]:
            sides = (request.width, request.height)
            return tuple(max(1, side // SIZE_MULTIPLE * n // short) * SIZE_MULTIPLE for side in sides)

        while low < high:
            middle = (low + high + 1) // 2
            width, height = size(middle)
            smaller = dataclasses.replace(request, width=width, height=height)
            fits = self.schedule(smaller, tokens, loaded).fits
            low, high = (middle, high) if fits else (low, middle - 1)
        return size(low) if low else None

    # ------------------------------------------------------------------ sizes

    def _resident_bytes(self, name: str) -> int:
        """Of a loaded part's weights, what a render brings into memory."""
        on_cpu = self.places[name].device.type == "cpu"
        if self._is_quantised(name):  # made of the loaded weights: pages of the file, or copies that are there first
            dtype = self.places[name].dtype
            component = self.model.components[name]
            viewed = on_cpu and component.is_viewed(dtype)
            return self.weight_bytes(name) if viewed else component.weight_bytes(dtype)
        return self._facts(name)[0] if on_cpu else self.weight_bytes(name)

    def _copied_bytes(self, name: str) -> int:
        """Of a loaded part's weights, what is not a view of a file, whose pages count as free."""
        place, component = self.places[name], self.model.components[name]
        if place.device.type == "cpu" and component.is_viewed(place.dtype, self.widens_late(name)):
            return 0
        return self.weight_bytes(name)

    def _blocks(self, name: str) -> list[BlockBytes]:
        device = self.places[name].device.type
        if self._is_quantised(name) or device not in STREAMING_DEVICES:
            return []
        if device != "cpu" and self.model.components[name].is_packed:
            return []  # packed matrices stay where they were put
        return self._facts(name)[1]

    def _facts(self, name: str) -> tuple[int, list[BlockBytes]]:
        """Bytes that a render reads of a component on a CPU, and its blocks; from 500 tensors, so only once."""
        if name not in self._known:
            component, dtype, late = self.model.components[name], self.places[name].dtype, self.widens_late(name)
            resident = component.weight_bytes(dtype, late) - component.unread_bytes(dtype, late)
            self._known[name] = (resident, component.block_bytes(dtype, late))
        return self._known[name]

    def _is_quantised(self, name: str) -> bool:
        return name == "dit" and self.precision != "bf16"

    def _activations(self, name: str, request: Request, tokens: int, mode: str | None) -> int:
        model, dtype = self.model.skeleton(name), self.places[name].dtype
        if name == "vae":
            return self._decode_bytes(request.width, request.height, mode, request.tile_size)
        packed = _packed_bytes(model, self.places[name])
        if name == "text_encoder":
            return model.activation_bytes(tokens, dtype) + packed
        image_tokens = request.width * request.height // SIZE_MULTIPLE**2
        together = min(request.batch_size, request.count)
        return model.activation_bytes(image_tokens, dtype, tokens) * together + packed

    def _tile_modes(self, request: Request) -> tuple[str, ...]:
        """The ways of decoding that the request leaves open, the preferred one first."""
        if request.tile_mode:
            return (request.tile_mode,)
        whole = self._decode_bytes(request.width, request.height, "off", None)
        return ("off", "exact") if whole <= WHOLE_BYTES else ("exact",)

    def _decode_bytes(self, width: int, height: int, mode: str, tile_size: int | None) -> int:
        vae, dtype = self.model.skeleton("vae"), self.places["vae"].dtype

        def whole(pixels: int) -> int:
            return vae.activation_bytes(pixels, dtype)

        if mode == "exact":
            strip = whole(width * tile_size) if tile_size else 0
            return min(vae.tiled_bytes(width * height, dtype) + strip, whole(width * height))
        if mode == "blend":
            return whole(min(width * height, (tile_size or BLEND_TILE) ** 2)) + 16 * width * height  # and the canvas
        return whole(width * height)


def _base_bytes(device: torch.device) -> int:
    """What is in memory before anything of the model is, and what the libraries will add."""
    held = process_memory() if device.type == "cpu" else 0
    return held + RUNTIME_BYTES.get(device.type, ELSEWHERE_BYTES)


@cache
def _largest_matrix(model: nn.Module) -> int:
    return max((m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)), default=0)


def _packed_bytes(model: nn.Module, place: Place) -> int:
    """Half-precision products on a CPU repack a matrix each time."""
    return _largest_matrix(model) * 2 if place == (torch.device("cpu"), torch.bfloat16) else 0
