"""Sheets, animations and pages as files, each written whole or not at all.

One file has the name that was asked for; several are numbered: sheet-1.png, sheet-2.png …
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from zimage.errors import RequestError
from zimage.experiments.flip import FORMATS, animated, frames
from zimage.experiments.layout import Grid
from zimage.experiments.sheet import Style, drawn, measured, parts
from zimage.experiments.showing import Showing
from zimage.formats.atomic import destination, write_bytes
from zimage.pictures.files import encoded, file_format


def write_sheets(path: Path, grids: Sequence[Grid], showing: Showing, style: Style) -> list[Path]:
    """A sheet per page, or several of a page that does not fit on one. Returns where. Raises RequestError, OSError."""
    kind = file_format(path)
    pages = [(grid, measured(grid, showing, style)) for grid in grids]
    cut = [(part, measures) for grid, measures in pages for part in parts(grid, measures)]
    pictures = (encoded(drawn(part, measures, showing, style), kind, None) for part, measures in cut)
    return _written(path, len(cut), pictures)


def write_flip(path: Path, grids: Sequence[Grid], showing: Showing, style: Style, seconds: float) -> list[Path]:
    """An animation per page. Returns where. Raises RequestError, OSError."""
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise RequestError(f"a flip ends in one of {', '.join(FORMATS)}, not {path.name!r}", fields=("output",))
    return _written(path, len(grids), (animated(frames(grid, showing, style), ending, seconds) for grid in grids))


def _written(path: Path, count: int, contents: Iterable[bytes]) -> list[Path]:
    """One at a time, so that memory holds one sheet. A link stays, and the file behind it is replaced."""
    paths = [path] if count == 1 else [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]
    for one, content in zip(paths, contents, strict=True):
        write_bytes(destination(one), content)
    return paths
