"""The folder of a history: pictures, their thumbnails, and the trash that deleted ones wait in.

A picture is `pictures/ID.png`. Its id is the name of its file, and the only thing of it that ever comes from a request:
a pattern keeps it from naming anything else. What a picture is, its own metadata says.
"""

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from zimage.errors import RequestError
from zimage.formats.atomic import beside
from zimage.pictures.files import read_metadata
from zimage.pictures.image import open_image
from zimage.pictures.opening import opened
from zimage.serve.database import storing
from zimage.serve.refusals import NotFound

log = logging.getLogger("zimage")

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
OF_JOB = re.compile(r"(\d{8}-\d{6}-[0-9a-f]+)-\d+", re.ASCII)  # the ids of a job's pictures
TEMPORARY = re.compile(r"\..*-[0-9a-f]{32}(\.\w+)?")  # `atomic.free_name`
THUMBNAIL = 320  # px of the longer side
LATEST = (1 << 63) - 1  # what SQLite's integers hold
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Picture:
    """A picture of the history. `created` is in nanoseconds since 1970, `settings` the PNG's own metadata."""

    id: str
    job: str
    created: int
    bytes: int
    width: int
    height: int
    settings: dict[str, Any]

    @property
    def prompt(self) -> str:
        prompt: str = self.settings["request"]["prompt"]
        return prompt

    @property
    def seed(self) -> int:
        seed: int = self.settings["request"]["seed"]
        return seed

    def plain(self) -> dict[str, Any]:
        """As the server's answers hold it."""
        url = f"/api/images/{self.id}"
        return {
            "id": self.id,
            "job": self.job,
            "url": url,
            "thumbnail": f"{url}/thumbnail",
            "width": self.width,
            "height": self.height,
            "seed": self.seed,
            "prompt": self.prompt,
            "created": self.created / 1e9,
            "bytes": self.bytes,
            "settings": self.settings,
        }


class Seen(NamedTuple):
    """A picture's file as the system lists it."""

    bytes: int
    created: int
    trashed: bool


