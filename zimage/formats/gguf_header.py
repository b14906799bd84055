"""Headers of GGUF files, checked by hand: a file of unknown origin may lie about every number in it.

Layout, little-endian: magic, version, the counts of tensors and of metadata; metadata as key, type, value; for each
tensor its name, axes (innermost first), type and offset; the values, aligned. A vocabulary is an array of 150,000
strings: arrays are stepped over, and read only when they are asked for.
Source: ggml's docs/gguf.md.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from zimage.errors import CheckpointError
from zimage.formats.files import read_start, require_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# A file's own counts are believed up to these; a vocabulary of 262,000 tokens has 580,000 merges.
LONGEST_STRING, LONGEST_NAME, LONGEST_ARRAY, MOST_TENSORS, MOST_AXES = 1 << 20, 1 << 10, 1 << 22, 1 << 16, 8


@dataclass(frozen=True)
class Array:
    """An array in the metadata that was stepped over: the type and number of its items, and where the first begins."""

    kind: int
    count: int
    begin: int


@dataclass(frozen=True)
class Tensor:
    """A tensor as the header lists it: axes, the innermost first, ggml's number of its type, offset of its bytes."""

    name: str
    axes: tuple[int, ...]
    kind: int
    offset: int


T = TypeVar("T")
Value = str | int | float | bool | Array


@dataclass(frozen=True)
class Header:
    file: Path
    metadata: dict[str, Value]
    tensors: list[Tensor]
    begin: int  # of the values

    def strings(self, key: str) -> list[str]:
        """The strings of an array in the metadata. Raises CheckpointError."""
        array = self._array(key, (STRING,))
        with _Bytes(self.file) as data:
            data.at = array.begin
            return [data.string(LONGEST_STRING) for _ in range(array.count)]

    def integers(self, key: str) -> list[int]:
        """The whole numbers of an array in the metadata. Raises CheckpointError."""
        array = self._array(key, (0, 1, 2, 3, 4, 5, 10, 11))
        with _Bytes(self.file) as data:
            data.at = array.begin
            return list(data.numbers(SCALARS[array.kind], array.count))

    def _array(self, key: str, kinds: tuple[int, ...]) -> Array:
        array = self.metadata.get(key)
        if not isinstance(array, Array) or array.kind not in kinds:
            word = "strings" if STRING in kinds else "whole numbers"
            raise CheckpointError(f"{self.file}: {key} in its metadata should be an array of {word}")
        return array


def is_gguf(file: Path) -> bool:
    """Whether a file is GGUF by its first bytes, never by its name."""
    return read_start(file, len(MAGIC)) == MAGIC


def read_header(file: Path) -> Header:
    """The header of a GGUF file. Raises CheckpointError, which says what is wrong with it."""
    with _Bytes(file) as data:
        if data.take(4) != MAGIC:
            raise data.broken("it does not begin with GGUF")
        (version,) = data.numbers("I")
        if version not in VERSIONS:
            swapped = "it is big-endian" if version & 0xFFFF == 0 else f"its version is {version}"
            raise data.broken(f"{swapped}; versions {' and '.join(map(str, VERSIONS))}, little-endian, are read")
        tensor_count, value_count = data.numbers("Q", 2)
        metadata = dict(_unique(data, "key", ((data.name(), _value(data)) for _ in _counted(data, value_count))))
        named = ((each.name, each) for each in (_tensor(data) for _ in _counted(data, tensor_count)))
        tensors = [tensor for _, tensor in _unique(data, "tensor", named)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment.bit_count() != 1:
            raise data.broken(f"its alignment is {str(alignment)[:80]}, not a power of two")
        return Header(file, metadata, tensors, -(-data.at // alignment) * alignment)


def _counted(data: "_Bytes", count: int) -> range:
    if count > MOST_TENSORS:
        raise data.broken(f"it lists {count:,} values or tensors; at most {MOST_TENSORS:,} are read")
    return range(count)


def _unique(data: "_Bytes", word: str, pairs: Iterator[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    seen: set[str] = set()
    for name, value in pairs:
        if name in seen:
            raise data.broken(f"the {word} {name[:80]!r} appears twice")
        seen.add(name)
        yield name, value


def _value(data: "_Bytes") -> Value:
    (kind,) = data.numbers("I")
    if kind == STRING:
        return data.string(LONGEST_STRING)
    if kind in SCALARS:
        return data.numbers(SCALARS[kind])[0]
    if kind != ARRAY:
        raise data.broken(f"a value in its metadata has the unknown type {kind}")
    (inner,), (count,) = data.numbers("I"), data.numbers("Q")
    if (inner != STRING and inner not in SCALARS) or count > LONGEST_ARRAY:
        raise data.broken(f"an array in its metadata has {count:,} items of type {inner}, which is not read")
    array = Array(inner, count, data.at)
    if inner == STRING:
        data.skip_strings(count)
    else:
        data.skip(count * struct.calcsize(f"<{SCALARS[inner]}"))
    return array


def _tensor(data: "_Bytes") -> Tensor:
    name, (axes,) = data.name(), data.numbers("I")
    if axes > MOST_AXES:
        raise data.broken(f"the tensor {name[:80]!r} has {axes:,} axes")
    sides = data.numbers("Q", axes)
    (kind,), (offset,) = data.numbers("I"), data.numbers("Q")
    return Tensor(name, sides, kind, offset)


class _Bytes:
    """A mapped file that is read from front to back and never past its end."""

    def __init__(self, file: Path):
        self.file, self.at, self.size = file, 0, require_file(file)
        if not self.size:
            raise self.broken("it is empty")
        with file.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._map)

    def __enter__(self) -> "_Bytes":
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()

    def broken(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file} is not a whole GGUF file ({reason}); fetch it again")

    def skip(self, size: int) -> int:
        """Step over bytes; returns where they began."""
        begin, end = self.at, self.at + size
        if end > self.size:
            raise self.broken(f"it ends at byte {self.size:,}, {end - self.size:,} bytes too early")
        self.at = end
        return begin

    def skip_strings(self, count: int) -> None:
        unpack, data, at, last = struct.Struct("<Q").unpack_from, self._map, self.at, self.size - 8
        for _ in range(count):  # a third of a million times in a vocabulary: nothing but this
            if at > last:
                break
            at += 8 + unpack(data, at)[0]
        else:
            self.skip(at - self.at)
            return
        self.skip(at + 8 - self.at)

    def take(self, size: int) -> bytes:
        return self._map[self.skip(size) : self.at]

    def numbers(self, kind: str, count: int = 1) -> tuple:
        form = struct.Struct(f"<{count}{kind}")
        return form.unpack(self.take(form.size))

    def string(self, longest: int) -> str:
        (length,) = self.numbers("Q")
        if length > longest:
            raise self.broken(f"a text in its header has {length:,} bytes; at most {longest:,} are read")
        return self.take(length).decode("utf-8", "replace")

    def name(self) -> str:
        return self.string(LONGEST_NAME)
