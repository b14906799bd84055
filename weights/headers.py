"""Headers of safetensors files, checked by hand: a file of unknown origin may lie about every number in it.

Layout: eight bytes with the header's length, the header (JSON: name → dtype, shape, data_offsets), the values.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Bits per value, since some kinds are smaller than a byte.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
LONGEST_HEADER = 100_000_000  # the format's own limit
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
    """A file's tensors, as far as they can be read, and its problems: none where it is sound."""

    slots: dict[str, Slot] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_header(file: Path) -> Header:
    """Read and check a header; no values are read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            return Header(problems=[_no_header(size, length)])
        text = stream.read(length)
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        return Header(problems=[f"its header is not JSON ({error}); it is not a safetensors file, or it is damaged"])
    if not isinstance(content, dict):
        return Header(problems=["its header should be a JSON object"])
    return _checked(content, 8 + length, size)


def _no_header(size: int, length: int) -> str:
    if size < 8:
        return f"it has {size} bytes, too few for a safetensors file"
    return f"it declares a header of {length:,} bytes in a file of {size:,}; it is truncated, or not a safetensors file"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _checked(content: dict[str, Any], start: int, size: int) -> Header:
    header = Header()
    for name, about in content.items():
        if name == "__metadata__":
            continue
        try:
            header.slots[name] = _slot(about, start)
        except (KeyError, TypeError, ValueError) as error:
            header.problems.append(f"{name}: its entry is unusable ({error.args[0] if error.args else error!r})")
    header.problems += _misplaced(header.slots, start, size)
    return header


def _slot(about: Any, start: int) -> Slot:
    dtype, shape, (begin, end) = about["dtype"], about["shape"], about["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"dtype {dtype!r} is unknown")
    if len(shape) > MOST_AXES or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end)):
        raise ValueError(f"shape and offsets should be whole numbers, for at most {MOST_AXES} axes")
    size = math.prod(shape) * BITS[dtype]
    if size != (end - begin) * 8:
        raise ValueError(f"{dtype} {list(shape)} should take {size // 8:,} bytes, not {end - begin:,}")
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
