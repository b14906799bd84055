"""A lock on a file that is replaced at every writing: it passes on from each file to the next of the same name.

Two processes that keep the same file would overwrite each other's; the second is refused. A process that ends, in
whatever way, leaves no lock behind.
"""

import os
from pathlib import Path

from zimage.formats.atomic import take

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Lock:
    """The right to write a file. The lock of a file that does not exist yet holds nothing before it is published.

    On Windows it never holds anything: a file that is open there can be neither replaced nor removed.
    """

    def __init__(self, path: Path):
        self.path, self._file, self._has_name = path, -1, False

    @classmethod
    def of(cls, path: Path) -> "Lock":
        """Of a file that exists. Raises BlockingIOError where another process holds it, or OSError."""
        lock = cls(path)
        os.stat(path)  # it is there
        while fcntl is not None and lock._file < 0:
            file = _locked(path)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                lock._file = file
            else:  # it was replaced meanwhile
                os.close(file)
        lock._has_name = True
        return lock

    def publish(self, temporary: Path) -> None:
        """Give the name to a finished file. The first takes a free name only: it raises FileExistsError, or OSError."""
        file = _locked(temporary)
        try:
            if self._has_name:
                os.replace(temporary, self.path)
            else:
                take(temporary, self.path)
        except OSError:
            _close(file)
            raise
        self.close()
        self._file, self._has_name = file, True

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the file."""
        _close(self._file)
        self._file = -1


def _close(file: int) -> None:
    if file >= 0:
        os.close(file)


def _locked(path: Path) -> int:
    """A file, opened and locked; only opened where the file system knows no locks; -1 on Windows."""
    if fcntl is None:
        return -1
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise
    except OSError:
        pass
    return file
