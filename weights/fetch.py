"""Fetching a published model: only what a render needs, resumed after an interruption, verified, then put in place.

Files arrive in `.zimage-partial` inside the folder and get their final names only once size and hash are the hub's.
"""

import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zimage.errors import CheckpointError, FetchError, RequestError
from zimage.formats.atomic import naming
from zimage.formats.files import require_inside
from zimage.weights.hub import AGAIN, Hub, Listing, Remote, check_repository
from zimage.weights.manifest import RECORD, Progress, Record, find_known, hash_file, read_record, silent

REPOSITORIES = {"turbo": "Tongyi-MAI/Z-Image-Turbo", "base": "Tongyi-MAI/Z-Image"}
PARTIAL = ".zimage-partial"
ESSENTIAL = ("text_encoder/config.json", "transformer/config.json", "vae/config.json")
SPARE = 64 << 20  # bytes left free on the disk


@dataclass(frozen=True)
class Fetched:
    """A file that is in its place, and how many bytes had to be transferred for it."""

    path: str
    size: int
    transferred: int
    hash_known: bool

    @property
    def state(self) -> str:
        came = "fetched" if self.transferred else "already there"
        return f"{came}, {'verified' if self.hash_known else 'only its size verified: the hub gives no hash'}"


def repository_of(name: str) -> str:
    """The repository that turbo, base or OWNER/NAME names. Raises RequestError."""
    return REPOSITORIES.get(name) or check_repository(name)


def fetch(
    repository: str,
    folder: Path,
    revision: str | None = None,
    endpoint: str | None = None,
    progress: Progress = silent,
) -> Iterator[Fetched]:
    """Fetch what `folder` lacks of `repository`, file by file. Raises FetchError, CheckpointError or RequestError.

    Files that are already there are hashed and not transferred again. After any interruption it can be called again.
    """
    with contextlib.closing(Hub(repository, endpoint)) as hub:
        listing = hub.listing(revision)
        files = _needed(repository, listing, check_known=revision is None)
        _make(folder)
        _check_links(folder, files)
        _check_stale(folder, files)
        missing = []
        for file in files:
            if _is_there(folder, file, progress):
                yield _recorded(folder, repository, listing, file, transferred=0, progress=progress)
            else:
                missing.append(file)
        _check_space(folder, missing)
        for file in missing:
            transferred = _transfer(hub, listing, folder, file, progress)
            yield _recorded(folder, repository, listing, file, transferred, progress)
    if (folder / PARTIAL).is_dir():
        shutil.rmtree(folder / PARTIAL)


def _needed(repository: str, listing: Listing, check_known: bool) -> list[Remote]:
    files = list(listing.files)
    absent = [path for path in ESSENTIAL if path not in {file.path for file in files}]
    if absent:
        raise FetchError(f"{repository} is not a model in the published layout: it has no {absent[0]}")
    for file in files if check_known else ():
        _check_known(repository, file)
    return files


def _check_known(repository: str, file: Remote) -> None:
    """Compare what the hub states with what the project has on record, if anything."""
    known = find_known(file.path, repository)
    for name in ("size", "sha256") if known else ():
        ours, theirs = getattr(known, name), getattr(file, name)
        if None not in (ours, theirs) and ours != theirs:
            raise CheckpointError(
                f"{repository}: the {name} of {file.path} is {theirs}, but {ours} is on record; "
                "to fetch it anyway, name its --revision"
            )


