"""Files are written whole or not at all: first under another name in the same folder, then moved in one step."""

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

from zimage import interrupts
from zimage.errors import RequestError
from zimage.formats.files import KINDS


@contextlib.contextmanager
def beside(path: Path, quick: bool = True) -> Iterator[Path]:
    """A free name in the folder of `path`, to write to and then to move; what is still there at the end is removed.

    An interrupt waits for the end of what is quick.
    """
    temporary = free_name(path)
    with interrupts.held() if quick else contextlib.nullcontext():
        try:
            yield temporary
        finally:
            with contextlib.suppress(OSError):  # mostly it has been moved; its folder may be gone
                remove(temporary)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system inside name a file: a failed write, as on a full disk, does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Put a text in the place of a file, whole and on the disk. Raises OSError that names the file."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same of bytes."""
    with naming(path), beside(path) as temporary:
        write_new(temporary, [content])
        os.replace(temporary, path)


def write_new(path: Path, contents: Iterable[bytes]) -> None:
    """Write a file that is not there yet, one content after the other; it is on the disk when this returns."""
    with path.open("xb") as file:
        file.writelines(contents)
        file.flush()
        os.fsync(file.fileno())


def extend(stream: FileIO, content: bytes) -> None:
    """Write at the end of an unbuffered file, all or nothing; it is on the disk when this returns. Raises OSError.

    A full disk takes a part at first, and tells only the next write.
    """
    end, rest = stream.seek(0, os.SEEK_END), memoryview(content)
    try:
        while rest:
            rest = rest[stream.write(rest) :]
        os.fsync(stream.fileno())
    except OSError:
        stream.truncate(end)
        raise


def settle(path: Path) -> None:
    """Have a file's content on the disk, also after a power cut. Raises OSError that names it."""
    with naming(path), path.open("rb+") as file:  # Windows wants it writable
        os.fsync(file.fileno())


def free_name(path: Path) -> Path:
    """A name in the folder of `path` that nobody can foresee, and so put a link under."""
    return path.with_name(f".{cut(path.stem, 40)}-{uuid.uuid4().hex}{cut(path.suffix, 16)}")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def take(temporary: Path, path: Path) -> None:
    """Give a finished file a free name; two at once never get the same. Raises FileExistsError, or OSError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: the check and the move are then two steps
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def destination(path: Path) -> Path:
    """Where a file of this name is written: itself, or what a symbolic link points to, so that the link stays.

    Raises RequestError where a folder, pipe or device stands, which a file should not replace.
    """
    try:
        real = Path(os.path.realpath(path)) if path.is_symlink() else path
        mode = os.stat(real).st_mode
    except FileNotFoundError:
        return real
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        raise RequestError(f"{path} is {KINDS.get(stat.S_IFMT(mode), 'something else')}; name a regular file")
    return real


def cut(name: str, limit: int) -> str:
    """The beginning of a name, as long as it has at most `limit` bytes in a file system."""
    return os.fsencode(name)[:limit].decode(errors="ignore")
