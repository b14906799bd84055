"""`compare`: the cells of a sweep side by side, as sheets, as one page, or as an animation."""

from pathlib import Path

import click
from click.core import ParameterSource

from zimage.cli import terminal
from zimage.cli.options import PATH, PlainCommand
from zimage.errors import RequestError

AXIS, VALUE = "AXIS", "AXIS=VALUE"
DIFFERENCES = ("absolute", "highlight", "heatmap")
GAINED = ("absolute", "heatmap")  # of them, those that a gain makes stronger
OF_PICTURES = ("flip", "seconds", "cell", "theme", "font")
SHEET = "sheet.png"
HTML, ENDINGS = ".html", "File: .png, .jpg, .webp, .avif or .html; with --flip .webp, .gif or .png."


@click.command(cls=PlainCommand)
@click.argument("folder", type=PATH)
@click.option("-o", "--output", type=PATH, help=f"{ENDINGS} Default: {SHEET} in the folder.")
@click.option("--columns", multiple=True, metavar=AXIS, help="What varies from left to right. Default: the first axis.")
@click.option("--rows", multiple=True, metavar=AXIS, help="What varies from top to bottom. Default: the second axis.")
@click.option("--pages", multiple=True, metavar=AXIS, help="What varies from page to page. Default: the other axes.")
@click.option("--only", multiple=True, metavar=VALUE, help="Show these cells only; repeat it for several values.")
@click.option("--side-by-side", nargs=2, metavar="A B", help="Show two cells (ids), or two values (AXIS=VALUE).")
@click.option("--diff", type=click.Choice(DIFFERENCES), help="Show differences from --base instead of pictures.")
@click.option("--base", metavar=f"CELL|{VALUE}", help="What cells are compared with. Default: A of --side-by-side.")
@click.option("--gain", type=float, default=4.0, metavar="FLOAT", help="Factor of differences. Default: 4.")
@click.option("--score", multiple=True, metavar="NAME", help="Write this score below each picture.")
@click.option("--flip", is_flag=True, help="Make an animation that flips through the columns (.webp, .gif, .png).")
@click.option("--seconds", type=float, default=0.8, metavar="FLOAT", help="Time of a frame. Default: 0.8.")
@click.option("--cell", type=int, metavar="PX", help="Longer side of a picture on the sheet. Default: up to 512.")
@click.option("--theme", type=click.Choice(("light", "dark")), default="light", help="Colours of pictures' sheets.")
@click.option(
    "--font", type=PATH, metavar="FILE", help="Font of the labels. Default: one of the system that has the characters."
)
def compare(
    folder: Path,
    output: Path | None,
    columns: tuple[str, ...],
    rows: tuple[str, ...],
    pages: tuple[str, ...],
    only: tuple[str, ...],
    side_by_side: tuple[str, str] | None,
    diff: str | None,
    base: str | None,
    gain: float,
    score: tuple[str, ...],
    flip: bool,
    seconds: float,
    cell: int | None,
    theme: str,
    font: Path | None,
) -> None:
    """Put the cells of a sweep's FOLDER side by side.

    Their values are the headings. An axis is a setting that the sweep varied, or prompt, or seed. Without options the
    first axis that varies becomes the columns, the second the rows, and each combination of the others a page.
    """
    from zimage.experiments.difference import kind_of
    from zimage.experiments.folder import Experiment
    from zimage.experiments.layout import arranged, placed
    from zimage.experiments.sheet import Style
    from zimage.experiments.showing import Showing
    from zimage.experiments.writing import write_flip, write_page, write_sheets
    from zimage.formats.files import require_inside

    _check_effect(output is not None and output.suffix.lower() == HTML, flip, diff)
    if output is None:
        output = folder / SHEET
        require_inside(folder, output)  # which may have come from anybody, with links in it
    whole = Experiment.open(folder)
    experiment = whole.only(only)
    if side_by_side:
        experiment, own_base, apart = experiment.pair(*side_by_side)
        base, columns = base or (own_base if diff else None), columns or apart
    showing = Showing(whole, kind_of(diff) if diff else None, base or "", gain, score)
    grids = arranged(experiment, placed(experiment, columns, rows, pages))
    style = Style(theme, cell, None if font is None else str(font))
    if output.suffix.lower() == HTML:
        written = write_page(output, whole, grids, showing)
    elif flip:
        written = write_flip(output, grids, showing, style, seconds)
    else:
        written = write_sheets(output, grids, showing, style)
    for path in written:
        terminal.saved(str(path))


def _check_effect(page: bool, flip: bool, diff: str | None) -> None:
    """Raise RequestError for an option that would change nothing beside the others."""
    context = click.get_current_context()
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    useless = dict.fromkeys(OF_PICTURES if page else (), f"on a page ({HTML})")
    if not page and not flip:
        useless["seconds"] = "without --flip"
    if diff not in GAINED:
        useless["gain"] = f"without --diff {' or '.join(GAINED)}"
    for name in given:
        if name in useless:
            raise RequestError(f"{name}: it has no effect {useless[name]}; leave it out", fields=(name,))
