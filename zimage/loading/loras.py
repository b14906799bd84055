"""The LoRA adapters of a pipeline: which files at which scale, whether its DiT is loaded or not.

Adapters add up. A layer is always computed from the checkpoint's weight and all adapters in use, never from its present
weight, so that a removed adapter leaves nothing behind. Requests take the adapters that are listed here when they are
prepared; the loaded DiT belongs to `residency`, which applies those of the request at work.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from zimage.errors import RequestError
from zimage.formats.lora import ENDING, LoraFile, content_hash, lora_file, read_lora
from zimage.formats.pages import Prefetch, forget_pages
from zimage.formats.stored import Maps
from zimage.loading.files import Component
from zimage.loading.registry import DIT
from zimage.nn.adapters import adapt, adapt_vector, is_plain, linear_shapes, vector_sizes
from zimage.nn.branches import LEAST_RANK
from zimage.nn.deltas import Decomposed, Delta, LowRank
from zimage.settings.loading import check_lora_scale
from zimage.settings.paths import user_path


class Handle:
    """Stands for one adapter that was added; a file that is added twice has two."""


@dataclass(frozen=True)
class LoraUse:
    """Which adapter at which scale, as plain values: its deltas are multiplied by `scale`."""

    name: str  # of the file, without its folder
    scale: float
    hash: str
    path: str

    def describe(self) -> dict[str, object]:
        """Plain values for a picture's metadata, which names no folders."""
        return {"name": self.name, "scale": self.scale, "hash": self.hash}


@dataclass(frozen=True)
class Adapter(LoraUse):
    """One adapter in use, read from its file."""

    file: LoraFile = dataclasses.field(repr=False, compare=False)
    handle: Handle = dataclasses.field(default_factory=Handle, repr=False, compare=False)


Adapters = tuple[Adapter, ...]


class Owner(Protocol):
    """The owner of the loaded DiT."""

    def adapt_idle(self, adapters: Adapters) -> None: ...
    def hold(self, name: str) -> AbstractContextManager[object]: ...


class Loras:
    """`pipe.lora`. Several threads may use it; a render keeps the adapters with which it was prepared.

    `skip` names the parts of the model whose adapters are left out of every file.
    """

    def __init__(self, dit: Component, owner: Owner, skip: Collection[str] = ()):
        self._dit, self._owner, self._skip = dit, owner, skip
        self._lock = threading.Lock()
        self._adapters: dict[Handle, Adapter] = {}

    def add(self, path: str | os.PathLike, scale: float | None = None) -> Handle:
        """Add the adapter of a safetensors file, or of a folder with one; returns its handle for `set` and `remove`.

        Without a scale it is 1, or what a published adapter asks for (`formats.lora_known`).
        Raises RequestError for an unusable scale and CheckpointError for an unusable file.
        """
        adapter = self.adapter(path, scale)
        with self._changing():
            self._become({**self._adapters, adapter.handle: adapter})
        return adapter.handle

    def adapter(self, path: str | os.PathLike, scale: float | None = None, expected: str = "") -> Adapter:
        """The adapter of a file, checked but not added; `expected` is the hash that its content must have."""
        if not isinstance(path, str | os.PathLike):
            text = f"lora {path!r} is a {type(path).__name__}; it should be the path of a file"
            raise RequestError(text, fields=("lora",))
        if scale is not None:
            check_lora_scale(scale)
        named, skeleton = lora_file(user_path(path, "lora")), self._dit.skeleton
        file = read_lora(named, linear_shapes(skeleton), vector_sizes(skeleton), self._skip)
        if expected and file.fingerprint != expected:
            raise RequestError(f"lora {named} is not the expected file: its content has changed", fields=("lora",))
        if scale is None:
            scale = file.known.scale if file.known else 1.0
        return Adapter(file.name, float(scale), file.fingerprint, os.path.abspath(named), file)

    def set(self, handle: Handle, scale: float) -> None:
        """Change an adapter's scale; at 0 the weights are as without it. Raises RequestError."""
        check_lora_scale(scale)
        with self._changing():
            adapter = dataclasses.replace(self._known(handle), scale=float(scale))
            self._become({**self._adapters, handle: adapter})

    def remove(self, handle: Handle) -> None:
        """Remove an adapter; once none is left, the weights are the checkpoint's own bits. Raises RequestError."""
        with self._changing():
            self._known(handle)
            self._become({key: adapter for key, adapter in self._adapters.items() if key is not handle})

    def list(self) -> Adapters:
        """The adapters in use, in the order in which they were added."""
        return tuple(self._adapters.values())

    def read(self, uses: Iterable[LoraUse]) -> Adapters:
        """The adapters that a job names, read from their files where needed. Raises as `adapter` does."""
        return tuple(u if isinstance(u, Adapter) else self.adapter(u.path, u.scale, u.hash) for u in uses)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The DiT's device first: a hook, which holds it, may change adapters while another thread does."""
        with self._owner.hold(DIT), self._lock:
            yield

    def _known(self, handle: Handle) -> Adapter:
        if not isinstance(handle, Handle) or handle not in self._adapters:
            raise RequestError(f"there is no lora with the handle {handle!r} (any more); use one that add returned")
        return self._adapters[handle]

    def _become(self, adapters: Mapping[Handle, Adapter]) -> None:
        """Use these adapters from now on, unless the DiT cannot carry them."""
        self._owner.adapt_idle(tuple(adapters.values()))
        self._adapters = dict(adapters)


