"""One warm evaluation of the DiT, also with a ControlNet beside it."""

from pathlib import Path

import click

from bench.options import AGAINST, DEVICE, DTYPE, FOLDER, JSON, PAIRS, PRECISION, SIZE, sides_of
from bench.pairs import alternate, report
from bench.weights import CONTROLS, SMALL_TRANSFORMER, TRANSFORMER, control_config, write_component


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
@click.option("--layers", type=int, help="Joint layers. Default: as published, 30.")
@click.option(
    "--control",
    type=click.Choice(list(CONTROLS)),
    help="Beside our plain step, in place of a peer's, one with a ControlNet of this form.",
)
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
    layers: int | None,
    control: str | None,
) -> None:
    """Evaluate the DiT; random weights (12.3 GB, or 0.1 GB with --small) are written to FOLDER if it has none."""
    config = SMALL_TRANSFORMER if small else TRANSFORMER
    config = {**config, "n_layers": layers or config["n_layers"]}
    write_component(folder, "transformer", config)
    arguments = {
        "folder": str(folder),
        "size": size,
        "tokens": tokens,
        "dtype": dtype,
        "repeats": repeats,
        "device": device,
    }
    ours = {"precision": precision, "compiled": compiled}
    sides = sides_of(against, arguments, ours)
    if control:
        write_component(folder, "controlnet", control_config(control, config))
        plain = arguments | ours
        sides = {"zimage+control": {**plain, "controlled": True}, "zimage": plain}
    runs = alternate(sides, "step", pairs)
    settings = {"folder": None, "small": small, "layers": config["n_layers"], "control": control}
    report(runs, {**arguments, **ours, **settings}, as_json)
