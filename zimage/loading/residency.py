"""The loaded components of a model: loaded for a stage, transformed in one visible list, released.

A plan says which components stay and which of their blocks are streamed, and every call passes its own plan: two
requests on one pipeline, interleaved or in threads, cannot see each other's. Work on a component is done inside `use`,
which holds its device for one piece of work (an evaluation, a text, a picture), so that weights move only between
pieces. If another request had a component released, it is loaded again with the LoRAs that its request began with.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from zimage import interrupts
from zimage.dit.control import ControlNet
from zimage.dit.replay import forget_graphs
from zimage.errors import RequestError, quoted
from zimage.formats.pages import Prefetch
from zimage.loading.controls import ControlFile, ControlFiles, weight_bytes
from zimage.loading.devices import Place
from zimage.loading.files import Component, ModelFiles
from zimage.loading.graphs import give_graphs
from zimage.loading.loras import Adapters, bring
from zimage.loading.memory import out_of_memory_in, release_cached
from zimage.loading.plan import MemoryPlan, StagePlan
from zimage.loading.registry import CONTROL, DIT, ROWS, TEXT_ENCODER
from zimage.loading.sizes import ComponentSizes
from zimage.loading.streaming import bytes_on, resident_weights, stop_streaming, stream, streamed_blocks
from zimage.nn.attention import choose_attention, head_size, use_attention
from zimage.nn.compile import compile_blocks
from zimage.nn.late import send_back
from zimage.nn.quant import check_precision
from zimage.settings.loading import LoadSettings

log = logging.getLogger("zimage")


@dataclass
class _Loaded:
    """A module in memory, the adapters it carries, the ControlNets beside it, and what reads its weights ahead."""

    module: nn.Module
    copied: int  # bytes that letting it go returns on a CPU
    adapters: Adapters = ()
    ahead: Prefetch | None = None
    controls: dict[ControlFile, ControlNet] = field(default_factory=dict)  # beside a DiT

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Its own, and those of the ControlNets."""
        return (self.module, *dict(self.controls).values())


