"""The figures that every side writes: seconds per stage since the process began, and the peak of resident memory."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Clock:
    """Counts from when the parent started this process (ZIMAGE_BENCH_STARTED), so that imports are included."""

    def __init__(self) -> None:
        self.begun = self.mark = float(os.environ["ZIMAGE_BENCH_STARTED"])
        self.figures: dict[str, float] = {}
        self.baseline = 0
        self.wait: Callable[[], object] = lambda: None  # for what the device still does

    def on(self, device: str) -> None:
        """Wait for a GPU at the end of everything that is timed, and count its memory from here on."""
        if device.startswith("cuda"):
            import torch

            self.wait = torch.cuda.synchronize
            torch.cuda.reset_peak_memory_stats()

    def lap(self, name: str) -> None:
        """Record the seconds since the last lap under `name`."""
        self.wait()
        now = time.monotonic()
        self.figures[name] = now - self.mark
        self.mark = now

    def warm(self, name: str, call: Callable[[], object]) -> None:
        """Record the quicker of two calls, after one that does not count."""
        seconds = []
        for _ in range(3):
            start = time.monotonic()
            call()
            self.wait()
            seconds.append(time.monotonic() - start)
        self.figures[name] = min(seconds[1:])

    def repeated(self, name: str, call: Callable[[], object], warmup: int, repeats: int) -> None:
        """Record the median of `repeats` calls, after `warmup` calls that do not count, and of the processor's time."""
        seconds, spent = [], []
        for _ in range(warmup + repeats):
            start, began = time.monotonic(), time.process_time()
            call()
            self.wait()
            seconds.append(time.monotonic() - start)
            spent.append(time.process_time() - began)
        self.figures |= {name: statistics.median(seconds[warmup:]), "cpu": statistics.median(spent[warmup:])}

    def imported(self) -> None:
        """Count memory from here on above what is held now."""
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident
        self.baseline = peak_bytes()

    def total(self) -> None:
        self.figures["total"] = time.monotonic() - self.begun
        self.peak()

    def peak(self) -> None:
        self.figures["peak_gb"] = (peak_bytes() - self.baseline) / 1e9
        if "torch" in sys.modules and (cuda := sys.modules["torch"].cuda).is_initialized():
            self.figures["gpu_peak_gb"] = cuda.max_memory_allocated() / 1e9

    def write(self, path: str) -> None:
        Path(path).write_text(json.dumps({name: round(value, 4) for name, value in self.figures.items()}))


def serve(scenarios: dict[str, Callable[..., None]]) -> None:
    """Run the scenario that the command line names and write its figures."""
    scenario, arguments, out = sys.argv[1:]
    clock = Clock()
    scenarios[scenario](clock, **json.loads(arguments))
    clock.write(out)


def prompt_of(tokens: int) -> list[int]:
    """Token ids that exist in every vocabulary."""
    return [(37 * i) % 200 for i in range(tokens)]


def needed_bytes(model: Any, tokens: int) -> int:
    """What writing needs at least: the weights, and the keys and values of `tokens` tokens in every layer."""
    config, weights = model.config, {id(weight): weight for weight in model.parameters()}
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return sum(weight.nbytes for weight in weights.values()) + tokens * per_token * model.model.norm.weight.itemsize


def peak_bytes() -> int:
    """The largest resident set so far, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")
