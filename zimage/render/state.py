"""How far a render has come, and the file that keeps it: enough to go on from there to the same bits.

    kept = StateFile(path, job.to_dict())
    for event in pipe.run(job):
        kept.update(event)
    kept.remove()

and after a crash `state, plain = load_state(path)`, then `pipe.run(Job.from_dict(plain), state)`.

Shapes: latents (B, 16, h, w) fp32.
"""

import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from zimage.errors import CheckpointError, RequestError
from zimage.events import Event
from zimage.formats.atomic import beside
from zimage.formats.json_text import json_object

FORMAT = "zimage-render"
VERSION = "2"


@dataclass
class RenderState:
    """A consumer of a render's events, and what `ZImage.run` takes to continue one.

    `small` are the finished latents of the first of two passes, `finished` those of the last pass so far, `latents`
    those in progress, after `step` evaluations, `decoded` the number of pictures that are done.
    """

    small: list[Tensor] = field(default_factory=list)
    finished: list[Tensor] = field(default_factory=list)
    latents: Tensor | None = None
    step: int = 0
    decoded: int = 0

    def snapshot(self) -> "RenderState":
        """A copy that later updates leave as it is."""
        return replace(self, small=list(self.small), finished=list(self.finished))

    def update(self, event: Event) -> bool:
        """Take in an event; returns whether there is anything new to keep."""
        if event.stage == "enlarge" and self.finished and not self.small:
            self.small, self.finished = self.finished, []
        elif event.stage == "denoise" and event.latents is not None:
            done = event.step == event.total
            self.finished += event.latents.cpu().split(1) if done else []
            self.latents, self.step = (None, 0) if done else (event.latents.cpu(), event.step)
        elif event.image is not None:
            self.decoded += 1
        else:
            return False
        return True


class StateFile:
    """Keeps the state of a render in a file; a consumer of its events. `record` tells what is rendered.

    A state holds the latents of all finished images. It is written when an image is finished or saved, and after a step
    unless that would take more than a tenth of the time. Raises RequestError where it cannot be written.
    """

    def __init__(self, path: Path, record: dict[str, Any], state: RenderState | None = None):
        self.path, self.record, self.state = path, record, state or RenderState()
        self._write()

    def update(self, event: Event) -> None:
        if self.state.update(event) and (event.step == event.total or time.monotonic() >= self._due):
            self._write()

    def remove(self) -> None:
        """Once all pictures are saved, nothing is left to continue."""
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        begun = time.monotonic()
        try:
            save_state(self.path, self.state, self.record)
        except Exception as error:  # safetensors raises its own for a full disk
            raise RequestError(f"state: {self.path} cannot be written: {error}", fields=("save_state",)) from error
        now = time.monotonic()
        self._due = now + 9 * (now - begun)


def save_state(path: Path, state: RenderState, record: dict[str, Any]) -> None:
    """Write the state of a render whole or not at all; `record` are plain values that tell what is rendered."""
    from safetensors.torch import save_file

    tensors = {f"small.{i}": x for i, x in enumerate(state.small)}
    tensors |= {f"finished.{i}": x for i, x in enumerate(state.finished)}
    if state.latents is not None:
        tensors["latents"] = state.latents
    plain = {"step": state.step, "decoded": state.decoded, **record}
    metadata = {"format": FORMAT, "version": VERSION, "state": json.dumps(plain)}
    with beside(path) as temporary:
        save_file({name: x.contiguous().clone() for name, x in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)


def load_state(path: Path) -> tuple[RenderState, dict[str, Any]]:
    """What `save_state` wrote: the state and its record. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not the state of a render; pass a file that --save-state wrote")
        if (version := metadata.get("version")) != VERSION:
            told = f"{path} is a state of format {version}, not {VERSION}"
            raise CheckpointError(f"{told}; finish the render with the version that wrote it, or start anew")
        record = json_object(str(path), metadata["state"])
        done = [record.pop("step"), record.pop("decoded")]
        if not all(type(number) is int and number >= 0 for number in done):
            raise ValueError("its step and its number of pictures should be whole numbers")
        small, finished = _numbered(tensors, "small"), _numbered(tensors, "finished")
        state = RenderState(small, finished, tensors.get("latents"), *done)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        told = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} cannot be read as the state of a render: {told}") from error
    return state, record


def _numbered(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    found = sum(key.startswith(f"{name}.") for key in tensors)
    return [tensors[f"{name}.{i}"] for i in range(found)]
