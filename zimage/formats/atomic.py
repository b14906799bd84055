"""Files are written whole or not at all: first under another name in the same folder, then moved in one step."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A free name in the folder of `path`, to write to and then to move; what is still there at the end is removed."""
    temporary = free_name(path)
    try:
        yield temporary
    finally:
        remove(temporary)


def free_name(path: Path) -> Path:
    """A name in the folder of `path` that nobody can foresee, and so put a link under."""
    return path.with_name(f".{path.stem[:40]}-{uuid.uuid4().hex}{path.suffix}")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
