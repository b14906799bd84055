"""The loaded parts of a pipeline: brought in when a stage needs them, transformed in one visible list, let go after it.

For several threads at once: one lock guards what is loaded. Which parts stay, and which of their blocks are streamed,
is what the schedule of the latest request says.
"""

import logging
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from zimage.events import Event
from zimage.formats.pages import Prefetch, forget_pages
from zimage.loading.devices import Place
from zimage.loading.files import Model
from zimage.loading.loras import Loras
from zimage.loading.memory import out_of_memory_in, release_cached
from zimage.loading.plan import Schedule
from zimage.loading.planner import MemoryPlan
from zimage.loading.streaming import resident_weights, stop_streaming, stream, streamed_blocks
from zimage.nn.attention import choose_attention, use_attention
from zimage.nn.compile import compile_blocks
from zimage.nn.quant import check_precision, quantise
from zimage.settings.declared import LoadSettings, split_lora

log = logging.getLogger("zimage")


class Parts:
    """`loaded` holds the modules that are in memory; `attention` names the backend of the DiT.

    `usual` gives the schedule that holds for stages called one by one, before any request.
    """

    def __init__(
        self,
        model: Model,
        places: Mapping[str, Place],
        settings: LoadSettings,
        plan: MemoryPlan,
        attention: str,
        usual: Callable[[], Schedule],
    ):
        self.model, self.places, self.settings, self.plan = model, places, settings, plan
        # A backend that is named is meant for the DiT; parts on another device take what runs there.
        chosen = {n: choose_attention(attention if p == places["dit"] else "auto", *p) for n, p in places.items()}
        self.attention, self._attend = chosen["dit"][0], {name: attend for name, (_, attend) in chosen.items()}
        check_precision(settings.precision, places["dit"].device)
        self.loaded: dict[str, nn.Module] = {}
        self.schedule: Schedule | None = None  # of the latest request
        self._usual, self._lock = usual, threading.Lock()
        mergeable = settings.precision == "bf16" and not plan.widens_late("dit")
        self.lora = Loras(model.components["dit"], *places["dit"], self.loaded, self._lock, mergeable)
        for text in settings.lora or []:
            self.lora.add(*split_lora(text))

    def get(self, name: str, schedule: Schedule | None = None) -> Any:
        """The module called `name`, loaded if it is not; by a schedule of its own where one is given."""
        with self._lock:
            if self.schedule is None:
                self.schedule = self._usual()
            schedule = schedule or self.schedule
            needed = schedule.stages[name].streamed
            if name not in self.loaded or streamed_blocks(self.loaded[name]) < len(needed):
                log.debug("loading %s", name)
                if name not in schedule.kept:  # also when stages are called one by one
                    here = self.places[name].device
                    self._let_go([n for n in self.loaded if self.places[n].device == here])
                with out_of_memory_in(name):
                    self.loaded[name] = self._prepared(name, needed)
            return self.loaded[name]

    def release(self, *names: str) -> None:
        """Let go of loaded parts (all, when none is named); they load again when next used."""
        with self._lock:
            self._let_go(names or tuple(self.loaded))

    def stage(self, name: str, events: Iterator[Event]) -> Generator[Event, None, Any]:
        """Run one stage's events with its part loaded and read ahead; afterwards let it go unless it is kept."""
        yield Event("load", 0, 1, detail=name)
        kept, prefetch = name in self.schedule.kept, Prefetch(resident_weights(self.get(name)))
        try:
            yield Event("load", 1, 1, detail=name)
            with out_of_memory_in(name):
                return (yield from events)
        finally:
            prefetch.stop()
            if not kept:
                self.release(name)

    def _let_go(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.loaded:
                stop_streaming(self.loaded.pop(name))
        for device in dict.fromkeys(self.places[name].device for name in names):
            release_cached(device)

    def _prepared(self, name: str, streamed: Sequence[int]) -> nn.Module:
        """Load a plain module, then transform it, in this order."""
        device, dtype = self.places[name]
        module = self.model.components[name].load(device, dtype, self.plan.widens_late(name), streamed)
        if name == "dit" and self.settings.precision != "bf16":
            quantise(module, self.settings.precision, forget_pages)
        if name == "dit":
            self.lora.apply(module)
        use_attention(module, self._attend[name])
        if name == "dit" and self.settings.compile:
            compile_blocks(module)
        if streamed:
            stream(module, streamed, device)
        return module
