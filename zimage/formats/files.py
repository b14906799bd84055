"""Files from outside, read within limits: their sizes are known before they are read, and none is waited for.

A folder that somebody else packed may hold a FIFO, on which a reader waits for ever, a device without an end, or a
sparse file of any size.
"""

import os
import stat
from pathlib import Path

from zimage.errors import CheckpointError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_file(path: Path) -> int:
    """The size of a regular file in bytes. Raises CheckpointError for anything else, also where nothing is there."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # a name too long, a circle of links, a zero byte
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise CheckpointError(f"{path} is {kind}; it should be a regular file")
    return found.st_size


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises CheckpointError."""
    size = require_file(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)  # it may grow meanwhile
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    if len(content) > limit:
        raise CheckpointError(f"{path} has {max(size, len(content)):,} bytes; such a file has at most {limit:,}")
    return content


def read_start(path: Path, count: int) -> bytes:
    """The first `count` bytes of a regular file, fewer where it has no more. Raises CheckpointError."""
    require_file(path)
    try:
        with path.open("rb") as stream:
            return stream.read(count)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error


def require_inside(folder: Path, path: Path) -> None:
    """Raise CheckpointError where `path` leads out of `folder` by a link; see `is_inside`."""
    if not is_inside(folder, path):
        raise CheckpointError(
            f"{path} leads out of {folder} by a link, which is not followed; put the file itself there"
        )


def is_inside(folder: Path, path: Path) -> bool:
    """Whether `path` lies in `folder`, all links followed.

    The snapshots of the hub's cache are folders of links to `blobs` beside them: these may be followed.
    """
    top, end = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    snapshot = next((p for p in (top, *top.parents[:2]) if p.parent.name == "snapshots"), None)
    cache = snapshot.parent.parent if snapshot else None
    around = [top, cache / "blobs"] if cache and cache.name.startswith("models--") else [top]
    return any(end.is_relative_to(place) for place in around)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
