"""An animation of a grid's columns, one after the other: what differs between them moves, all else stands still."""

import io

from PIL import Image

from zimage.errors import RequestError
from zimage.experiments.layout import Grid
from zimage.experiments.sheet import MOST_SIDE, Style, drawn, measured
from zimage.experiments.showing import Showing

FORMATS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG", ".apng": "PNG"}
SECONDS, SHORTEST, LONGEST = 0.8, 0.05, 60.0  # of a frame
MOST_FRAMES = 100


def frames(grid: Grid, showing: Showing, style: Style) -> list[Image.Image]:
    """A sheet per column, all of one size. Raises RequestError where there is nothing to flip, or too much."""
    if not 2 <= len(grid.columns) <= MOST_FRAMES:
        raise RequestError(f"a flip needs 2 to {MOST_FRAMES} columns, and there are {len(grid.columns)}; see --columns")
    measures, rows = measured(grid, showing, style), range(len(grid.rows))
    if measures.size(1, len(rows))[1] > MOST_SIDE:
        raise RequestError(f"a flip of {len(rows)} rows is higher than {MOST_SIDE:,} pixels; pass fewer with --only")
    return [drawn(grid.part(rows, range(k, k + 1)), measures, showing, style) for k in range(len(grid.columns))]


def animated(pictures: list[Image.Image], ending: str, seconds: float = SECONDS) -> bytes:
    """The bytes of a file with one of the endings in FORMATS that shows each picture so long, for ever."""
    first, *others = pictures
    buffer, kind = io.BytesIO(), FORMATS[ending]
    more = {"lossless": True} if kind == "WEBP" else {"disposal": 1}
    first.save(buffer, kind, save_all=True, append_images=others, duration=round(seconds * 1000), loop=0, **more)
    return buffer.getvalue()
