"""Control files: opened once, known by their content, checked against a DiT, brought into memory beside it.

A control file holds a ControlNet, whose blocks run beside those of the DiT and share what these are given. So it is
held as the DiT is: on its device, in its dtype and precision, packed matrices as they lie in the file, plain ones
widened late where the DiT's are. Which files a job uses stands in its request; the loaded modules belong to
`residency`, which keeps exactly those of the request at work.
"""

import hashlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zimage.dit.control import ControlNet, ControlNetConfig, check_dtype
from zimage.errors import CheckpointError, ConfigError, RequestError
from zimage.formats.lora import content_hash
from zimage.loading.files import Component
from zimage.loading.finding import component_folder
from zimage.loading.plan import Workload
from zimage.loading.registry import CONTROL
from zimage.loading.sizes import ComponentSizes, measure
from zimage.settings.paths import user_path

FIELD = ("control",)
WANTED = "pass a ControlNet for Z-Image: a file, or a folder with its config.json"


@dataclass(frozen=True)
class ControlFile:
    """A control file, opened and not loaded; files of one content are equal, whatever they are called."""

    name: str = field(compare=False)  # without its folder
    hash: str
    path: str = field(compare=False)
    component: Component = field(repr=False, compare=False)

    @classmethod
    def of(cls, given: "str | os.PathLike[str] | ControlFile") -> "ControlFile":
        """From a file or a component folder, opened again only when it has changed.

        Raises RequestError if `given` is not a path, and CheckpointError if the file cannot be used.
        """
        if isinstance(given, ControlFile):
            return given
        if not isinstance(given, str | os.PathLike):
            text = f"control: the file {given!r} is a {type(given).__name__}; it should be the path of one"
            raise RequestError(text, fields=FIELD)
        path = Path(os.path.abspath(user_path(given, FIELD[0])))
        with _lock:
            stamp, file = _opened.get(str(path), ("", None))
            if file is None or _stamp(file.component) != stamp:
                component = _component(path)
                file = cls(path.name, _content(component), str(path), component)
                _opened[str(path)] = _stamp(component), file
        return file

    @property
    def config(self) -> ControlNetConfig:
        """Its architecture."""
        found = self.component.skeleton.config
        assert isinstance(found, ControlNetConfig)
        return found

    @property
    def reads_mask(self) -> bool:
        """Whether it also reads a mask and the masked picture: all but the first version's do."""
        return bool(self.config.control_in_dim % 2)

    def describe(self) -> dict[str, str]:
        """Plain values for a picture's metadata, which names no folders."""
        return {"name": self.name, "hash": self.hash}

    def sizes(self, dit: ComponentSizes) -> ComponentSizes:
        """Its bytes in the form in which the DiT is held."""
        return measure(self.component, dit.device, dit.dtype, dit.widen_late, dit.precision)

    def load(self, dit: ComponentSizes) -> ControlNet:
        """The module with its weights in that form; on a CPU their pages are read when they are used."""
        net = self.component.load(dit.device, dit.dtype, dit.widen_late, (), dit.precision)
        assert isinstance(net, ControlNet)
        return net

    def check(self, dit: ComponentSizes) -> None:
        """Raise CheckpointError unless it fits the DiT that its blocks run beside, RequestError for a dtype."""
        check_dtype(dit.dtype)
        beside: Any = dit.component.skeleton
        channels = beside.config.in_channels, 2 * beside.config.in_channels + 1
        if self.config.control_in_dim not in channels:
            known = f"{channels[0]} (the control latents) or {channels[1]} (with mask and masked picture)"
            raise _unusable(self.path, f"it reads {self.config.control_in_dim} channels; {known} can be computed")
        try:
            self.config.check_beside(beside.config)
        except ConfigError as error:
            raise _unusable(self.path, str(error)) from None


ControlFiles = tuple[ControlFile, ...]
_opened: dict[str, tuple[str, ControlFile]] = {}  # by path, with the stamp of its files
_lock = threading.Lock()


def with_controls(work: Workload, files: ControlFiles, dit: ComponentSizes) -> Workload:
    """The work with these files beside the DiT, one for each control. Raises as `check` does."""
    for file in files:
        file.check(dit)
    return replace(work, controls=weight_bytes(files, dit), control_streams=len(files))


def weight_bytes(files: Iterable[ControlFile], dit: ComponentSizes) -> int:
    """Bytes of the weights of distinct files once loaded, and what the largest product widens at a time."""
    sizes = [file.sizes(dit) for file in dict.fromkeys(files)]
    return sum(s.resident for s in sizes) + max((s.scratch for s in sizes), default=0)


def _component(path: Path) -> Component:
    if not os.path.exists(path):
        raise _unusable(path, f"it does not exist; {WANTED}")
    folder = component_folder(path, CONTROL)
    if not folder.exists():
        raise _unusable(path, f"it holds no ControlNet; {WANTED}")
    try:
        return Component.open(CONTROL, folder)
    except ConfigError as error:
        raise ConfigError(f"control: {error}; {WANTED}", fields=FIELD) from error
    except CheckpointError as error:
        raise CheckpointError(f"control: {error}", fields=FIELD) from error


def _content(component: Component) -> str:
    """Twelve hex digits of all bytes of its files, and of its architecture: a folder states that beside them."""
    hashes = [content_hash(file) for file in component.checkpoint.files]
    return hashlib.sha256(" ".join([*hashes, repr(component.skeleton.config)]).encode()).hexdigest()[:12]


def _stamp(component: Component) -> str:
    """When its files were last changed, those that describe it among them; "" where one is gone."""
    files = [*component.checkpoint.files, *component.checkpoint.origin.glob("*.json")]
    return " ".join(str(file.stat().st_mtime_ns) for file in files) if all(map(Path.is_file, files)) else ""


def _unusable(path: str | Path, reason: str) -> CheckpointError:
    return CheckpointError(f"control {path}: {reason}", fields=FIELD)
