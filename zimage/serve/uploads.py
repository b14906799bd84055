"""Files that came with requests: looked at before anything decodes them, and kept under the hash of their bytes.

    uploads/SHA-256                whole files, each once, however often it is sent
    uploads/SHA-256.safetensors    those that hold embeddings

What a file is called where it came from is not used: no name from outside ever reaches the file system.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from zimage.errors import CheckpointError, RequestError
from zimage.formats.atomic import beside
from zimage.formats.headers import read_header
from zimage.pictures.opening import opened
from zimage.serve.database import storing
from zimage.serve.refusals import NotFound, TooLarge
from zimage.settings.serving import ServeSettings

HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
EMBEDDINGS, REFERENCE = "embeddings", "reference"  # of which the one is tensors, and the other may be
ENDING = ".safetensors"
LONGEST_HEADER = 1 << 20  # bytes of a header of embeddings: one tensor, and the request that they were made from


@dataclass(frozen=True)
class Upload:
    """A kept file. `pixels`: what a picture has of them, once it is decoded; of other files 0."""

    hash: str
    path: Path
    pixels: int = 0


class Uploads:
    """The folder of the files; any thread may use it."""

    def __init__(self, folder: Path, settings: ServeSettings):
        self.folder, self.most_pixels, self._most_bytes = folder, settings.max_decoded, settings.max_upload << 20
        self._turn = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    async def keep(self, name: str, content: bytes) -> Upload:
        """Check and keep what was sent as the attachment `name`, outside of the event loop.

        Raises RequestError or TooLarge with the field's name, NoRoom, or OutputError.
        """
        if not content:
            raise RequestError(f"{name}: it is empty; pass a file, or leave it out", fields=(name,))
        if len(content) > self._most_bytes:
            raise TooLarge(f"{name}: an upload may have {self._most_bytes >> 20} MiB", fields=(name,))
        return await asyncio.to_thread(self._keep, name, content)

    def path_of(self, hash: str) -> Path:
        """The file of a hash. Raises NotFound, also for what is not a hash."""
        paths = [self.folder / f"{hash}{ending}" for ending in ("", ENDING)] if HASH.fullmatch(hash) else []
        for path in paths:
            if path.is_file():
                return path
        raise NotFound("there is no such upload")

    def sweep(self, used: Collection[str], older_than: float) -> int:
        """Remove files that no job needs and that were last sent so many seconds ago; returns how many."""
        before, removed = time.time() - older_than, 0
        with os.scandir(self.folder) as entries:
            names = [entry.name for entry in entries if entry.name.partition(".")[0] not in used]
        for name in names:
            with self._turn, contextlib.suppress(FileNotFoundError):
                if os.stat(self.folder / name).st_mtime < before:
                    os.unlink(self.folder / name)
                    removed += 1
        return removed

    def _keep(self, name: str, content: bytes) -> Upload:
        hash, are_tensors = hashlib.sha256(content).hexdigest(), _are_tensors(name, content)
        path = self.folder / (hash + ENDING if are_tensors else hash)
        look = _look_at_tensors if are_tensors else self._look_at_picture
        with storing(path):
            with self._turn:  # a sweep would find it too old
                known = path.exists()
                if known:
                    os.utime(path)
            if known:  # perhaps as something else: the same bytes may come as a picture and as embeddings
                return Upload(hash, path, _looked(look, name, path))
            with beside(path) as temporary:
                temporary.write_bytes(content)
                pixels = _looked(look, name, temporary)
                os.replace(temporary, path)
        return Upload(hash, path, pixels)

    def _look_at_picture(self, name: str, path: Path) -> int:
        with opened(path) as picture:
            check_pixels(name, picture, self.most_pixels)
            return picture.width * picture.height


def _looked(look: Callable[[str, Path], int], name: str, path: Path) -> int:
    """Its pixels. Raises RequestError or TooLarge for a file that should not be opened any further."""
    with named({str(path): name}):
        return look(name, path)


def _are_tensors(name: str, content: bytes) -> bool:
    """Whether a file is to be looked at as safetensors: the length of a header of JSON, and then that header."""
    begins = content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= len(content) - 8
    return name == EMBEDDINGS or (name == REFERENCE and begins)


def check_pixels(name: str, picture: Image.Image, most: int) -> None:
    """Raise TooLarge before a picture is decoded: its header names its size, and a small file can stand for any."""
    if picture.width * picture.height > most:
        size = f"{picture.width} × {picture.height} px"
        raise TooLarge(f"{name} is {size}; at most {most:,} pixels are decoded", fields=(name,))


@contextlib.contextmanager
def named(places: Mapping[str, str]) -> Iterator[None]:
    """Let errors call files by the fields that they came in, or were named in, and not by their paths here.

    `places`: path → field. A file that cannot be used is then a fault of the request.
    """
    try:
        yield
    except (RequestError, CheckpointError) as error:
        text = str(error)
        found = [field for path, field in places.items() if path in text]
        if not found:
            raise
        for path in sorted(places, key=len, reverse=True):  # one may be the beginning of another
            text = text.replace(path, places[path])
        raise RequestError(text, fields=error.fields or found) from None


def _look_at_tensors(name: str, path: Path) -> int:
    """The header of a safetensors file; the worker reads the values."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if LONGEST_HEADER < length < path.stat().st_size:
            raise RequestError(f"{name}: its header may have {LONGEST_HEADER:,} bytes", fields=(name,))
        problems = read_header(stream, path.stat().st_size).problems
    if problems:
        raise RequestError(f"{name} is not a whole safetensors file ({problems[0]})", fields=(name,))
    return 0