class Residency:
    """Owns what is loaded; `attention` names the backend of the DiT, or of the text encoder where that is alone."""

    def __init__(
        self,
        model: ModelFiles,
        places: Mapping[str, Place],
        settings: LoadSettings,
        sizes: Mapping[str, ComponentSizes],
    ):
        self.model, self.places, self.settings, self._sizes = model, places, settings, sizes
        # A named backend is meant for the DiT; components on another device use what runs there.
        attention, main = settings.attention or "auto", DIT if DIT in places else TEXT_ENCODER
        wanted = {
            name: (
                attention if place == places[main] else "auto",
                *place,
                head,
                ROWS[name].transformed and settings.compile,
            )
            for name, place in places.items()
            if (head := head_size(model.skeleton(name)))
        }
        chosen = {how: choose_attention(*how) for how in dict.fromkeys((wanted[main], *wanted.values()))}  # each once
        self.attention, self._attend = chosen[wanted[main]][0], {name: chosen[how][1] for name, how in wanted.items()}
        if DIT in places:
            check_precision(settings.precision, *places[DIT])
        for name, place in places.items():
            _check_numbers(model.components[name], place.device)
        self._held: dict[str, _Loaded] = {}
        self._busy: Counter[str] = Counter()  # stages under way, by component
        self._devices = {place.device: threading.RLock() for place in places.values()}

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the components that are in memory now."""
        return tuple(self._held)

    @property
    def copies(self) -> dict[str, int]:
        """Bytes that each loaded component would return if it were let go: views of files return none."""
        return {name: self._returned(name, held) for name, held in dict(self._held).items()}

    @contextmanager
    def use(self, name: str, plan: MemoryPlan, adapters: Adapters = (), controls: ControlFiles = ()) -> Iterator[Any]:
        """A component for one piece of work, loaded by `plan`; its device is held during it.

        A DiT has these `adapters`, and the modules of these `controls` beside it: see `control`.

        Never yield from a generator inside: another request on the same pipeline would wait forever.
        """
        with self._devices[self.places[name].device]:
            module = self._brought(name, plan, adapters, controls).module
            try:
                yield module
            finally:
                if not self._busy[name]:
                    send_back(module)

    def hold(self, name: str) -> AbstractContextManager[object]:
        """The component's device for one piece of work on a module that the caller has in hand."""
        return self._devices[self.places[name].device]

    def control(self, file: ControlFile) -> ControlNet:
        """The module of a control file, inside `use` of the DiT with it."""
        return self._held[DIT].controls[file]

    def begin(self, name: str, plan: MemoryPlan, adapters: Adapters = (), controls: ControlFiles = ()) -> None:
        """Begin a stage: load its component and read it ahead."""
        with self._devices[self.places[name].device]:
            self._brought(name, plan, adapters, controls)
            self._read_ahead(name)
            self._busy[name] += 1

    def finish(self, name: str, plan: MemoryPlan, keep: bool = False) -> None:
        """End a stage: release its component unless the plan keeps it or another request's stage still needs it.

        `keep` leaves it until something else needs the room. An interrupt waits for the end of it: half of it done, the
        component would count as busy for ever.
        """
        with interrupts.held(), self._devices[self.places[name].device]:
            self._busy[name] -= 1
            if self._busy[name]:
                return
            if name not in plan.kept and not keep:
                self._let_go([name])
            elif held := self._held.get(name):
                send_back(held.module)
                if held.ahead:
                    held.ahead.stop()
                    held.ahead = None

    def release(self, *names: str) -> None:
        """Release loaded components (all, if none is named); they load again when they are next used."""
        for name in names or self.loaded:
            if name not in self.places:
                raise RequestError(f"component {quoted(name)} does not exist; use one of {', '.join(self.places)}")
            with self._devices[self.places[name].device]:
                self._let_go([name])

    def adapt_idle(self, adapters: Adapters) -> None:
        """Apply these adapters now to a DiT that is loaded but in no request's stage; an error loses nothing."""
        with self._devices[self.places[DIT].device]:
            if DIT in self._held and not self._busy[DIT]:
                self._adapted(self._held[DIT], adapters)

    # ------------------------------------------------------------------ with the device held

    def _brought(self, name: str, plan: MemoryPlan, adapters: Adapters, controls: ControlFiles) -> _Loaded:
        stage = plan.stages[name]
        self._let_go(self._in_the_way(name, plan))
        self._let_go_controls(name, plan, controls)
        if name in self._held and streamed_blocks(self._held[name].module) < len(stage.streamed):
            self._let_go([name])
        if name not in self._held:
            log.debug("loading %s", name)
            with out_of_memory_in(ROWS[name].title):
                self._held[name] = self._prepared(name, stage, adapters)
            if self._busy[name]:  # another request had it let go in the middle of a stage
                self._read_ahead(name)
        elif ROWS[name].transformed:
            self._adapted(self._held[name], adapters)
        if name == DIT:
            self._bring_controls(self._held[name], controls)
        return self._held[name]

    def _bring_controls(self, held: _Loaded, wanted: ControlFiles) -> None:
        for file in wanted:
            if file not in held.controls:
                held.controls[file] = self._prepared_control(file)

    def _read_ahead(self, name: str) -> None:
        held = self._held[name]
        if held.ahead is None:
            weights = list(resident_weights(held.module, ROWS[name].reads))
            for net in held.controls.values():
                weights += ROWS[CONTROL].reads(net)
            held.ahead = Prefetch(weights)

    def _returned(self, name: str, held: _Loaded) -> int:
        """Bytes that a loaded component would return, the ControlNets beside it among them."""
        device = self.places[name].device
        if device.type == "cuda":
            return sum(bytes_on(module, device) for module in held.modules)
        return held.copied + sum(file.sizes(self._sizes[name]).copied for file in dict(held.controls))

    def _in_the_way(self, name: str, plan: MemoryPlan) -> list[str]:
        """What must go before a stage runs: what its plan does not count, unless another stage is using that and
        there is room for it beside this one (a preview between two steps must not reload the DiT).
        """
        here, stage = self.places[name].device, plan.stages[name]
        others = [n for n in self.loaded if n not in (name, *stage.beside) and self.places[n].device == here]
        used = [n for n in others if self._busy[n]]
        if stage.peak + sum(map(self._in_use, used)) <= plan.limits[stage.device]:
            return [n for n in others if n not in used]
        return others

    def _in_use(self, name: str) -> int:
        return self._sizes[name].resident + self._beside(self._held[name])

    def _beside(self, held: _Loaded) -> int:
        """Bytes of the ControlNets beside a DiT."""
        return weight_bytes(held.controls, self._sizes[DIT]) if held.controls else 0

    def _let_go_controls(self, name: str, plan: MemoryPlan, wanted: ControlFiles) -> None:
        """Let go of the ControlNets that the DiT does not want; before another component works, of all not planned."""
        held, (device, _) = self._held.get(DIT), self.places[name]
        if held is None or self.places[DIT].device != device:
            return
        extra = [file for file in held.controls if file not in wanted]
        if name != DIT:
            uncounted = self._beside(held) > plan.work.controls and not self._busy[DIT]
            extra = list(held.controls) if uncounted else []
        for file in extra:
            del held.controls[file]
        if extra:
            release_cached(device)

    def _prepared_control(self, file: ControlFile) -> ControlNet:
        """Load a ControlNet and transform it as the DiT is."""
        log.debug("loading control %s", file.name)
        with out_of_memory_in(f"{ROWS[CONTROL].title} {file.name}"):
            net = file.load(self._sizes[DIT])
        if DIT in self._attend:
            use_attention(net, self._attend[DIT])
        if self.settings.compile:
            compile_blocks(net)
        return net

    def _prepared(self, name: str, stage: StagePlan, adapters: Adapters) -> _Loaded:
        """Load a module, whose matrices are quantised as they come, then transform it, in this order."""
        (device, dtype), row, component = self.places[name], ROWS[name], self.model.components[name]
        sizes = self._sizes[name]
        module = component.load(device, dtype, sizes.widen_late, stage.streamed, sizes.precision)
        if row.transformed:
            bring(module, component, (), adapters, dtype, device)
        if name in self._attend:
            use_attention(module, self._attend[name])
        if row.transformed and self.settings.compile:
            compile_blocks(module)
        if stage.streamed:
            stream(module, stage.streamed, device)
        if self.settings.cuda_graphs:
            give_graphs(name, module, device, self.attention, bool(stage.streamed))
        return _Loaded(module, sizes.copied, adapters if row.transformed else ())

    def _adapted(self, held: _Loaded, adapters: Adapters) -> None:
        """Exchange the DiT's adapters; if that fails halfway, the DiT is released and loads again."""
        device, dtype = self.places[DIT]
        if adapters != held.adapters:
            forget_graphs(held.module)
        try:
            bring(held.module, self.model.components[DIT], held.adapters, adapters, dtype, device)
        except BaseException:
            self._let_go([DIT])
            raise
        held.adapters = adapters

    def _let_go(self, names: Sequence[str]) -> None:
        for name in names:
            held = self._held.pop(name, None)
            if held is None:
                continue
            if held.ahead is not None:
                held.ahead.stop()
            stop_streaming(held.module)
            del held  # or its memory would not be free yet
            release_cached(self.places[name].device)


def _check_numbers(component: Component, device: torch.device) -> None:
    """Raise RequestError for a component whose packed weights the device has no numbers for."""
    kinds = {entry.dtype for entry in component.checkpoint.entries.values() if entry.packed}
    if device.type == "mps" and any("fp8" in kind or "nvfp4" in kind for kind in kinds):
        held = ", ".join(sorted(kinds))
        text = (
            f"{component.checkpoint.origin} holds {held}, and a Mac's GPU has no fp8; use other weights or --device cpu"
        )
        raise RequestError(text, fields=("device",))
