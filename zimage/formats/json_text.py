"""JSON from outside: configs, indexes, headers, metadata, states, settings of adapters. All of it is read here.

Size, depth and numbers are limited, since Python's own reader ends in a RecursionError, takes twenty times the memory
of the text, or makes integers that no other number can be compared with.
"""

import json
from pathlib import Path
from typing import Any

from zimage.errors import CheckpointError
from zimage.formats.files import read_file

LONGEST = 16 << 20  # bytes; the published index of a sharded model has 0.1 MB, a safetensors header at most 1 MB
DEEPEST = 64  # arrays and objects within one another
LARGEST = 1 << 64  # integers, and less in the negative


def read_json(path: Path, limit: int = LONGEST) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes. Raises CheckpointError, which names the file."""
    return json_object(str(path), read_file(path, limit), limit)


def json_object(name: str, text: str | bytes, limit: int = LONGEST) -> dict[str, Any]:
    """The JSON object that a text holds. Raises CheckpointError, which calls the text by `name`."""
    content = json_value(name, text, limit)
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} should hold a JSON object, not {type(content).__name__}")
    return content


def json_value(name: str, text: str | bytes, limit: int = LONGEST) -> Any:
    """What a JSON text holds. Raises CheckpointError; a key that appears twice in one object is a fault too."""
    if len(text) > limit:
        raise CheckpointError(f"{name} has {len(text):,} bytes of JSON; at most {limit:,} are read")
    try:
        content = json.loads(text, object_pairs_hook=_unique)
        _check(content)
    except RecursionError:
        raise CheckpointError(f"{name} is JSON nested more than {DEEPEST} deep") from None
    except (ValueError, TypeError) as error:  # TypeError where the value is not text
        raise CheckpointError(f"{name} is not JSON: {_brief(error)}") from error
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"a key appears twice in one object: {twice[:80]!r}")
    return content


def _check(content: Any) -> None:
    """Raise ValueError for what is nested too deep and for integers out of range, level by level."""
    level = [content]
    for _ in range(DEEPEST + 1):  # what the innermost holds, too
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, int) and not -LARGEST < value < LARGEST:
                raise ValueError("a whole number has more than 64 bits")
        if not inner:
            return
        level = inner
    raise RecursionError


def _brief(error: Exception) -> str:
    if "integer string conversion" in str(error):  # Python's limit on digits
        return "a whole number has thousands of digits"
    return str(error)
