"""Control files: opened once, known by their content, checked against the DiT, brought into memory beside it.

A control file holds a ControlNet, whose blocks run beside those of the DiT and share what these are given. So it is
held as the DiT is: on its device, in its dtype and precision, packed matrices as they lie in the file, plain ones
widened late where the DiT's are. Which files a job uses stands in its request; the loaded modules belong to
`residency`, which keeps exactly those of the request at work.
"""

import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zimage.dit.control import check_dtype
from zimage.errors import CheckpointError, ConfigError, RequestError
from zimage.formats.checkpoint import Checkpoint
from zimage.formats.lora import content_hash
from zimage.loading.files import Component
from zimage.loading.finding import component_folder
from zimage.loading.registry import CONTROL
from zimage.loading.sizes import ComponentSizes, measure
from zimage.settings.paths import user_path

FIELD = ("control",)


@dataclass(frozen=True)
class ControlFile:
    """A control file, opened and not loaded; files of one content are equal, whatever they are called."""

    name: str = dataclasses.field(compare=False)  # without its folder
    hash: str
    path: str = dataclasses.field(compare=False)
    component: Component = dataclasses.field(repr=False, compare=False)
    sizes: ComponentSizes = dataclasses.field(repr=False, compare=False)

    @property
    def config(self) -> Any:
        """Its architecture."""
        return self.component.skeleton.config

    def describe(self) -> dict[str, str]:
        """Plain values for a picture's metadata, which names no folders."""
        return {"name": self.name, "hash": self.hash}

    def load(self) -> nn.Module:
        """The module with its weights, in the DiT's form; one on a CPU reads its pages when they are used."""
        s = self.sizes
        return self.component.load(s.device, s.dtype, s.widen_late, (), s.precision)


ControlFiles = tuple[ControlFile, ...]


class Controls:
    """The control files of a pipeline. Several threads may use it; a file is opened again only when it has changed."""

    def __init__(self, dit: Component, sizes: ComponentSizes):
        """`sizes` are the DiT's, whose form the files take."""
        self._dit, self._sizes = dit, sizes
        self._lock = threading.Lock()
        self._opened: dict[str, tuple[str, ControlFile]] = {}  # by path, with the stamp of its files

    def open(self, path: str | os.PathLike[str], expected: str = "") -> ControlFile:
        """The control file at a path, a file or a component folder; `expected` is the hash that it must have.

        Raises RequestError for what is not a path or has changed, and CheckpointError for an unusable file.
        """
        if not isinstance(path, str | os.PathLike):
            text = f"control {path!r} is a {type(path).__name__}; it should be the path of a file"
            raise RequestError(text, fields=FIELD)
        check_dtype(self._sizes.dtype)
        named = user_path(path, FIELD[0])
        with self._lock:
            file = self._known(os.path.abspath(named)) or self._open(named)
        if expected and file.hash != expected:
            raise RequestError(f"control {named} is not the expected file: its content has changed", fields=FIELD)
        return file

    def _known(self, path: str) -> ControlFile | None:
        stamp, file = self._opened.get(path, ("", None))
        return file if file and _stamp(file.component.checkpoint) == stamp else None

    def _open(self, path: Path) -> ControlFile:
        component, s = _component(path), self._sizes
        self._check(path, component.skeleton.config)
        sizes = measure(component, s.device, s.dtype, s.widen_late, s.precision)
        full = os.path.abspath(path)
        stamp = _stamp(component.checkpoint)
        file = ControlFile(path.name, _content(component.checkpoint), full, component, sizes)
        self._opened[full] = stamp, file
        return file

    def _check(self, path: Path, config: Any) -> None:
        """Raise CheckpointError unless a ControlNet fits the DiT that its blocks run beside."""
        dit = self._dit.skeleton.config
        channels = dit.in_channels, 2 * dit.in_channels + 1
        if config.control_in_dim not in channels:
            known = f"{channels[0]} (the control latents) or {channels[1]} (with mask and masked picture)"
            raise _unusable(path, f"it reads {config.control_in_dim} channels; {known} can be computed")
        try:
            config.check_beside(dit)
        except ConfigError as error:
            raise _unusable(path, str(error)) from None


def weight_bytes(files: Iterable[ControlFile]) -> int:
    """Bytes of the weights of distinct files once loaded, and what the largest product widens at a time."""
    sizes = [file.sizes for file in distinct(files)]
    return sum(s.resident for s in sizes) + max((s.scratch for s in sizes), default=0)


def distinct(files: Iterable[ControlFile]) -> ControlFiles:
    """Each file once, whatever it is called: several pictures may go through the same weights."""
    return tuple(dict.fromkeys(files))


def _component(path: Path) -> Component:
    if not os.path.exists(path):
        raise _unusable(path, "it does not exist; pass a file, or a folder with its config.json")
    try:
        return Component.open(CONTROL, component_folder(path, CONTROL))
    except CheckpointError as error:
        raise CheckpointError(f"control {error}", fields=FIELD) from error


def _content(checkpoint: Checkpoint) -> str:
    """Twelve hex digits of all bytes: a single file's own hash, or that of the hashes of several."""
    return _joined([content_hash(file) for file in checkpoint.files])


def _joined(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12]


def _stamp(checkpoint: Checkpoint) -> str:
    """When the files were last changed; "" where one is gone."""
    return checkpoint.stamp() if all(file.is_file() for file in checkpoint.files) else ""


def _unusable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"control {path}: {reason}", fields=FIELD)
