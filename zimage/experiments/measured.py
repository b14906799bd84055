"""What a cell takes: seconds by stage, components loaded, texts encoded, and the peak of memory."""

import contextlib
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zimage.events import Event, timed
from zimage.loading.memory import process_memory
from zimage.loading.plan import MemoryPlan
from zimage.render.conditioning import Encoder, Text

if TYPE_CHECKING:
    from zimage.pipeline import ZImage


class CountingEncoder:
    """Another encoder, whose encoded texts are counted; put it round a pipeline's `encoder`."""

    def __init__(self, inner: Encoder):
        self._inner, self.component, self.count = inner, inner.component, 0

    def known(self, text: Text) -> Tensor | None:
        return self._inner.known(text)

    def encode(self, text: Text, plan: MemoryPlan) -> Tensor:
        self.count += 1
        return self._inner.encode(text, plan)


class Cost:
    """What one cell has taken so far, over all the pieces of work that it is drawn in."""

    def __init__(self) -> None:
        self.timings: dict[str, float] = {}
        self.counts = Counter[str](loads=0, encodes=0)
        self.memory: dict[str, float] = {}

    def add(self, stage: str, seconds: float, what: str) -> None:
        """What was done for the cell before its events."""
        self.timings[stage] = seconds
        self.counts[what] += 1

    def follow(
        self, pipe: "ZImage", encoder: CountingEncoder, events: Generator[Event, None, object]
    ) -> Generator[Event, None, None]:
        """The same events, and what they took; the time that their consumer takes is not counted."""
        encoded = encoder.count
        reset_peaks(pipe)
        try:
            with contextlib.closing(timed(events, self.timings)) as measured:
                for event in measured:
                    begins = event.stage == "load" and event.step == 0
                    self.counts["loads"] += begins and event.detail not in pipe.loaded
                    yield event
        finally:
            self.counts["encodes"] += encoder.count - encoded
            for device, peak in peaks(pipe).items():
                self.memory[device] = max(self.memory.get(device, 0), peak)


def reset_peaks(pipe: "ZImage") -> None:
    """Count the peaks of memory from here on."""
    for device in _gpus(pipe):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # where the system does not let it, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peaks(pipe: "ZImage") -> dict[str, float]:
    """Bytes by device: what PyTorch held at most on each GPU, and the process, mapped files included, on the host."""
    found: dict[str, float] = {str(device): torch.cuda.max_memory_allocated(device) for device in _gpus(pipe)}
    return found | ({"cpu": peak} if (peak := _peak_of_process()) else {})


def _gpus(pipe: "ZImage") -> list[torch.device]:
    return [device for device in {place.device for place in pipe.places.values()} if device.type == "cuda"]


def _peak_of_process() -> int:
    """The largest resident set so far; what is resident now where the system does not tell, 0 where not even that."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    return peak or process_memory()
