"""Where pictures go: names from patterns, checked before anything is rendered, never silently taken."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage.cli.origin import Record
from zimage.cli.patterns import NAME_FIELDS, check_pattern, invalid
from zimage.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image


class Target:
    """Where pictures go; checked before anything is rendered."""

    def __init__(self, output: str | None, count: int):
        folder_only = output is not None and os.path.isdir(output)
        self.pattern = "{prompt}-{seed}.png" if output is None or folder_only else Path(output).name
        self.folder = Path(output or ".") if output is None or folder_only else Path(output).parent
        # Only a name that the user wrote out in full, for a single picture, may replace a file.
        self.replaces = count == 1 and output is not None and not folder_only and "{" not in self.pattern
        self._check()

    def save(self, image: "Image", metadata: Record, index: int) -> Path:
        from zimage.pictures.files import save

        path = self.folder / self._name(metadata["request"], index)
        if self.replaces and path.exists():
            click.echo(f"replacing {path}", err=True)
        return save(image, path, metadata, self.replaces)

    def find(self, metadata: Record, index: int) -> Path | None:
        """The picture that an earlier run saved under these settings, where it did."""
        from zimage.pictures.files import read_metadata

        path = self.folder / self._name(metadata["request"], index)
        try:
            return path if path.is_file() and read_metadata(path) == metadata else None
        except RequestError:  # something else has taken the name
            return None

    def _check(self) -> None:
        from zimage.pictures.files import file_format

        check_pattern(self.pattern)
        path = self.folder / self._name(dict.fromkeys(NAME_FIELDS, 0) | {"prompt": "x"}, 0)
        file_format(path)
        if not self.folder.is_dir():
            raise RequestError(f"output: the folder {str(self.folder)!r} does not exist; create it first")
        if not os.access(self.folder, os.W_OK):
            raise RequestError(f"output: the folder {str(self.folder)!r} is not writable")
        if self.replaces and os.path.isdir(path):
            raise RequestError(f"output: {str(path)!r} is a folder")

    def _name(self, request: Record, index: int) -> str:
        values = {name: request[name] for name in NAME_FIELDS if name in request}
        values |= {"index": index + 1, "prompt": _slug(request["prompt"])}
        try:
            return self.pattern.format_map(values)
        except (KeyError, ValueError, IndexError, AttributeError, TypeError):
            raise invalid(self.pattern) from None


def _slug(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:60].rstrip("-_") or "image"
