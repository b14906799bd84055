"""Sheets, animations and pages as files, each written whole or not at all.

One file has the name that was asked for; several are numbered: sheet-1.png, sheet-2.png …
"""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from zimage.errors import RequestError
from zimage.experiments import pagedata
from zimage.experiments.flip import FORMATS, LONGEST, SHORTEST, animated, frames
from zimage.experiments.folder import Experiment
from zimage.experiments.layout import Grid
from zimage.experiments.pages import standalone
from zimage.experiments.sheet import Style, drawn, measured, parts
from zimage.experiments.showing import Showing
from zimage.formats.atomic import destination, write_bytes, write_text
from zimage.pictures.files import encoded, file_format

INLINE, QUALITY = 1024, 90  # px of a picture's longer side in a page at most; of WebP


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
    if not SHORTEST <= seconds <= LONGEST:
        raise RequestError(f"seconds {seconds:g} should be {SHORTEST} to {LONGEST:g}", fields=("seconds",))
    if ending not in FORMATS:
        raise RequestError(f"a flip ends in one of {', '.join(FORMATS)}, not {path.name!r}", fields=("output",))
    return _written(path, len(grids), (animated(frames(grid, showing, style), ending, seconds) for grid in grids))


def write_page(path: Path, whole: Experiment, grids: Sequence[Grid], showing: Showing) -> list[Path]:
    """All pages as one file of HTML that holds its pictures. Returns where. Raises RequestError, OSError."""
    cells = {cell.id: cell for grid in grids for cell in grid.places.values()}
    grid = {**pagedata.described(whole, grids, grids[0].axes), "note": showing.note}
    shown = {id: showing.of(cell) for id, cell in cells.items()}
    for id, summary in grid["cells"].items():
        summary |= {"fault": shown[id].fault, "facts": [word for word in shown[id].captions if word]}
    pictures = {id: _inline(one.picture) for id, one in shown.items() if one.picture is not None}
    records = {id: pagedata.details(cell) for id, cell in cells.items()}
    html = standalone({"grid": grid, "records": records, "pictures": pictures, "ranks": pagedata.ranks(whole)})
    write_text(destination(path), html)
    return [path]


def _inline(picture: Image.Image) -> str:
    """As a data URL."""
    picture = picture.copy()
    picture.thumbnail((INLINE, INLINE))
    return "data:image/webp;base64," + base64.b64encode(encoded(picture, "WEBP", None, QUALITY)).decode()


def _written(path: Path, count: int, contents: Iterable[bytes]) -> list[Path]:
    """One at a time, so that memory holds one sheet. A link stays, and the file behind it is replaced."""
    paths = [path] if count == 1 else [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]
    for one, content in zip(paths, contents, strict=True):
        write_bytes(destination(one), content)
    return paths
