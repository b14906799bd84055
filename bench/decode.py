"""Decoding alone: warm time, and memory above what the imports take."""

from pathlib import Path

import click

from bench.options import AGAINST, DEVICE, DTYPE, FOLDER, JSON, PAIRS, SIZE, sides_of
from bench.pairs import alternate, report
from bench.weights import write_component


@click.command()
@FOLDER
@AGAINST
@PAIRS
@SIZE(1024)
@DEVICE
@DTYPE
@JSON
@click.option("--repeats", default=2, show_default=True, help="Timed decodes per run, after one that is not timed.")
@click.option("--tile-mode", default="exact", type=click.Choice(["exact", "blend", "off"]), show_default=True)
@click.option("--tile-size", type=int, help="Height of a strip, or side of a tile, in pixels.")
def decode(
    folder: Path,
    against: str,
    pairs: int,
    size: int,
    device: str,
    dtype: str,
    as_json: bool,
    repeats: int,
    tile_mode: str,
    tile_size: int | None,
) -> None:
    """Decode one picture with the full-size VAE; random weights (0.17 GB) are written to FOLDER if it has none."""
    write_component(folder, "vae")
    arguments = {"folder": str(folder), "size": size, "dtype": dtype, "repeats": repeats, "device": device}
    tiles = {"tile_mode": tile_mode, "tile_size": tile_size}
    runs = alternate(sides_of(against, arguments, tiles), "decode", pairs)
    report(runs, {**arguments, **tiles, "folder": None}, as_json)
