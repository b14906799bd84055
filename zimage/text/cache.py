"""Recently encoded captions, kept in memory and, if asked for, in a folder that several processes may share."""

import contextlib
import hashlib
import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zimage.errors import CheckpointError, RequestError
from zimage.text.embeddings import caption_hash, read_caption, write_caption

log = logging.getLogger("zimage")

KEY = re.compile(r"[0-9a-f]{16,64}")
FORMAT = "zimage-cached-caption"


@dataclass(frozen=True)
class CacheStats:
    """Counts of a cache. `hits` include those from the folder; `size` entries with `bytes` in total are in memory."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    disk_hits: int = 0
    size: int = 0
    bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits among all look-ups, from 0 to 1; 0 before the first."""
        total = self.hits + self.misses
        return self.hits / total if total else 0.0


def cache_key(
    text: str,
    layers: int | Mapping[int, float],
    encoder: str,
    dtype: torch.dtype | str,
    **more: str | int | float | bool | None,
) -> str:
    """A hex digest of all that a caption depends on: the formatted text, the hidden layer or blend {layer: weight}, the
    encoder's fingerprint, the dtype, and whatever else the caller passes.
    """
    weights = {layers: 1.0} if isinstance(layers, int) else layers
    blend = sorted((layer, float(weight)) for layer, weight in weights.items())
    kind = str(dtype).removeprefix("torch.")
    return hashlib.sha256(json.dumps([text, blend, encoder, kind, sorted(more.items())]).encode()).hexdigest()


class EmbeddingCache:
    """Keeps the `entries` captions that were used last; with 0 it keeps and counts nothing. Threads may share one.

    With a `folder`, each caption is also written there, in one file per key, for later processes; the folder is not
    bounded. A file that is damaged or was not written by a cache is a miss, and the next `put` of its key replaces it.
    """

    def __init__(self, entries: int = 100, folder: Path | None = None):
        if entries < 0:
            raise RequestError(f"the number of cache entries is {entries}; the minimum is 0")
        self.entries, self.folder = entries, folder
        self._kept: OrderedDict[str, Tensor] = OrderedDict()  # the latest last
        self._counts = {"hits": 0, "misses": 0, "evictions": 0, "disk_hits": 0}
        self._lock = threading.Lock()

    def get(self, key: str) -> Tensor | None:
        """A copy, on the CPU, of the caption that was put under `key`, or None."""
        if not self.entries:
            return None
        file = self._file(key)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                self._counts["hits"] += 1
        if kept is None:
            kept = self._read(file, key) if file else None
            self._count_read(key, kept)
        return None if kept is None else kept.clone()

    def put(self, key: str, caption: Tensor) -> None:
        """Keep a copy of a caption (L, C) under `key`."""
        if not self.entries:
            return
        file, kept = self._file(key), caption.detach().to("cpu", copy=True).contiguous()
        with self._lock:
            self._keep(key, kept)
        if file:
            _write(file, key, kept)

    def clear(self) -> None:
        """Forget all captions, delete their files in the folder and set the counts to 0."""
        with self._lock:
            self._kept.clear()
            self._counts = dict.fromkeys(self._counts, 0)
        for file in self.folder.glob("*.safetensors") if self.folder else ():
            if KEY.fullmatch(file.stem):
                with contextlib.suppress(OSError):  # another process has deleted it, or is reading it
                    file.unlink()

    @property
    def stats(self) -> CacheStats:
        with self._lock:
            held = sum(caption.nbytes for caption in self._kept.values())
            return CacheStats(**self._counts, size=len(self._kept), bytes=held)

    def _file(self, key: str) -> Path | None:
        if not KEY.fullmatch(key):
            raise RequestError(f"cache key {key[:80]!r} should be 16 to 64 hex digits, as cache_key returns")
        return self.folder / f"{key}.safetensors" if self.folder else None

    def _keep(self, key: str, caption: Tensor) -> None:
        """Call this with the lock held."""
        self._kept[key] = caption
        self._kept.move_to_end(key)
        while len(self._kept) > self.entries:
            self._kept.popitem(last=False)
            self._counts["evictions"] += 1

    def _count_read(self, key: str, caption: Tensor | None) -> None:
        with self._lock:
            if caption is None:
                self._counts["misses"] += 1
                return
            self._counts["hits"] += 1
            self._counts["disk_hits"] += 1
            self._keep(key, caption)

    def _read(self, file: Path, key: str) -> Tensor | None:
        if not file.exists():
            return None
        try:
            caption, metadata = read_caption(file)
        except CheckpointError as error:
            log.warning("a cached caption is not used: %s", error)
            return None
        if metadata != _described(key, caption):
            log.warning("a cached caption is not used: %s holds something other than what was put there", file)
            return None
        return caption


def _write(file: Path, key: str, caption: Tensor) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_caption(file, caption, _described(key, caption))
    except OSError as error:
        log.warning("a caption is not cached in %s: %s", file.parent, error.strerror or error)


def _described(key: str, caption: Tensor) -> dict[str, str]:
    return {"format": FORMAT, "key": key, "hash": caption_hash(caption)}
