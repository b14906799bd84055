"""Input pictures of rows: read once where the command runs, carried by content, opened by workers under their names.

    path ─ Packing ─→ "HASH/NAME", and the content by its hash ─ Unpacking ─→ a file of that name in a folder of its own

What lies in a file is read and carried once, however many rows name it; at a worker it lies only while that draws such
a row. Files of ControlNets do not travel: they are part of what a worker's machine has to have, as the model is.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zimage.batch.rows import PICTURE, Values, with_files
from zimage.errors import RequestError
from zimage.formats.own_folder import OwnFolder

LARGEST = 1 << 30  # bytes of a file that travels
PREFIX = "zimage-batch-"  # of the folders that files are unpacked to


class Packing:
    """Files by path → by content. `keep` takes a content and returns what stands for it on its way."""

    def __init__(self, keep: Callable[[bytes], Any]):
        self._keep, self._known = keep, dict[str, str]()
        self.contents: dict[str, Any] = {}

    def pack(self, values: Values) -> Values:
        """A request whose pictures are named by their content. Raises RequestError for a file that cannot be read."""
        return with_files(values, self._moved)

    def _moved(self, role: str, path: str) -> str:
        if role != PICTURE:
            return path
        if path not in self._known:
            content = _read(path)
            hash = hashlib.sha256(content).hexdigest()
            if hash not in self.contents:
                self.contents[hash] = self._keep(content)
            self._known[path] = f"{hash}/{os.path.basename(path)}"
        return self._known[path]


class Unpacking:
    """Files by content → by path, written when they are first needed. `fetch` returns what `keep` was given."""

    def __init__(self, contents: Mapping[str, Any], fetch: Callable[[Any], bytes]):
        self._contents, self._fetch = contents, fetch
        self._folder: OwnFolder | None = None

    def unpack(self, values: Values) -> Values:
        """The inverse of `pack`, with paths on this machine, where the files lie until `clear`."""
        return with_files(values, self._moved)

    def named(self, text: str) -> str:
        """A text without the folders that the files lie in here."""
        if self._folder is None:
            return text
        return re.sub(rf"{re.escape(str(self._folder.path))}[/\\][0-9a-f]+[/\\]", "", text)

    def clear(self) -> None:
        """Remove the files: whatever ends this process later does not give it the time to."""
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _moved(self, role: str, name: str) -> str:
        if role != PICTURE:
            return name
        self._folder = self._folder or OwnFolder(PREFIX)
        path = self._folder.path / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(self._fetch(self._contents[path.parent.name]))
        return str(path)


def _read(path: str) -> bytes:
    try:
        if not os.path.isfile(path):
            raise RequestError(f"{path} is not a file that can be read")
        if os.path.getsize(path) > LARGEST:
            raise RequestError(f"{path} has more than {LARGEST:,} bytes; a picture has less")
        return Path(path).read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
