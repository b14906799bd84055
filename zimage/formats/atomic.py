"""Files are written whole or not at all: beside their place first, then moved there in one step."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A free name in the same folder, to write to and then to move; what still stands there in the end is removed."""
    temporary = path.with_name(f".{path.stem[:40]}-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
