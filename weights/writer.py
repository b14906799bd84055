"""Writing safetensors files tensor by tensor: the header from shapes alone, then the values in pieces.

Nothing appears under a final name before all of it is on the disk; memory holds one piece, whatever the file's size.
"""

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from zimage.errors import CheckpointError, RequestError
from zimage.formats.atomic import beside, free_name, naming, remove
from zimage.formats.headers import BITS
from zimage.weights.manifest import Progress, silent

ALIGNMENT = 64  # of the values in the file: products read weights from aligned memory 3 to 5 % faster
PROBE = 4096  # bytes checked before a whole piece is searched for anything but zeros
SPARE = 64 << 20  # bytes left free on the disk
DEFAULT_SHARD = 10_000_000_000


@dataclass(frozen=True)
class Planned:
    """A tensor to be written; `pieces` yields its values in order, already in `dtype`."""

    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


def write_file(path: Path, tensors: Sequence[Planned], progress: Progress = silent) -> None:
    """Write one file; `path` should be a temporary name, see `placing`. Raises CheckpointError."""
    ordered = sorted(tensors, key=lambda tensor: -BITS[tensor.dtype])  # wide values first keeps all aligned
    head, total = _header(ordered), sum(tensor.nbytes for tensor in ordered)
    with path.open("xb") as stream:
        stream.write(head)
        for tensor in ordered:
            begin = stream.tell()
            for piece in tensor.pieces():
                _write_piece(stream, piece)
                progress(f"writing {tensor.name}", stream.tell() - len(head), total)
            if stream.tell() - begin != tensor.nbytes:
                raise CheckpointError(f"{tensor.name}: {stream.tell() - begin} bytes came instead of {tensor.nbytes}")
        stream.truncate(len(head) + total)  # the file may end in a hole


def write_shards(
    folder: Path, stem: str, tensors: Sequence[Planned], limit: int = DEFAULT_SHARD, progress: Progress = silent
) -> None:
    """Write `stem`.safetensors, or shards of at most `limit` bytes each with their index."""
    shards, total = list(_shards(tensors, limit)), sum(tensor.nbytes for tensor in tensors)
    if len(shards) == 1:
        return write_file(folder / f"{stem}.safetensors", tensors, progress)
    weight_map: dict[str, str] = {}
    before = 0
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, _shifted(progress, before, total))
        weight_map |= {tensor.name: name for tensor in shard}
        before += sum(tensor.nbytes for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def placing(target: Path, replace: bool) -> Iterator[Path]:
    """Yield a temporary path beside `target`, which takes that name if the block succeeds and is removed if it fails.

    Raises RequestError where `target` has come into being meanwhile and `replace` is off.
    """
    with naming(target), beside(target, quick=False) as temporary:
        yield temporary
        if target.exists() and not replace:
            raise RequestError(f"{target} has appeared in the meantime and is not replaced; use --force")
        _sync_all(temporary)
        _take_name(temporary, target)


def check_space(folder: Path, needed: int) -> None:
    """Raise RequestError, with the figures, where `folder`'s disk has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free - SPARE
    if needed > free:
        raise RequestError(
            f"{needed / 1e9:.2f} GB are to be written and {max(free, 0) / 1e9:.2f} GB are free at {folder}; make room"
        )


def _header(tensors: Iterable[Planned]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        offsets = [offset, offset + tensor.nbytes]
        content[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_piece(stream: BinaryIO, piece: Tensor) -> None:
    """Write a piece's bytes; a piece of zeros becomes a hole, which reads the same and takes no room."""
    data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
    if data[:PROBE].any() or data.any():
        stream.write(data.data)
    else:
        stream.seek(data.size, os.SEEK_CUR)


def _shards(tensors: Sequence[Planned], limit: int) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    """The progress of one shard, reported as progress of all."""
    return lambda what, done, _: progress(what, before + done, total)


def _take_name(temporary: Path, target: Path) -> None:
    """Rename a file or folder; a folder cannot be replaced in one step, so an old one steps aside first."""
    aside, was_folder = free_name(target), target.is_dir()
    if was_folder:
        os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        if was_folder:
            os.replace(aside, target)
        raise
    _sync(target.parent)
    remove(aside)


def _sync_all(path: Path) -> None:
    """Flush a file, or a folder with all in it, to the disk before it gets its name."""
    for inner in path.iterdir() if path.is_dir() else ():
        _sync_all(inner)
    _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
