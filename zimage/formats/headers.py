"""Headers of safetensors files, checked by hand: a file of unknown origin may lie about every number in it.

Layout: eight bytes with the header's length, the header (JSON: name → dtype, shape, data_offsets), the values.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from zimage.errors import CheckpointError
from zimage.formats.json_text import json_object

# Bits per value, since some kinds are smaller than a byte.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
LONGEST_HEADER = 32 << 20  # bytes; the format allows 100 MB, and 400 tensors take 0.05
MOST_AXES = 8


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass
class Header:
    """A file's tensors and metadata, as far as they can be read, and its problems: none where it is sound."""

    slots: dict[str, Slot] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_header(stream: BinaryIO, size: int) -> Header:
    """Read and check the header of a file of `size` bytes; no values are read."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        return Header(problems=[_no_header(size, length)])
    if length > LONGEST_HEADER:
        return Header(problems=[f"its header has {length:,} bytes; at most {LONGEST_HEADER:,} are read"])
    try:
        content = json_object("its header", stream.read(length), LONGEST_HEADER)
    except CheckpointError as error:
        return Header(problems=[f"{error}; it is not a safetensors file, or it is damaged"])
    return _checked(content, 8 + length, size)


def _no_header(size: int, length: int) -> str:
    if size < 8:
        return f"it has {size} bytes, too few for a safetensors file"
    return f"it declares a header of {length:,} bytes in a file of {size:,}; it is truncated, or not a safetensors file"


def _checked(content: Mapping[str, Any], start: int, size: int) -> Header:
    header = Header()
    for name, about in content.items():
        if name == "__metadata__":
            texts = isinstance(about, dict) and all(isinstance(value, str) for value in about.values())
            header.metadata = about if texts else {}
            header.problems += [] if texts or about is None else ["its metadata should map names to texts"]
            continue
        try:
            header.slots[name] = _slot(about, start)
        except KeyError as error:
            header.problems.append(f"{name}: its entry lacks {error}")
        except (TypeError, ValueError) as error:
            header.problems.append(f"{name}: its entry is unusable ({error})")
    header.problems += _misplaced(header.slots, start, size)
    return header


def _slot(about: Any, start: int) -> Slot:
    if not isinstance(about, dict):
        raise ValueError("it should be an object")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"dtype {str(dtype)[:80]!r} is unknown")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > MOST_AXES or len(offsets) != 2:
        raise ValueError(f"it should have a shape of at most {MOST_AXES} axes and two offsets")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, *offsets)):
        raise ValueError("shape and offsets should be whole numbers")
    begin, end = offsets
    size = math.prod(shape) * BITS[dtype]
    if size != (end - begin) * 8:
        raise ValueError(f"{dtype} {shape} should take {size // 8:,} bytes, not {end - begin:,}")
    return Slot(dtype, tuple(shape), start + begin, start + end)


def _misplaced(slots: dict[str, Slot], start: int, size: int) -> Iterator[str]:
    """What keeps tensors from following one another without gap or overlap to the end of the file."""
    reached, before = start, "the header"
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)):
        if slot.begin < reached:
            yield f"{name} overlaps {before}"
        elif slot.begin > reached:
            yield f"{slot.begin - reached:,} bytes before {name} belong to no tensor"
        reached, before = max(reached, slot.end), name
    if reached > size:
        yield f"it has {size:,} bytes and should have {reached:,}; it is truncated, fetch it again"
    elif reached < size:
        yield f"{size - reached:,} bytes after the last tensor belong to none"
