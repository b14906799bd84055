"""How far a render has come, and the file that keeps it: enough to go on from there to the same bits.

    kept = StateFile(path, job.to_dict())
    for event in pipe.run(job):
        kept.update(event)
    kept.remove()

and after a crash `state, plain = load_state(path)`, then `pipe.run(Job.from_dict(plain), state)`.

Shapes: latents (B, 16, h, w) fp32.
"""

import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage import flow
from zimage.errors import CheckpointError, OutputError, RequestError
from zimage.events import Event
from zimage.formats.atomic import beside, destination
from zimage.formats.json_text import json_object
from zimage.formats.lock import Lock
from zimage.formats.stored import TensorFile
from zimage.render.budget import guidance_of
from zimage.render.job import Job
from zimage.settings.plain import mistake

log = logging.getLogger("zimage")

FORMAT = "zimage-render"
VERSION = "3"
MAX_BYTES = 16 << 30
TENSORS = re.compile(r"(?:small|finished)\.(?:0|[1-9]\d{0,4})|latents|carried\.[a-z_]{1,20}(?:\.\d)?")
CARRIED = "carried."  # before the names of what is carried, in a file
PAST = "past"  # the name of what a solver wants to see again, and its number behind a dot


@dataclass
class RenderState:
    """A consumer of a render's events, and what `ZImage.run` takes to continue one.

    `small` are the finished latents of the first of two passes, `finished` those of the last pass so far, `latents`
    those in progress, after `step` steps, `carried` what these need besides, `decoded` the number of pictures that are
    done.
    """

    small: list[Tensor] = field(default_factory=list)
    finished: list[Tensor] = field(default_factory=list)
    latents: Tensor | None = None
    step: int = 0
    decoded: int = 0
    carried: dict[str, Tensor] = field(default_factory=dict)

    def snapshot(self) -> "RenderState":
        """A copy that later updates leave as it is."""
        return replace(self, small=list(self.small), finished=list(self.finished), carried=dict(self.carried))

    def update(self, event: Event) -> bool:
        """Take in an event; returns whether there is anything new to keep."""
        if event.stage == "enlarge" and self.finished and not self.small:
            self.small, self.finished = self.finished, []
        elif event.stage == "denoise" and event.latents is not None:
            done = event.step == event.total
            self.finished += event.latents.cpu().split(1) if done else []
            self.latents, self.step = (None, 0) if done else (event.latents.cpu(), event.step)
            self.carried = {} if done else {name: x.cpu() for name, x in (event.carried or {}).items()}
        elif event.image is not None:
            self.decoded += 1
        else:
            return False
        return True

    def check(self, job: Job, channels: int, factor: int) -> None:
        """Raise RequestError unless the events of this job can have led here; `factor`: pixels per latent."""
        if fault := _fault(self, job, channels, factor):
            raise RequestError(f"the state is that of another render ({fault}); pass one that this job's events made")


class StateFile:
    """Keeps the state of a render in a file; a consumer of its events. `record` tells what is rendered.

    A state holds the latents of all finished images. It is written when an image is finished or saved, and after a step
    unless that would take more than a tenth of the time. Of two renders the second cannot keep the same file. Raises
    OutputError where the file cannot be written at first, and RequestError where one exists; later a render goes on.
    """

    def __init__(self, path: Path, record: dict[str, Any], state: RenderState | None = None, lock: Lock | None = None):
        self.path, self.record, self.state = destination(path), record, state or RenderState()
        self._lock = lock or (hold(self.path) if state is not None and self.path.exists() else Lock(self.path))
        self._warned = False
        self._write()

    def update(self, event: Event) -> None:
        if self.state.update(event) and (event.step == event.total or time.monotonic() >= self._due):
            try:
                self._write()
            except OutputError as error:
                if not self._warned:
                    log.warning("%s; the render goes on, and its state stays behind", error)
                self._warned = True

    def remove(self) -> None:
        """Once all pictures are saved, nothing is left to continue."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s is not needed any more, and cannot be removed: %s", self.path, error.strerror)
        self._lock.close()

    def _write(self) -> None:
        from safetensors import SafetensorError

        begun = time.monotonic()
        try:
            save_state(self.path, self.state, self.record, self._lock)
        except FileExistsError:
            raise RequestError(f"state: {self.path} exists already: another render is using it") from None
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"state: {self.path} cannot be written: {reason}", fields=("save_state",)) from error
        now = time.monotonic()
        self._due = now + 9 * (now - begun)


def hold(path: Path) -> Lock:
    """The lock of a state that exists. Raises RequestError where another render holds it, or CheckpointError."""
    try:
        return Lock.of(destination(path))
    except BlockingIOError:
        text = f"state: another render is using {path}; wait until it ends"
        raise RequestError(text, fields=("save_state",)) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def save_state(path: Path, state: RenderState, record: dict[str, Any], lock: Lock | None = None) -> None:
    """Write the state of a render whole or not at all; `record` are plain values that tell what is rendered."""
    from safetensors.torch import save_file

    tensors = {f"small.{i}": x for i, x in enumerate(state.small)}
    tensors |= {f"finished.{i}": x for i, x in enumerate(state.finished)}
    if state.latents is not None:
        tensors["latents"] = state.latents
    tensors |= {CARRIED + name: x for name, x in state.carried.items()}
    plain = {"step": state.step, "decoded": state.decoded, **record}
    metadata = {"format": FORMAT, "version": VERSION, "state": json.dumps(plain)}
    with beside(path) as temporary:
        save_file({name: x.contiguous().clone() for name, x in tensors.items()}, temporary, metadata)
        if lock is None:
            temporary.replace(path)
        else:
            lock.publish(temporary)


def load_state(path: Path) -> tuple[RenderState, dict[str, Any]]:
    """What `save_state` wrote: the state and its record. Raises CheckpointError."""
    try:
        with TensorFile(path, MAX_BYTES) as file:
            record = _record(path, file.metadata)
            for name, slot in file.slots.items():
                if not TENSORS.fullmatch(name) or slot.dtype != "F32" or len(slot.shape) != 4 or 0 in slot.shape:
                    shape = "×".join(map(str, slot.shape))
                    raise CheckpointError(
                        f"its tensor {name[:80]!r} ({slot.dtype}, {shape}) is not one that a state holds"
                    )
            tensors = {name: file.read(name) for name in file.slots}
        step, decoded = record.pop("step"), record.pop("decoded")
        small, finished = _numbered(tensors, "small"), _numbered(tensors, "finished")
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read as the state of a render: {error}") from error
    return RenderState(small, finished, tensors.get("latents"), step, decoded, carried_of(tensors)), record


def carried_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a state's tensors is carried from step to step, by its own name."""
    return {name.removeprefix(CARRIED): x for name, x in tensors.items() if name.startswith(CARRIED)}


