"""Files are written whole or not at all: first under another name in the same folder, then moved in one step."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A free name in the folder of `path`, to write to and then to move; a file still there at the end is removed."""
    temporary = path.with_name(f".{path.stem[:40]}-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
