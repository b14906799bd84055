"""What travels with the messages of a worker on another machine: the files that they name.

    here: /data/uploads/ab      there: ROOT/data/uploads/ab

The other machine keeps files in a folder of its own, ROOT, at the paths that they have here. A message goes there with
ROOT before its paths, and comes back without: no path of the one machine means anything on the other.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from zimage.formats.atomic import write_bytes
from zimage.formats.peft import FILE_NAME
from zimage.serve.channel import Message
from zimage.settings.fields import Plain

KEYS = {"path", "picture", "model", "image", "mask", "embeddings"}  # under which messages to a worker name files


class Parcel(NamedTuple):
    """A message with files by their paths there; None removes one. Without a message the process there has ended."""

    message: Message | None
    files: Mapping[str, bytes | None]


def with_paths(value: Plain, change: Callable[[str], str], key: str = "") -> Plain:
    """A message with its paths changed."""
    if isinstance(value, dict):
        return {name: with_paths(one, change, name) for name, one in value.items()}
    if isinstance(value, list):
        return [with_paths(one, change) for one in value]
    return change(value) if key in KEYS and isinstance(value, str) else value


def without(value: Plain, root: str) -> Plain:
    """A message from there as it is here: also errors name files by their paths here."""
    if isinstance(value, dict):
        return {name: without(one, root) for name, one in value.items()}
    if isinstance(value, list):
        return [without(one, root) for one in value]
    return value.replace(root, "") if isinstance(value, str) else value


def parts(path: Path) -> Iterator[Path]:
    """The files that a path stands for: those of a folder, or the file and what tells of a LoRA beside it."""
    if path.is_dir():
        yield from (file for file in sorted(path.rglob("*")) if file.is_file())
    elif path.is_file():
        yield path
        if (beside := path.with_name(FILE_NAME)).is_file():
            yield beside


def put(path: Path, content: bytes | None) -> None:
    """Write a file whole, or remove it. Raises OSError."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        write_bytes(path, content)
