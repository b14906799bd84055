"""Tensors as files store them: name, shape and size are known, values are not read."""

import contextlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from zimage.errors import CheckpointError
from zimage.formats.files import read_start, require_file
from zimage.formats.headers import Header, read_header
from zimage.formats.pages import forget_pages
from zimage.nn.packed import Packed

# Kinds of numbers as safetensors names them; GGUF gives the floats the same names.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NUMBERS = {**FLOATS, **FP8}
DTYPES = {**NUMBERS, "I8": torch.int8, "U8": torch.uint8}
# Every kind that a tensor of an adapter, a state or a caption may have, meant to be computed with or not.
TORCH_DTYPES = {**DTYPES, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool}
_MAPPED_AS = {**TORCH_DTYPES, "F8_E8M0": torch.uint8}  # exponents, which mxfp8's scales are
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
    has_kernel: bool = True  # of a packed matrix: whether a GPU widens it, or it is decoded while it is loaded there
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


def is_pickle(file: Path) -> bool:
    """By the first bytes. A safetensors file has eight that count its header, which may be any, and then a brace."""
    return _begins_a_pickle(read_start(file, 9))


def _begins_a_pickle(begins: bytes) -> bool:
    return begins[8:] != b"{" and re.match(rb"PK|\x80[\x02-\x05]", begins) is not None


def stored_in(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file, and the metadata in its header. Raises CheckpointError."""
    with TensorFile(file) as opened:
        slots = opened.slots
        return {key: plain(file, s.dtype, s.shape, s.begin, s.end) for key, s in slots.items()}, opened.metadata


class TensorFile:
    """An open safetensors file, its header checked, whose tensors are copied out one by one. Raises CheckpointError.

    It stays the same file when another takes its name meanwhile. (A mapping would too, but a file that is cut short
    while it is mapped ends the process.)
    """

    def __init__(self, path: Path, longest: int | None = None):
        self.path = path
        require_file(path)
        try:
            with contextlib.ExitStack() as opened:
                self._stream = opened.enter_context(path.open("rb"))
                header = self._header(longest)
                opened.pop_all()
        except OSError as error:  # it may have gone since
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        self.slots, self.metadata = header.slots, header.metadata

    def _header(self, longest: int | None) -> Header:
        """The header of the file that is open, whatever lies under its name by now."""
        size = os.fstat(self._stream.fileno()).st_size
        if longest is not None and size > longest:
            raise CheckpointError(f"{self.path} has {size:,} bytes; such a file has at most {longest:,}")
        if _begins_a_pickle(self._stream.read(9)):
            raise CheckpointError(f"{self.path} {A_PICKLE}")
        header = read_header(self._stream, size)
        if header.problems:
            raise CheckpointError(f"{self.path} is not a whole safetensors file ({header.problems[0]}); fetch it again")
        return header

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, key: str) -> Tensor:
        """A copy of a tensor, on the CPU. Raises CheckpointError."""
        slot = self.slots[key]
        if slot.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{self.path}: {key} is {slot.dtype}, which no tensor here is")
        data = bytearray(slot.end - slot.begin)
        try:
            self._stream.seek(slot.begin)
            count = self._stream.readinto(data)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if count != len(data):
            raise CheckpointError(f"{self.path} was cut short while it was read; run the command again")
        dtype = TORCH_DTYPES[slot.dtype]
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(slot.shape)


def plain(file: Path, name: str, shape: tuple[int, ...], begin: int, end: int) -> Stored:
    """The tensor in bytes `begin` to `end` of a file, of the kind that safetensors calls `name`.

    A file may hold kinds that no weight has, in tensors that no model uses; as weights they are refused later.
    """
    dtype = _MAPPED_AS.get(name)
    read = _reader(file, name, shape, begin, end)
    return Stored(shape, name, end - begin, read, aligned=dtype is not None and begin % dtype.itemsize == 0)


def _reader(file: Path, name: str, shape: tuple[int, ...], begin: int, end: int) -> Callable[[Maps], Tensor]:
    def read(maps: Maps) -> Tensor:
        if name not in _MAPPED_AS:
            raise CheckpointError(f"{file}: a tensor of the kind {name} cannot be read")
        dtype = _MAPPED_AS[name]
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
