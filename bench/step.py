"""One warm evaluation of the DiT."""

from pathlib import Path

import click

from bench.options import AGAINST, DEVICE, DTYPE, FOLDER, JSON, PAIRS, PRECISION, SIZE, sides_of
from bench.pairs import alternate, report
from bench.weights import SMALL_TRANSFORMER, TRANSFORMER, write_component


@click.command()
@FOLDER
@AGAINST
@PAIRS
@SIZE(256)
@DEVICE
@DTYPE
@PRECISION
@JSON
@click.option("--tokens", default=32, show_default=True, help="Caption tokens.")
@click.option("--repeats", default=3, show_default=True, help="Timed steps per run, after two that are not timed.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the blocks of our DiT.")
@click.option("--small", is_flag=True, help="Width 512 and 8 blocks instead of the published sizes.")
def step(
    folder: Path,
    against: str,
    pairs: int,
    size: int,
    device: str,
    dtype: str,
    precision: str,
    as_json: bool,
    tokens: int,
    repeats: int,
    compiled: bool,
    small: bool,
) -> None:
    """Evaluate the DiT; random weights (12.3 GB, or 0.1 GB with --small) are written to FOLDER if it has none."""
    write_component(folder, "transformer", SMALL_TRANSFORMER if small else TRANSFORMER)
    arguments = {
        "folder": str(folder),
        "size": size,
        "tokens": tokens,
        "dtype": dtype,
        "repeats": repeats,
        "device": device,
    }
    ours = {"precision": precision, "compiled": compiled}
    runs = alternate(sides_of(against, arguments, ours), "step", pairs)
    report(runs, {**arguments, **ours, "folder": None, "small": small}, as_json)
