"""What both trainings share: log file, resumable checkpoints, a schedule in minutes of work, an average of weights."""

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Run:
    """Files and clock of one training. The clock counts minutes of work, also over restarts."""

    def __init__(self, work: Path, name: str, minutes: float):
        work.mkdir(parents=True, exist_ok=True)
        self.checkpoint = work / f"{name}.pt"
        self.log_file = work / f"{name}.log"
        self.minutes = minutes
        self.step = 0
        self._spent = 0.0  # seconds, up to the last tick
        self._last = time.perf_counter()

    def tick(self) -> None:
        """Count a step; a gap of over 20 s is a pause (SIGSTOP), not work."""
        now = time.perf_counter()
        self._spent += min(now - self._last, 20.0)
        self._last = now
        self.step += 1

    @property
    def spent_minutes(self) -> float:
        return self._spent / 60

    @property
    def progress(self) -> float:
        """0 at the start, 1 when the minutes are used up."""
        return min(self.spent_minutes / self.minutes, 1.0)

    def log(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} step {self.step} {self.spent_minutes:.1f} min  {text}"
        print(line, flush=True)
        with self.log_file.open("a") as file:
            file.write(line + "\n")

    def save(self, **states: object) -> None:
        save_atomically({"step": self.step, "spent": self._spent, **states}, self.checkpoint)

    def resume(self) -> dict | None:
        """The saved states, or None at a first start."""
        if not self.checkpoint.exists():
            return None
        states = torch.load(self.checkpoint, weights_only=True)
        self.step, self._spent = states["step"], states["spent"]
        self._last = time.perf_counter()
        self.log("resumed")
        return states


def compute_dtype() -> torch.dtype:
    """bf16 on CPUs that compute in it, two to three times quicker; the weights that are stepped stay fp32."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def save_atomically(obj: object, path: Path) -> None:
    """A reader sees the old file or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    torch.save(obj, partial)
    os.replace(partial, path)


class Average:
    """Exponential moving average of a model's weights; young averages forget faster."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        state = model.state_dict()
        torch._foreach_lerp_(list(self.weights.values()), [state[k] for k in self.weights], 1 - decay)


def warmup_then_linear(progress: float, step: int, warmup: int = 50, hold: float = 0.3) -> float:
    """Factor on the learning rate: short warm-up, flat until `hold` of the time, then linearly to almost 0."""
    decay = min(1.0, (1 - progress) / (1 - hold))
    return min(1.0, (step + 1) / warmup) * max(decay, 0.01)


def set_learning_rates(optimisers: list[torch.optim.Optimizer], rates: tuple[float, ...], factor: float) -> None:
    """Rates are given at each step, not kept in checkpoints: a resumed training may change them."""
    for optimiser, rate in zip(optimisers, rates, strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate * factor


def update(model: nn.Module, loss: Tensor, optimisers: list[torch.optim.Optimizer], clip: float = 1.0) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
