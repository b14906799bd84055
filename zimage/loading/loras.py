"""The LoRA adapters of a pipeline: added, re-weighted and removed, whether its DiT is loaded or not.

Adapters add up. A layer is always made from the checkpoint's weight and all that is wanted of it, never from what it
holds at the moment, so that an adapter that is removed leaves nothing behind.
"""

import dataclasses
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zimage.errors import RequestError
from zimage.formats.lora import LoraFile, read_lora
from zimage.formats.pages import Prefetch, forget_pages
from zimage.loading.files import Component
from zimage.nn.adapters import adapt, is_plain, linear_shapes
from zimage.nn.deltas import Decomposed
from zimage.settings.declared import check_lora_scale


class Handle:
    """Stands for one adapter that was added; a file that is added twice has two."""


@dataclass(frozen=True)
class Adapter:
    """One adapter in use: `scale` is what its deltas are multiplied by."""

    handle: Handle
    file: LoraFile = dataclasses.field(repr=False)
    scale: float

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return self.file.name

    def describe(self) -> dict[str, Any]:
        """Plain values for a picture's metadata."""
        return {"name": self.name, "scale": self.scale, "hash": self.file.fingerprint}


class Loras:
    """`pipe.lora`. For several threads at once; a render under way goes on with what is changed meanwhile.

    `loaded` are the pipeline's parts and `lock` is what guards them; `mergeable` says that the DiT's layers are plain.
    """

    def __init__(
        self,
        dit: Component,
        device: torch.device,
        dtype: torch.dtype,
        loaded: dict[str, nn.Module],
        lock: threading.Lock,
        mergeable: bool,
    ):
        self._dit, self._device, self._dtype = dit, device, dtype
        self._loaded, self._lock, self._mergeable = loaded, lock, mergeable
        self._adapters: dict[Handle, Adapter] = {}

    def add(self, path: str | os.PathLike, scale: float = 1.0) -> Handle:
        """Add the adapter of a safetensors file and return what `set` and `remove` know it by.

        Raises RequestError for a scale that cannot be used and CheckpointError for a file that cannot.
        """
        if not isinstance(path, str | os.PathLike):
            raise RequestError(f"lora {path!r} is a {type(path).__name__}; it should be the path of a file")
        check_lora_scale(scale)
        file = read_lora(Path(os.path.expanduser(path)), linear_shapes(self._dit.skeleton))
        decomposed = [path for path, delta in file.deltas.items() if isinstance(delta, Decomposed)]
        if not all(self._mergeable and not self._is_packed(path) for path in decomposed):
            text = f"lora {file.name} is a DoRA, which needs plain float weights at precision bf16"
            raise RequestError(text, fields=("lora", "precision"))
        adapter = Adapter(Handle(), file, float(scale))
        with self._lock:
            self._become({**self._adapters, adapter.handle: adapter}, file.deltas)
        return adapter.handle

    def set(self, handle: Handle, scale: float) -> None:
        """Give an adapter another scale; at 0 the weights are as without it. Raises RequestError."""
        check_lora_scale(scale)
        with self._lock:
            adapter = dataclasses.replace(self._known(handle), scale=float(scale))
            self._become({**self._adapters, handle: adapter}, adapter.file.deltas)

    def remove(self, handle: Handle) -> None:
        """Take an adapter away; when none is left the weights are the checkpoint's own bits. Raises RequestError."""
        with self._lock:
            removed = self._known(handle)
            others = {key: adapter for key, adapter in self._adapters.items() if key is not handle}
            self._become(others, removed.file.deltas)

    def list(self) -> tuple[Adapter, ...]:
        """The adapters in use, in the order in which they were added."""
        return tuple(self._adapters.values())

    def apply(self, dit: nn.Module) -> None:
        """Give a DiT that was just loaded all adapters; for the pipeline, which holds the lock."""
        paths = {path: None for adapter in self._adapters.values() for path in adapter.file.deltas}
        self._bring(dit, self._adapters, paths)

    def _is_packed(self, path: str) -> bool:
        return self._dit.checkpoint.entries[f"{path}.weight"].packed

    def _known(self, handle: Handle) -> Adapter:
        if not isinstance(handle, Handle) or handle not in self._adapters:
            raise RequestError(f"there is no lora with the handle {handle!r} (any more); use one that add returned")
        return self._adapters[handle]

    def _become(self, adapters: Mapping[Handle, Adapter], paths: Iterable[str]) -> None:
        """Have these adapters from now on; `paths` are the layers where that makes a difference."""
        if "dit" in self._loaded:
            try:
                self._bring(self._loaded["dit"], adapters, paths)
            except BaseException:
                del self._loaded["dit"]  # changed by half: it is loaded anew, with the adapters there were
                raise
        self._adapters = dict(adapters)

    def _bring(self, dit: nn.Module, adapters: Mapping[Handle, Adapter], paths: Iterable[str]) -> None:
        """Make the layers at `paths` carry what the adapters have for them."""
        read, wanted = self._dit.checkpoint.reader(), [a for a in adapters.values() if a.scale != 0]
        stacks = {path: [(a.file.deltas[path], a.scale) for a in wanted if path in a.file.deltas] for path in paths}
        plain = [path for path, stack in stacks.items() if stack and is_plain(dit, path, self._dtype)]
        merged = {path: read(f"{path}.weight") for path in plain}
        prefetch = Prefetch(merged.values())
        try:
            for path, stack in stacks.items():
                adapt(dit, path, stack, partial(read, f"{path}.weight"), self._dtype, self._device)
                if path in merged:
                    forget_pages(merged[path])
        finally:
            prefetch.stop()
