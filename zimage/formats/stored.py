"""Tensors as files store them: name, shape and size are known, values are not read."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zimage.errors import CheckpointError
from zimage.formats.pages import forget_pages
from zimage.nn.packed import Packed

# Kinds of numbers as safetensors names them; GGUF gives the floats the same names.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NUMBERS = {**FLOATS, **FP8}
DTYPES = {**NUMBERS, "I8": torch.int8, "U8": torch.uint8}
A_PICKLE = "is a pickle, which can run code when it is opened; use a safetensors file"
COPIED_AT_ONCE = 32 << 20  # bytes


class Maps:
    """Files mapped into memory, each on first use; a mapping lives as long as this object or one of its tensors."""

    def __init__(self) -> None:
        self._files: dict[Path, Tensor] = {}

    def __call__(self, file: Path) -> Tensor:
        """The bytes of a file as a mapped tensor; none is read yet."""
        if file not in self._files:
            self._files[file] = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
        return self._files[file]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `read(maps)` returns a view of the mapped file, or a packed matrix of such views."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it; for a packed matrix, its kind
    nbytes: int
    read: Callable[[Maps], Tensor | Packed]
    packed: bool = False
    aligned: bool = True  # an unaligned tensor must be copied out of the file

    @property
    def kind(self) -> torch.dtype | None:
        """The dtype of the tensor that `read` returns, or None for a packed matrix."""
        return None if self.packed else DTYPES.get(self.dtype)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def is_number(self) -> bool:
        """Whether its values are the weights themselves, and not codes of an unknown meaning."""
        return self.packed or self.dtype in NUMBERS

    def tensor(self, maps: Maps) -> Tensor:
        """What `read` returns for a plain tensor; raises CheckpointError for a packed matrix."""
        value = self.read(maps)
        if not isinstance(value, Tensor):
            raise CheckpointError(f"a matrix of kind {self.dtype} should be a plain tensor")
        return value

    def rows(self, begin: int, end: int) -> "Stored":
        """Rows begin … end − 1 of a matrix."""

        def read(maps: Maps) -> Tensor | Packed:
            whole = self.read(maps)
            return whole[begin:end] if isinstance(whole, Tensor) else whole.rows(begin, end)

        nbytes = self.nbytes * (end - begin) // self.shape[0]
        return replace(self, shape=(end - begin, *self.shape[1:]), nbytes=nbytes, read=read)

    def reshaped(self, *shape: int) -> "Stored":
        """The same values in another shape; for plain tensors only."""
        return replace(self, shape=shape, read=lambda maps: self.tensor(maps).reshape(shape))


def json_object(name: str, text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text holds. Raises CheckpointError, which calls the text by `name`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} should hold a JSON object, not {type(content).__name__}")
    return content


def is_pickle(file: Path) -> bool:
    """By the first bytes. A safetensors file has eight that count its header, which may be any, and then a brace."""
    with file.open("rb") as stream:
        begins = stream.read(9)
    return begins[8:] != b"{" and re.match(rb"PK|\x80[\x02-\x05]", begins) is not None


def stored_in(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file, and the metadata in its header. Raises CheckpointError."""
    header, start = _header(file)
    metadata = header.pop("__metadata__", None) or {}
    return dict(_tensors(file, header, start)), metadata


def _header(file: Path) -> tuple[dict[str, Any], int]:
    try:
        with safe_open(file, framework="pt", device="cpu"):
            pass  # the package checks the header: offsets against shapes and against the file's length
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            return json.loads(stream.read(length)), 8 + length
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error


def _tensors(file: Path, header: dict[str, Any], start: int) -> Iterator[tuple[str, Stored]]:
    for key, about in header.items():
        name, shape = about["dtype"], tuple(about["shape"])
        begin, end = (start + offset for offset in about["data_offsets"])
        yield key, plain(file, name, shape, begin, end)


def plain(file: Path, name: str, shape: tuple[int, ...], begin: int, end: int) -> Stored:
    """The tensor in bytes `begin` to `end` of a file, of the kind that safetensors calls `name`.

    A file may hold kinds that no weight has, in tensors that no model uses; as weights they are refused later.
    """
    dtype = DTYPES.get(name, torch.uint8)
    read = _reader(file, dtype, shape, begin, end)
    return Stored(shape, name, end - begin, read, aligned=begin % dtype.itemsize == 0)


def _reader(file: Path, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> Callable[[Maps], Tensor]:
    def read(maps: Maps) -> Tensor:
        data = maps(file)[begin:end]
        if begin % dtype.itemsize:
            data = _copied(data)  # a careless writer left it unaligned
        return data.view(dtype).view(shape)

    return read


def _copied(data: Tensor) -> Tensor:
    """A copy in memory; at most one piece of the mapped original is resident beside it."""
    copy = torch.empty_like(data)
    for target, mapped in zip(copy.split(COPIED_AT_ONCE), data.split(COPIED_AT_ONCE), strict=True):
        target.copy_(mapped)
        forget_pages(mapped)
    return copy