def _record(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The plain values in a state's metadata, `step` and `decoded` among them. Raises CheckpointError."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the state of a render; pass a file that --save-state wrote")
    if (version := metadata.get("version")) != VERSION:
        told = f"{path} is a state of format {version}, not {VERSION}"
        raise CheckpointError(f"{told}; finish the render with the version that wrote it, or start anew")
    record = json_object(str(path), metadata.get("state", ""))
    if fault := mistake(record, {"step": int, "decoded": int}, "it"):
        raise CheckpointError(fault)
    if min(record["step"], record["decoded"]) < 0:
        raise CheckpointError("its step and its number of pictures should be 0 or more")
    return record


def _numbered(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    found = sum(key.startswith(f"{name}.") for key in tensors)
    missing = [i for i in range(found) if f"{name}.{i}" not in tensors]
    if missing:
        raise CheckpointError(f"it lacks the tensor '{name}.{missing[0]}'")
    return [tensors[f"{name}.{i}"] for i in range(found)]


def _fault(state: RenderState, job: Job, channels: int, factor: int) -> str:
    """What of a state does not fit a job, in words; empty where all does."""
    first, last = (
        (channels, height // factor, width // factor) for width, height, _ in (job.passes[0], job.passes[-1])
    )
    is_last = job.request.hires is None or bool(state.small)
    remaining = job.count - len(state.finished)
    together = min(job.request.batch_size, remaining)
    begin = job.begins[-1 if is_last else 0]
    steps = len(job.sigmas) - 1 - begin
    now = last if is_last else first
    faults = {
        "latents of a first pass": bool(state.small) and (job.request.hires is None or len(state.small) != job.count),
        f"{len(state.finished)} finished images of {job.count}": remaining < 0
        or (remaining > 0 and len(state.finished) % job.request.batch_size > 0),
        f"{state.decoded} decoded images": state.decoded > (job.count if is_last and not remaining else 0),
        f"{state.step} steps of {steps}": (state.latents is None) != (state.step == 0) or state.step >= steps,
        "what another sampler or guidance method remembers": set(state.carried) != _remembered(job, begin, state.step),
        "latents of another shape": any(x.shape != (1, *first) for x in state.small)
        or any(x.shape != (1, *now) for x in state.finished)
        or any(x.shape != (together, *now) for x in (*_present(state.latents), *state.carried.values())),
        "latents that contain NaN or infinity": not all(
            bool(torch.isfinite(x).all())
            for x in (*state.small, *state.finished, *_present(state.latents), *state.carried.values())
        ),
    }
    return next((told for told, holds in faults.items() if holds), "")


def _remembered(job: Job, begin: int, steps: int) -> set[str]:
    """The names of what a job's sampler and guidance want to see again after so many steps from step `begin` on."""
    left = flow.SOLVERS[job.request.solver].leaves(steps)
    averaged = steps > 0 and guidance_of(job.request).remembers(torch.tensor(job.sigmas[begin]))
    return {f"{PAST}.{k}" for k in range(left)} | ({flow.AVERAGE} if averaged else set())


def _present(latents: Tensor | None) -> tuple[Tensor, ...]:
    return () if latents is None else (latents,)
