"""A grid drawn as a picture: headings on both sides, pictures of one size, words that can be read.

page and note                       sizes in pixels; `Measures` holds them for all parts of a page, so that
        columns' axis               parts and the frames of an animation lie exactly over one another
rows'   heading   heading
axis    ┌───────┐ ┌───────┐
heading │ box   │ │       │
        └───────┘ └───────┘
        captions
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from zimage.errors import RequestError
from zimage.experiments.folder import shown
from zimage.experiments.layout import Grid, Heading, told
from zimage.experiments.lettering import Letters
from zimage.experiments.showing import Showing, Shown
from zimage.pictures.opening import opened

SMALLEST, USUAL, LARGEST = 128, 512, 2048  # px of a box's longer side: at least, at most by itself, at most
MOST_SIDE = 8192  # px of a sheet; a larger page is divided into several
SMALLEST_LETTERS, LETTERS_PER_BOX = 14, 24
MOST_LINES, MOST_TITLE_LINES = 4, 3
GUTTER = 220  # px that headings of rows may have at most, or as much as a box


@dataclass(frozen=True)
class Theme:
    """Colours. Greys are neutral, so that none beside a picture changes how it looks."""

    paper: str
    ink: str
    quiet: str
    well: str


THEMES = {
    "light": Theme("#ffffff", "#1d1d1f", "#6a6a70", "#ececea"),
    "dark": Theme("#161617", "#ececee", "#9a9aa2", "#26262a"),
}


@dataclass(frozen=True)
class Style:
    """`box` is the longer side of a picture on the sheet; by default its own, as far as the sheet then holds."""

    theme: str = "light"
    box: int | None = None
    font: str | None = None


@dataclass(frozen=True)
class Measures:
    """Of a page: letters, the box of a picture, and the space of what stands around the boxes."""

    letters: Letters
    box: tuple[int, int]
    gutter: int
    title: int
    heading: int
    captions: int

    @property
    def gap(self) -> int:
        return self.letters.size * 2 // 3

    @property
    def step(self) -> tuple[int, int]:
        """From one box to the next."""
        below = self.captions * self.letters.line + (self.gap if self.captions else 0)
        return self.box[0] + self.gap, self.box[1] + self.gap + below

    @property
    def origin(self) -> tuple[int, int]:
        """Where the first box stands."""
        left = 2 * self.gap + (self.gutter + self.gap if self.gutter else 0)
        return left, 2 * self.gap + (self.title + self.heading) * self.letters.line + self.gap

    def size(self, columns: int, rows: int) -> tuple[int, int]:
        """Of a sheet."""
        return self.origin[0] + columns * self.step[0] + self.gap, self.origin[1] + rows * self.step[1] + self.gap


def measured(grid: Grid, showing: Showing, style: Style) -> Measures:
    """Raises RequestError for a box that is too small or too large."""
    if style.box is not None and not SMALLEST // 2 <= style.box <= LARGEST:
        raise RequestError(f"cell {style.box} should be {SMALLEST // 2} to {LARGEST} pixels", fields=("cell",))
    largest = _largest(grid)
    side = style.box or min(max(*largest, SMALLEST), USUAL)
    measures = _measures(grid, showing, style, largest, side)
    while style.box is None and side > SMALLEST and max(measures.size(len(grid.columns), len(grid.rows))) > MOST_SIDE:
        side = max(SMALLEST, side * 3 // 4)
        measures = _measures(grid, showing, style, largest, side)
    return measures


def parts(grid: Grid, measures: Measures) -> Iterator[Grid]:
    """The page, or rows and columns of it that fit on a sheet."""
    wide, high = ((MOST_SIDE - o - measures.gap) // s for o, s in zip(measures.origin, measures.step, strict=True))
    for row in range(0, len(grid.rows), max(high, 1)):
        rows = range(row, min(row + max(high, 1), len(grid.rows)))
        for column in range(0, len(grid.columns), max(wide, 1)):
            yield grid.part(rows, range(column, min(column + max(wide, 1), len(grid.columns))))


def drawn(grid: Grid, measures: Measures, showing: Showing, style: Style) -> Image.Image:
    """One sheet."""
    theme, (left, top), (across, down) = THEMES[style.theme], measures.origin, measures.step
    size = measures.size(len(grid.columns), len(grid.rows))
    width = max(size[0], left + 2 * measures.box[0]) if measures.title else size[0]
    sheet = Image.new("RGB", (width, size[1]), theme.paper)
    pen = ImageDraw.Draw(sheet)
    _draw_headings(grid, measures, theme, pen, _title(grid, showing), width)
    for (row, column), cell in grid.places.items():
        _draw_cell(sheet, pen, (left + column * across, top + row * down), showing.of(cell), measures, theme)
    for row in range(len(grid.rows)):
        for column in range(len(grid.columns)):
            if (row, column) not in grid.places:
                place = left + column * across, top + row * down
                _draw_cell(sheet, pen, place, Shown(None, (), "no such cell"), measures, theme)
    return sheet


def _measures(grid: Grid, showing: Showing, style: Style, largest: tuple[int, int], side: int) -> Measures:
    letters = Letters(max(SMALLEST_LETTERS, side // LETTERS_PER_BOX), style.font)
    box = round(side * largest[0] / max(largest)), round(side * largest[1] / max(largest))
    labels = [_label(grid.axes.rows, row) for row in grid.rows] if grid.axes.rows else []
    texts = [text for label in labels for text in label]
    widest = max([letters.width(text) for text in [*texts, _name(grid.axes.rows)]], default=0)
    gutter = min(widest + 1, max(GUTTER, box[0])) if labels else 0
    lines = [len(_lines(letters, _label(grid.axes.columns, c), box[0], MOST_LINES)) for c in grid.columns]
    heading = (1 + max(lines) if grid.axes.columns else 0) or (1 if labels else 0)
    measures = Measures(letters, box, gutter, 0, heading, showing.lines)
    width = max(measures.size(len(grid.columns), 1)[0], measures.origin[0] + 2 * box[0]) - 4 * measures.gap
    title = _lines(letters, _title(grid, showing), width, MOST_TITLE_LINES)
    return replace(measures, title=len(title))


def _largest(grid: Grid) -> tuple[int, int]:
    """The size that holds every picture, of whatever shape."""
    sizes = [(1, 1)]
    for cell in grid.places.values():
        try:
            if cell.path is not None:
                with opened(cell.path) as picture:
                    sizes.append(picture.size)
        except RequestError:  # its own place will say so
            continue
    found = max(w for w, _ in sizes), max(h for _, h in sizes)
    return found if found != (1, 1) else (SMALLEST, SMALLEST)


def _title(grid: Grid, showing: Showing) -> list[str]:
    return [text for text in (told(grid.axes.pages, grid.page), showing.note) if text]


def _label(names: tuple[str, ...], heading: Heading) -> list[str]:
    """The value alone where one axis is named above all of them; else a text per axis."""
    if len(names) == 1:
        return [shown(heading[0])]
    return [told([name], (value,)) for name, value in zip(names, heading, strict=True)]


def _lines(letters: Letters, texts: list[str], width: int, most: int) -> list[str]:
    """Each text begins a line."""
    return [line for text in texts for line in letters.wrapped(text, width, most)]


def _name(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else ""


def _draw_headings(
    grid: Grid, measures: Measures, theme: Theme, pen: ImageDraw.ImageDraw, title: list[str], width: int
) -> None:
    letters, (left, top), edge = measures.letters, measures.origin, 2 * measures.gap
    lines = _lines(letters, title, width - 2 * edge, MOST_TITLE_LINES)
    letters.draw(pen, (edge, edge), lines, theme.ink)
    under = edge + measures.title * letters.line
    letters.draw(pen, (left, under), [_name(grid.axes.columns)], theme.quiet)
    letters.draw(pen, (edge, top - measures.gap - letters.line), [_name(grid.axes.rows)], theme.quiet)
    if grid.axes.columns:
        for number, column in enumerate(grid.columns):
            text = _lines(letters, _label(grid.axes.columns, column), measures.box[0], MOST_LINES)
            down = top - measures.gap - len(text) * letters.line
            letters.draw(pen, (left + number * measures.step[0], down), text, theme.ink)
    most = max(1, measures.box[1] // letters.line)
    for number, row in enumerate(grid.rows if grid.axes.rows else ()):
        label = _label(grid.axes.rows, row)
        text = _lines(letters, label, measures.gutter, max(1, most // len(label)))
        letters.draw(pen, (edge, top + number * measures.step[1]), text, theme.ink)


def _draw_cell(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], what: Shown, measures: Measures, theme: Theme
) -> None:
    (x, y), (width, height), letters = at, measures.box, measures.letters
    if what.picture is None:
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=theme.well)
        room = width - 2 * measures.gap, max(1, (height - 2 * measures.gap) // letters.line)
        text = letters.wrapped(what.fault, *room)
        letters.draw(pen, (x + measures.gap, y + measures.gap), text, theme.quiet)
    else:
        picture = fitted(what.picture, measures.box)
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
    lines = _lines(letters, list(what.captions), width, 1)
    letters.draw(pen, (x, y + height + measures.gap // 2), lines, theme.quiet)


def fitted(picture: Image.Image, box: tuple[int, int]) -> Image.Image:
    """As large as the box allows. What is enlarged keeps its pixels visible as squares."""
    scale = min(box[0] / picture.width, box[1] / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    if size == picture.size:
        return picture
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
