"""What a request comes with, in its place: uploads as kept files, names as files of the server's folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from zimage.serve.asking import CONTROL, LORA, Asked
from zimage.serve.conditions import MODEL, PICTURE
from zimage.serve.refusals import TooLarge
from zimage.serve.shelf import CONTROL_ENDINGS, LORA_ENDINGS, pick
from zimage.serve.uploads import Upload, Uploads
from zimage.settings.fields import Plain
from zimage.settings.loading import split_scale


class Shelves(Protocol):
    """The files that requests may name."""

    async def loras(self) -> dict[str, Path]: ...

    async def controls(self) -> dict[str, Path]: ...


@dataclass
class Attached:
    """`values` are attachments and lists of a request by their paths, `lora` as a worker takes them (None: none).

    `places` tell which field a path came in, `hashes` are the uploads that have to stay while the job needs them.
    """

    values: dict[str, Plain] = field(default_factory=dict)
    lora: list[dict[str, Plain]] | None = None
    places: dict[str, str] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)

    def keep(self, name: str, upload: Upload) -> str:
        """The path of an upload, which is noted."""
        self.places[str(upload.path)] = name
        self.hashes.append(upload.hash)
        return str(upload.path)

    def take(self, name: str, path: Path) -> str:
        """The path of a file of the server's own, which is noted."""
        self.places[str(path)] = name
        return str(path)


async def attached(asked: Asked, uploads: Uploads, shelves: Shelves) -> Attached:
    """Raises RequestError or TooLarge with the field's name, NoRoom, or OutputError."""
    found = Attached()
    for name, content in asked.attachments.items():
        found.values[name] = found.keep(name, await uploads.keep(name, content))
    for name, some in asked.conditions.items():
        kept = [await uploads.keep(name, piece.picture) for piece in some]
        _check_together(name, kept, uploads.most_pixels)
        pairs = zip(some, kept, strict=True)
        found.values[name] = [{**piece.values, PICTURE: found.keep(name, upload)} for piece, upload in pairs]
    if CONTROL in found.values:
        known = await shelves.controls()
        for entry in found.values[CONTROL]:
            path = pick(CONTROL, entry[MODEL], known, CONTROL_ENDINGS)
            entry[MODEL] = found.take(CONTROL, path)
    if asked.lora:
        known = await shelves.loras()
        found.lora = [_lora(found, text, known) for text in asked.lora]
    return found


def _check_together(name: str, kept: Sequence[Upload], most: int) -> None:
    """Raise TooLarge where a list's pictures are as many pixels as no single one may be: all are decoded at once."""
    if (pixels := sum(upload.pixels for upload in kept)) > most:
        text = f"{name}: its pictures are {pixels:,} pixels together; at most {most:,} are decoded"
        raise TooLarge(text, fields=(name,))


def _lora(found: Attached, text: str, known: Mapping[str, Path]) -> dict[str, Plain]:
    name, scale = split_scale(text)
    path = pick(LORA, name, known, LORA_ENDINGS)
    return {"name": path.name, "scale": scale, "path": found.take(LORA, path)}