class PictureFiles:
    """Every method that takes an id raises NotFound for what cannot be one."""

    def __init__(self, folder: Path):
        self.pictures, self.thumbnails, self.trash = (folder / n for n in ("pictures", "thumbnails", "trash"))
        for place in (self.pictures, self.thumbnails, self.trash):
            with storing(place):
                place.mkdir(parents=True, exist_ok=True)

    def path(self, id: str) -> Path:
        return self.pictures / f"{checked(id)}.png"

    def in_trash(self, id: str) -> Path:
        return self.trash / f"{checked(id)}.png"

    def take_in(self, path: Path, id: str) -> None:
        """Give a finished file its place, and have it on the disk before anything is said of it."""
        home = self.path(id)
        with storing(home):
            if path != home:
                os.replace(path, home)
            for written in (home, self.pictures):
                _sync(written)

    def throw_away(self, id: str) -> bool:
        """Move a picture to the trash; whether it was there."""
        return _move(self.path(id), self.in_trash(id))

    def bring_back(self, id: str) -> bool:
        """Move a picture out of the trash; whether it was there, and its name free."""
        return not os.path.lexists(self.path(id)) and _move(self.in_trash(id), self.path(id))

    def purge(self, id: str) -> None:
        """Remove a picture that is in the trash, and its thumbnail."""
        for path in (self.in_trash(id), self._thumbnail(id)):
            with storing(path):
                path.unlink(missing_ok=True)

    def read(self, id: str, job: str = "", trashed: bool = False) -> Picture:
        """A picture with its metadata. Raises RequestError where it is damaged or not one of ours."""
        path = self.in_trash(id) if trashed else self.path(id)
        settings = _settings(path)
        with opened(path) as image, path.open("rb") as file:
            if image.format != "PNG" or not _is_whole(file):
                raise RequestError(f"{path} is not a whole PNG file; save it anew")
            size, stat = image.size, os.fstat(file.fileno())
        found = OF_JOB.fullmatch(id)
        created = min(stat.st_mtime_ns, LATEST)
        return Picture(id, job or (found[1] if found else ""), created, stat.st_size, *size, settings)

    def seen(self) -> tuple[dict[str, Seen], list[str]]:
        """Every picture by its id, and remarks on other files. Of two of one id the one in the trash is removed."""
        found, remarks = dict[str, Seen](), list[str]()
        for place in (self.trash, self.pictures):
            for entry in _entries(place):
                id, ending = os.path.splitext(entry.name)
                if ending != ".png" or not ID.fullmatch(id) or not entry.is_file(follow_symlinks=False):
                    remarks.append(f"{entry.path} is left alone: it is not a file LETTERS-DIGITS_AND.DOTS.png")
                    continue
                if id in found:
                    self.in_trash(id).unlink()
                stat = entry.stat()
                found[id] = Seen(stat.st_size, min(stat.st_mtime_ns, LATEST), place is self.trash)
        return found, remarks

    def remove_leftovers(self, ids: set[str]) -> None:
        """Remove what interrupted writes left, and thumbnails of pictures that are not among `ids`."""
        for place in (self.pictures, self.thumbnails):
            with os.scandir(place) as entries:
                names = [entry.name for entry in entries]
            for name in names:
                alone = place is self.thumbnails and os.path.splitext(name)[0] not in ids
                if alone or TEMPORARY.fullmatch(name):
                    (place / name).unlink(missing_ok=True)

    def thumbnail(self, id: str) -> bytes:
        """A picture in WebP, its longer side at most 320 px; kept in a file beside the others.

        Raises NotFound where the picture is gone or damaged.
        """
        path, kept = self.path(id), self._thumbnail(id)
        try:
            if kept.stat().st_mtime_ns >= path.stat().st_mtime_ns:
                return kept.read_bytes()
        except FileNotFoundError:
            pass  # it is made now
        drawn = _drawn(path)
        try:
            with beside(kept) as temporary:
                temporary.write_bytes(drawn)
                os.replace(temporary, kept)
        except OSError as error:
            log.warning("the thumbnail of %s cannot be kept: %s", id, error.strerror)
        return drawn

    def _thumbnail(self, id: str) -> Path:
        return self.thumbnails / f"{checked(id)}.webp"


def checked(id: str) -> str:
    """An id that can be one. Raises NotFound."""
    if not ID.fullmatch(id):
        raise NotFound("there is no picture of this id: ids are letters, digits, '-', '_' and '.'")
    return id


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _move(source: Path, target: Path) -> bool:
    with storing(target):
        try:
            os.replace(source, target)
        except FileNotFoundError:
            return False
    return True


def _entries(place: Path) -> Iterator[os.DirEntry[str]]:
    """What lies there but for names that begin with a dot."""
    with storing(place), os.scandir(place) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _settings(path: Path) -> dict[str, Any]:
    """The metadata as any client can take it: text that UTF-8 can hold, numbers that JSON has."""
    record = read_metadata(path)
    prompt, seed = (record["request"].get(name) for name in ("prompt", "seed"))
    if not isinstance(prompt, str) or not isinstance(seed, int):
        raise RequestError(f"{path}: its settings lack a prompt or a seed; pass a picture as it was saved")
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise RequestError(f"{path}: its settings hold NaN or Infinity; pass a picture as it was saved") from None
    settings: dict[str, Any] = json.loads(text.encode("utf-8", "replace"))
    return settings


def _is_whole(file: io.BufferedReader) -> bool:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - len(PNG_END)))
    return file.read() == PNG_END


def _drawn(path: Path) -> bytes:
    try:
        small = open_image(path)
    except RequestError as error:
        raise NotFound(f"picture {path.stem} cannot be shown: {error}") from error
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=80)
    return stream.getvalue()
