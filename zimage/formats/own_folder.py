"""Folders of a process's own, among the temporary ones of its machine.

A process that is killed cannot remove its folder: the next one of the same kind does. The lock of a file in it tells
which of them are in use, and ends with the process.
"""

import os
import shutil
import tempfile
from pathlib import Path

from zimage.formats.lock import Lock

LOCK = "lock"  # the file that is locked while its process lives


class OwnFolder:
    """A new folder at `path`, whose name begins with `prefix`; folders of this prefix that nobody uses are removed."""

    def __init__(self, prefix: str):
        sweep(Path(tempfile.gettempdir()), prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock = Lock(self.path / LOCK)
        (self.path / "unlocked").touch()
        self._lock.publish(self.path / "unlocked")

    def remove(self) -> None:
        """Remove it with all in it, as far as that is possible: the next one does the rest."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def sweep(folder: Path, prefix: str) -> None:
    """Remove the folders in `folder` whose names begin with `prefix`, and whose processes were killed."""
    for path in folder.glob(f"{prefix}*") if os.name == "posix" else ():  # elsewhere a lock tells nothing
        try:
            lock = Lock.of(path / LOCK)
        except OSError:  # its process lives or has just begun, or it is another user's
            continue
        shutil.rmtree(path, ignore_errors=True)
        lock.close()
