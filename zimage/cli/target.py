"""Where pictures go: names from patterns, checked before anything is rendered, never silently taken.

A picture that is rendered is saved: where its own place fails meanwhile, in the next best one.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage.cli import terminal
from zimage.cli.origin import Record
from zimage.cli.patterns import NAME_FIELDS, check_pattern, invalid
from zimage.errors import OutputError, RequestError, quoted
from zimage.settings.fields import Plain
from zimage.settings.paths import slug

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 255  # bytes of a name in the file systems in use
PIPED, STANDARD = "-", "standard output"  # as a name, and in words
NUMBER = 6  # bytes of them for the number that a taken name gets


class Target:
    """Where pictures go; checked before anything is rendered.

    Raises RequestError, and OutputError where a folder may not be written to.
    """

    def __init__(self, output: str | None, count: int):
        from zimage.pictures.files import file_format

        output = output if output is None else _path_text(output)
        folder_only = output is not None and os.path.isdir(output)
        if output is not None and not folder_only and output.endswith(("/", os.sep)):
            raise RequestError(f"output: the folder {quoted(output)} does not exist; create it first")
        self.pattern = "{prompt}-{seed}.png" if output is None or folder_only else Path(output).name
        self.folder = Path(output or ".") if output is None or folder_only else Path(output).parent
        # Only a name that the user wrote out in full, for a single picture, may replace a file.
        self.replaces = count == 1 and output is not None and not folder_only and "{" not in self.pattern
        check_pattern(self.pattern)
        path = self.folder / self._name(dict.fromkeys(NAME_FIELDS, 0) | {"prompt": "x"}, 0)
        file_format(path)
        check_output(path, "output", self.replaces)

    def check(self, records: Sequence[Record]) -> None:
        """Raise RequestError where one of these pictures could not get its name, or its format not hold it."""
        from zimage.pictures.files import check_savable

        for i, record in enumerate(records):
            request = record["request"]
            check_savable(self.folder / self._name(request, i), request["width"], request["height"])

    def save(self, image: "Image | bytes", metadata: Record, index: int) -> Path:
        """Save a picture where it belongs, else where it can be saved. Raises OutputError where that is nowhere."""
        from zimage.pictures.files import save

        path = self.folder / self._name(metadata["request"], index)
        if self.replaces and path.exists():
            terminal.note(f"replacing {path}")
        try:
            return save(image, path, metadata, self.replaces)
        except OSError as error:
            return _rescued(image, path, metadata, path.suffix, error.strerror or str(error))
        except ValueError as error:  # of the format, or of a name that something else has taken meanwhile
            return _rescued(image, path, metadata, ".png", str(error))

    def find(self, metadata: Record, index: int) -> Path | None:
        """The picture that an earlier run saved under these settings, where it did."""
        path = self.folder / self._name(metadata["request"], index)
        return path if holds(path, metadata) else None

    def _name(self, request: Record, index: int) -> str:
        """The name of a picture. It has at most LONGEST bytes, with room for a number; the prompt is cut for that."""
        values = {name: request[name] for name in NAME_FIELDS if name in request} | {"index": index + 1}
        room = LONGEST if self.replaces else LONGEST - NUMBER
        for words in _shorter(slug(request["prompt"])):
            name = self._formatted({**values, "prompt": words})
            if len(os.fsencode(name)) <= room:
                return name
        told = f"output: the name {name[:80]!r} has {len(os.fsencode(name))} bytes"
        raise RequestError(f"{told}; it may have {room}" + ("" if self.replaces else ", without a number"))

    def _formatted(self, values: dict[str, Plain]) -> str:
        try:
            name = self.pattern.format_map(values)
        except (KeyError, ValueError, IndexError, AttributeError, TypeError, OverflowError):
            raise invalid(self.pattern) from None
        if "/" in name or "\0" in name:
            raise invalid(self.pattern)
        return name


class Piped(Target):
    """Standard output, for one picture and nothing else. Raises RequestError where that is not what is asked for."""

    def __init__(self, count: int, as_json: bool, keeps_state: bool):
        self.pattern, self.folder, self.replaces = "{prompt}-{seed}.png", Path(), False  # where it cannot be written
        if count > 1:
            fault = f"{STANDARD} takes one picture, and {count} are asked for; name a folder or a pattern"
        elif as_json:
            fault = f"{STANDARD} gets the picture itself; name a file, or leave out --json"
        elif keeps_state:
            fault = "a state goes on with the pictures that are saved; name a file"
        elif not terminal.takes_files():
            fault = f"{STANDARD} is closed, or takes text only; name a file"
        elif terminal.is_terminal(sys.stdout):
            fault = f"{STANDARD} is a terminal; redirect it (-o - > cat.png), or name a file"
        else:
            return
        raise RequestError(f"output: {fault}")

    def check(self, records: Sequence[Record]) -> None:
        """A PNG holds every picture."""

    def save(self, image: "Image | bytes", metadata: Record, index: int) -> Path:
        """Write a PNG. Ends the command quietly where its reader has gone; raises OutputError where it cannot."""
        from zimage.pictures.files import encoded

        try:
            terminal.out_bytes(image if isinstance(image, bytes) else encoded(image, "PNG", metadata))
        except BrokenPipeError:
            raise click.exceptions.Exit(1) from None
        except OutputError as error:
            saved = super().save(image, metadata, index)
            raise OutputError(f"{error}; the picture is in {saved}") from error
        return Path(PIPED)

    def find(self, metadata: Record, index: int) -> None:
        """What was written cannot be read again."""


def check_output(path: Path, setting: str, replaces: bool = True) -> None:
    """Raise RequestError, or OutputError where the folder is closed, unless a file can be written there."""
    from zimage.formats.atomic import destination

    real = destination(path) if replaces else path
    folder, name = str(real.parent)[:200], real.name
    if not os.path.isdir(real.parent):
        raise RequestError(f"{setting}: the folder {folder!r} does not exist; create it first")
    if not os.access(real.parent, os.W_OK):
        raise OutputError(f"{setting}: the folder {folder!r} is not writable")
    if len(os.fsencode(name)) > LONGEST:
        raise RequestError(
            f"{setting}: the name {name[:80]!r} has {len(os.fsencode(name))} bytes; it may have {LONGEST}"
        )


def holds(path: Path, metadata: Record) -> bool:
    """Whether a picture with these settings lies there."""
    from zimage.pictures.files import read_metadata

    try:
        return path.is_file() and bool(read_metadata(path) == metadata)
    except (OSError, RequestError):  # something else has taken the name
        return False


def _rescued(image: "Image | bytes", path: Path, metadata: Record, ending: str, reason: str) -> Path:
    import tempfile

    from zimage.formats.atomic import cut
    from zimage.pictures.files import save

    for place in (os.getcwd, tempfile.gettempdir):
        try:
            saved = save(image, Path(place()) / (cut(path.stem, 80) + ending), metadata, replace=False)
        except (OSError, ValueError):
            continue
        terminal.note(f"warning: {path} cannot be written ({reason}); the picture is in {saved}")
        return saved
    raise OutputError(f"{path} cannot be written: {reason}; nor can the current folder and the temporary one")


def _path_text(output: str) -> str:
    try:
        os.fsencode(output)
    except ValueError:
        raise RequestError(f"output {output[:80]!r} is not a path") from None
    if "\0" in output:
        raise RequestError(f"output {output[:80]!r} is not a path")
    return output


def _shorter(words: str) -> Iterator[str]:
    """The words, then less and less of them."""
    for count in range(len(words), 0, -1):
        yield words[:count].rstrip("-_") or words[0]