def bytes_beside(adapters: Adapters, dtype: torch.dtype) -> int:
    """About the bytes of adapters where they are computed beside their layers, as `nn.branches` holds them."""
    stacks = _stacks(adapters, lambda file: file.deltas)
    deltas = (adapter.file.deltas[path] for path, stack in stacks.items() for adapter in stack)
    return dtype.itemsize * sum(map(_numbers, deltas))


def _numbers(delta: Delta) -> int:
    """Of a delta's factors, a rank filled up to a power of two; of a difference, the whole matrix."""
    if isinstance(delta, LowRank):
        return max(LEAST_RANK, 1 << (delta.w[1].shape[0] - 1).bit_length()) * sum(delta.shape)
    if isinstance(delta, Decomposed):
        return _numbers(delta.inner) + sum(delta.shape)
    parts = (part for value in vars(delta).values() for part in (value if isinstance(value, tuple) else (value,)))
    return sum(part.numel() for part in parts if isinstance(part, Tensor))


def bring(
    dit: nn.Module, component: Component, before: Adapters, after: Adapters, dtype: torch.dtype, device: torch.device
) -> None:
    """Exchange the adapters of a DiT from `before` to `after`, in the layers and vectors where these differ."""
    maps, entries = Maps(), component.checkpoint.entries
    _bring_matrices(dit, component, _changed(before, after, lambda file: file.deltas), dtype, device)
    for name, adapters in _changed(before, after, lambda file: file.vectors).items():
        differences = [(adapter.file.vectors[name], adapter.scale) for adapter in adapters]
        adapt_vector(dit, name, differences, partial(entries[name].tensor, maps), device)


def _bring_matrices(
    dit: nn.Module,
    component: Component,
    changed: Mapping[str, list[Adapter]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Reads ahead the weights that deltas are merged into, and lets go of what was read only once."""
    if not changed:
        return
    maps, entries = Maps(), component.checkpoint.entries
    plain = [path for path, stack in changed.items() if stack and is_plain(dit, path)]
    merged = {path: entry.tensor(maps) for path in plain if not (entry := entries[f"{path}.weight"]).packed}
    prefetch = Prefetch(merged.values())
    try:
        for path, stack in changed.items():
            entry, deltas = entries[f"{path}.weight"], [(adapter.file.deltas[path], adapter.scale) for adapter in stack]
            adapt(dit, path, deltas, partial(entry.read, maps), dtype, device)
            if path in merged:
                forget_pages(merged[path])
            elif not entry.packed and any(isinstance(delta, Decomposed) for delta, _ in deltas):
                forget_pages(entry.tensor(maps))  # read for its norms
    finally:
        prefetch.stop()


def _changed(
    before: Adapters, after: Adapters, part: Callable[[LoraFile], Mapping[str, object]]
) -> dict[str, list[Adapter]]:
    """What `part` of the files names → the adapters from now on, where they are others than before."""
    old, new = _stacks(before, part), _stacks(after, part)
    return {name: new.get(name, []) for name in {**old, **new} if _marks(old, name) != _marks(new, name)}


def _stacks(adapters: Adapters, part: Callable[[LoraFile], Mapping[str, object]]) -> dict[str, list[Adapter]]:
    """Name → the adapters that change it, at a scale other than 0."""
    stacks: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        for name in part(adapter.file) if adapter.scale else ():
            stacks.setdefault(name, []).append(adapter)
    return stacks


def _marks(stacks: Mapping[str, list[Adapter]], name: str) -> list[tuple[str, float]]:
    return [(adapter.hash, adapter.scale) for adapter in stacks.get(name, [])]


def find_by_hash(wanted: Mapping[str, str], named: Iterable[str], folder: str | None) -> dict[str, str]:
    """Hash → path of the wanted files (hash → name), among the paths `named` and in a folder and those below it.

    Files of the wanted names are read first, then the others, the smallest first, until all are found; none is read
    twice. Raises RequestError for a folder that is missing.
    """
    found: dict[str, str] = {}
    names = set(wanted.values())
    files = [lora_file(user_path(path, "lora")) for path in named]
    files += _loras_below(user_path(folder, "lora_folder")) if folder else []
    for path in sorted(dict.fromkeys(files), key=lambda path: (path.name not in names, _size(path))):
        if len(found) == len(wanted):
            break
        if os.path.isfile(path) and os.access(path, os.R_OK) and (digest := content_hash(path)) in wanted:
            found.setdefault(digest, str(path))
    return found


def _loras_below(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):
        text = f"lora_folder {str(folder)!r} is not a folder; name one that holds LoRA files"
        raise RequestError(text, fields=("lora_folder",))
    return sorted(Path(top, name) for top, _, names in os.walk(folder) for name in names if name.endswith(ENDING))


def _size(path: Path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0
