"""What is on record about weight files: the project's list of published ones, and what a fetch verified.

`manifest.json` lists the published files and what is known about each; null means unknown, and nothing is a guess.
A fetch leaves `.zimage-manifest.json` beside the files with the sizes and hashes that it verified.
"""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage.errors import CheckpointError
from zimage.formats.atomic import beside, naming
from zimage.formats.files import require_inside
from zimage.formats.json_text import read_json

KNOWN = Path(__file__).parent / "manifest.json"
RECORD = ".zimage-manifest.json"
CHUNK = 4 << 20
LARGEST_BLOB = 64 << 20  # bytes of a file that git itself may hold; hubs keep those over 10 MB elsewhere
SHA256, BLOB = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
LARGEST = 50 * 10**9  # bytes of a file: the most that hubs send in one piece
# Only these files are fetched or stand in a record, whatever lists them: no pickles, and nothing outside the folder.
NEEDED = re.compile(
    r"model_index\.json|(scheduler/N\.json|tokenizer/N\.(json|txt|jinja)"
    r"|(text_encoder|transformer|vae)/N\.(json|safetensors))".replace("N", r"\w[\w.-]{0,150}"),
    re.ASCII,
)

Progress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class KnownFile:
    """A published file, or its shards where the path holds `*`; None means unknown."""

    repository: str | None
    path: str
    role: str
    layout: str | None
    dtype: str | None
    tensors: int | None
    parameters: int | None
    size: int | None
    sha256: str | None


def known_files() -> list[KnownFile]:
    """The project's list of published files."""
    return [KnownFile(**entry) for entry in read_json(KNOWN)["files"]]


def find_known(path: str, repository: str | None = None) -> KnownFile | None:
    """The entry of a path in a repository or, without a repository, of a single file by its name."""
    for known in known_files():
        if known.repository == repository and fnmatch.fnmatchcase(path, known.path):
            return known
    return None


@dataclass
class Record:
    """What a fetch verified: path below the folder → size and sha256, each fit to be used (see `read_record`)."""

    folder: Path
    repository: str
    revision: str
    files: dict[str, dict[str, Any]]

    def write(self) -> None:
        """Replace the record in one step, so that an interruption leaves the old one or the new one."""
        content = {"repository": self.repository, "revision": self.revision, "files": self.files}
        with naming(self.folder / RECORD), beside(self.folder / RECORD) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.folder / RECORD)


def is_needed(path: object) -> bool:
    """Whether something is the path, below a model's folder, of a file that a render needs."""
    return isinstance(path, str) and NEEDED.fullmatch(path) is not None


def is_size(size: object) -> bool:
    """Whether something can be the size of such a file."""
    return type(size) is int and 0 <= size <= LARGEST


def read_record(folder: Path) -> Record | None:
    """The record in a folder, if a fetch left one. Raises CheckpointError where it is not as a fetch leaves it.

    Whoever packed the folder may have written it: each of its words is checked, above all the paths.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    require_inside(folder, path)
    content = read_json(path)
    repository, revision, files = (content.get(name) for name in ("repository", "revision", "files"))
    if not (isinstance(repository, str) and isinstance(revision, str) and isinstance(files, dict)):
        raise CheckpointError(f"{path} is damaged; remove it and fetch again")
    wrong = next((name for name, about in files.items() if not _is_entry(name, about)), None)
    if wrong is not None:
        raise CheckpointError(
            f"{path} lists {wrong[:80]!r} in a form that a fetch never writes; remove it and fetch again"
        )
    files = {name: {"size": about["size"], "sha256": about["sha256"]} for name, about in files.items()}
    return Record(folder, repository, revision, files)


def _is_entry(path: str, about: object) -> bool:
    if not is_needed(path) or not isinstance(about, dict):
        return False
    sha256 = about.get("sha256")
    return is_size(about.get("size")) and isinstance(sha256, str) and SHA256.fullmatch(sha256) is not None


def find_record(path: Path) -> Record | None:
    """The record of the model folder that `path` is or lies in."""
    for folder in (path, *path.absolute().parents[:2]):
        record = read_record(folder)
        if record is not None:
            return record
    return None


@dataclass(frozen=True)
class Hashes:
    """Hashes of a file's whole content: sha256, and the one by which git knows the file."""

    sha256: str
    blob: str


def hash_file(path: Path, progress: Progress = silent) -> Hashes:
    """Hash a file, which is read once, in pieces."""
    size, done = path.stat().st_size, 0
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            sha256.update(chunk)
            if size <= LARGEST_BLOB:  # large files have a sha256
                blob.update(chunk)
            done += len(chunk)
            progress(f"hashing {path.name}", done, size)
    return Hashes(sha256.hexdigest(), blob.hexdigest())