def _make(folder: Path) -> None:
    if not folder.parent.is_dir():
        raise RequestError(f"the folder {str(folder.parent)!r} does not exist; make it first")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{str(folder)!r} is a file; name a folder with --to")
    folder.mkdir(exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise RequestError(f"the folder {str(folder)!r} cannot be written to")


def _check_links(folder: Path, files: list[Remote]) -> None:
    """Raise CheckpointError where a link that lies in the folder would have something written or read elsewhere."""
    for path in (RECORD, PARTIAL, *(file.path for file in files)):
        require_inside(folder, folder / path)
    for file in files:
        partial = _partial(folder, file)
        if os.path.lexists(partial) and not _is_plain(partial):
            raise CheckpointError(f"{partial} is not a file that a fetch left there; remove it")


def _is_plain(path: Path) -> bool:
    """Whether it is a regular file of one name: what is appended to another's would change that."""
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _check_stale(folder: Path, files: list[Remote]) -> None:
    """Refuse what is left of another revision: its index would still name its shards."""
    record = read_record(folder)
    if record is None:
        return
    listed = {file.path for file in files}
    for path in record.files:
        if path not in listed and (folder / path).exists():
            raise RequestError(
                f"{folder / path} was fetched at revision {record.revision[:12]} and is not part of this one; "
                "remove it, or name another folder with --to"
            )


def _is_there(folder: Path, file: Remote, progress: Progress) -> bool:
    """Whether the file is in place with the hub's size and hash. Raises RequestError where a foreign file is there."""
    path = folder / file.path
    if not path.exists():
        return False
    if path.is_file() and path.stat().st_size == file.size and _differs(path, file, progress) is None:
        return True
    record = read_record(folder)
    if record is None or file.path not in record.files:
        raise RequestError(
            f"{path} is in the way: it differs from the hub's file, and no fetch put it there; "
            "remove it, or name another folder"
        )
    return False  # fetched once, then damaged or replaced upstream


def _differs(path: Path, file: Remote, progress: Progress) -> str | None:
    """How a file's content differs from the hub's, or None."""
    hashes = hash_file(path, progress)
    if file.sha256 is not None:
        return None if hashes.sha256 == file.sha256 else f"its sha256 is {hashes.sha256}, the hub's {file.sha256}"
    if file.blob is not None:
        return None if hashes.blob == file.blob else f"its git hash is {hashes.blob}, the hub's {file.blob}"
    return None


def _check_space(folder: Path, missing: list[Remote]) -> None:
    needed = sum(file.size - _size(_partial(folder, file)) for file in missing)
    free = shutil.disk_usage(folder).free - SPARE
    if missing and needed > free:
        raise FetchError(
            f"{needed / 1e9:.2f} GB are to be fetched and {max(free, 0) / 1e9:.2f} GB are free at {folder}; "
            "make room, or name a folder on another disk with --to"
        )


def _transfer(hub: Hub, listing: Listing, folder: Path, file: Remote, progress: Progress) -> int:
    """Fetch the missing bytes of a file, verify it and give it its name; returns the bytes transferred."""
    partial = _partial(folder, file)
    partial.parent.mkdir(exist_ok=True)
    try:
        with naming(partial), partial.open("ab") as stream, _alone(stream, file.path):
            arriving = _Arriving(stream, file)
            begin = arriving.size
            hub.read(
                file, listing.commit, arriving, lambda: progress(f"fetching {file.path}", arriving.size, file.size)
            )
            stream.flush()
            os.fsync(stream.fileno())
    except _TooMuch:
        partial.unlink()
        raise
    _verify(partial, file, progress)
    (folder / file.path).parent.mkdir(exist_ok=True)
    os.replace(partial, folder / file.path)
    return file.size - begin


def _verify(partial: Path, file: Remote, progress: Progress) -> None:
    size = partial.stat().st_size
    wrong = f"{size} bytes came instead of {file.size}" if size != file.size else _differs(partial, file, progress)
    if wrong:
        partial.unlink()
        raise CheckpointError(f"{file.path} arrived damaged ({wrong}) and was removed; run the same command again")


def _recorded(
    folder: Path, repository: str, listing: Listing, file: Remote, transferred: int, progress: Progress
) -> Fetched:
    record = read_record(folder) or Record(folder, repository, listing.commit, {})
    record.repository, record.revision = repository, listing.commit
    sha256 = file.sha256 or hash_file(folder / file.path, progress).sha256
    record.files[file.path] = {"size": file.size, "sha256": sha256}
    record.write()
    return Fetched(file.path, file.size, transferred, hash_known=bool(file.sha256 or file.blob))


def _partial(folder: Path, file: Remote) -> Path:
    """The partial file, named after its content as well, so that pieces of two revisions are never joined."""
    mark = (file.sha256 or file.blob or str(file.size))[:16]
    return folder / PARTIAL / f"{file.path.replace('/', '--')}.{mark}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextlib.contextmanager
def _alone(stream: BinaryIO, path: str) -> Iterator[None]:
    """Hold a lock on the file, since two fetches that append to it would spoil it."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{path} is being fetched into this folder by another process; wait for it") from None
    yield


class _TooMuch(FetchError):
    """More came than was announced."""


class _Arriving:
    """A file while it arrives, which takes no more bytes than it should have; what is too long already starts anew."""

    def __init__(self, stream: BinaryIO, file: Remote):
        self._stream, self._file = stream, file
        self.size = os.fstat(stream.fileno()).st_size
        if self.size > file.size:
            self.restart()

    def write(self, data: bytes) -> None:
        if self.size + len(data) > self._file.size:
            raise _TooMuch(
                f"{self._file.path}: the hub sends more than the {self._file.size:,} bytes that it announced; "
                f"what had arrived was removed; {AGAIN}, or name another --endpoint"
            )
        self._stream.write(data)
        self.size += len(data)

    def restart(self) -> None:
        self._stream.truncate(0)
        self.size = 0
