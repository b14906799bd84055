"""`view`: a page on the cells of a sweep."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage.cli import terminal
from zimage.cli.options import PATH, PlainCommand
from zimage.cli.progress import counted
from zimage.cli.serve import need_packages
from zimage.settings.serving import HOST, TOKEN, ServeSettings

if TYPE_CHECKING:
    from zimage.experiments.viewer import Viewer


OTHERS = "any other than this computer's own needs a token."


@click.command(cls=PlainCommand)
@click.argument("folder", type=PATH)
@click.option("--host", default=HOST, help=f"Address to listen on; {OTHERS} Default: {HOST}.")
@click.option("--port", type=int, default=0, metavar="INT", help="Port to listen on. Default: a free one, printed.")
@click.option("--token-file", metavar="FILE", help=f"File with the token that clients must send. Default: {TOKEN}.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="Name of a proxy before the viewer; repeatable.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the address, warnings and errors.")
def view(folder: Path, host: str, port: int, token_file: str | None, allow_host: tuple[str, ...], quiet: bool) -> None:
    """Look at the cells of a sweep's FOLDER in a browser.

    The page shows them as a grid, in full, under a slider and as differences; it takes blind votes, which are kept in
    the folder, and renders a cell again to see whether the bits are the same. Ctrl-C stops it.
    """
    logging.getLogger("zimage").setLevel(logging.WARNING if quiet else logging.INFO)
    values = {"host": host, "port": port, "token_file": token_file, "allow_host": list(allow_host) or None}
    serving = ServeSettings.from_mapping(values)
    need_packages("a viewer")
    from zimage.experiments import viewer

    viewer.run(folder, serving, lambda url, shown: _introduce(url, shown, quiet))


def _introduce(url: str, viewer: "Viewer", quiet: bool) -> None:
    """The address on standard output, as `serve` has it."""
    if not quiet:
        votes = counted(len(viewer.ballot.votes), "vote")
        terminal.note(f"{counted(len(viewer.experiment.cells), 'cell')}, {votes}; Ctrl-C stops the viewer")
    terminal.out(url)
