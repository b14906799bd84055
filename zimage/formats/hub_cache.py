"""Models in the cache of Hugging Face's hub: `models--OWNER--NAME/snapshots/REVISION`, with links into `blobs`."""

import itertools
import os
import re
from pathlib import Path

from zimage.errors import CheckpointError
from zimage.formats.files import read_file

FOLDER = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
LONGEST = 200  # bytes of a file that names a revision


def is_repository(name: str) -> bool:
    """Whether a text can be OWNER/NAME of a repository on the hub."""
    return REPOSITORY.fullmatch(name) is not None and ".." not in name


def snapshot(path: Path) -> Path:
    """The folder of a cached model's newest snapshot, that of `main` first; any other path as it is.

    Raises CheckpointError where a cached model has no snapshot.
    """
    if not FOLDER.fullmatch(path.absolute().name) or not os.path.isdir(path):
        return path
    main = path / "refs" / "main"
    if os.path.isfile(main):
        revision = read_file(main, LONGEST).decode("utf-8", "replace").strip()
        if re.fullmatch(r"\w[\w.-]*", revision) and os.path.isdir(path / "snapshots" / revision):
            return path / "snapshots" / revision
    found = [folder for folder in (path / "snapshots").glob("*") if os.path.isdir(folder)]
    if not found:
        raise CheckpointError(f"{path} is a model in the hub's cache without a snapshot; fetch it again")
    return max(found, key=lambda folder: (folder.stat().st_mtime_ns, folder.name))


def repository(path: Path) -> str | None:
    """OWNER/NAME of a cached model's snapshot or of what lies inside one; None for any other path."""
    parts = path.absolute().parts
    for folder, inner in itertools.pairwise(parts):
        match = FOLDER.fullmatch(folder)
        if match and inner == "snapshots":
            return f"{match['owner']}/{match['name']}"
    return None
