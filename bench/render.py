"""One whole cold render at full size: memory, and time from process start to picture, stage by stage."""

from pathlib import Path

import click

from bench.machine import drop_from_cache
from bench.options import DEVICE, DTYPE, FOLDER, JSON, PAIRS, PRECISION, SIZE, sides_of
from bench.pairs import alternate, report
from bench.weights import write_model, write_singles

PROMPT = "a cat face on a blue background"


@click.command()
@FOLDER
@click.option("--against", type=click.Choice(["diffusers", "sdcpp", "none"]), default="diffusers", show_default=True)
@PAIRS
@SIZE(256)
@DEVICE
@DTYPE
@PRECISION
@JSON
@click.option("--steps", default=3, show_default=True)
@click.option("--layers", type=int, help="Depth of both transformers, where the full depth does not fit.")
@click.option("--memory", type=float, help="Memory budget of our side in GB. Default: by the free memory.")
@click.option("--warm", is_flag=True, help="Leave the files in the page cache.")
@click.option(
    "--sdcpp", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="sd-cli, for --against sdcpp."
)
def render(
    folder: Path,
    against: str,
    pairs: int,
    size: int,
    device: str,
    dtype: str,
    precision: str,
    as_json: bool,
    steps: int,
    layers: int | None,
    memory: float | None,
    warm: bool,
    sdcpp: Path | None,
) -> None:
    """Render a picture, cold: each run is a process of its own, and files are dropped from the page cache before it.

    An empty FOLDER is filled with random weights (20.5 GB at full depth). stable-diffusion.cpp reads them from single
    files, which take as much space again.
    """
    if (against == "sdcpp") != (sdcpp is not None):
        raise click.UsageError("--against sdcpp and --sdcpp BINARY go together")
    write_model(folder, layers)
    arguments = {"folder": str(folder), "size": size, "steps": steps, "dtype": dtype, "prompt": PROMPT}
    files = write_singles(folder) if sdcpp else {}
    theirs = {"binary": str(sdcpp.absolute()), "files": files} if sdcpp else {}
    theirs = theirs or {"device": device}  # stable-diffusion.cpp runs on what it was built for
    sides = sides_of(against, arguments, {"precision": precision, "memory": memory, "device": device}, theirs)
    folders = {folder, *(Path(file).parent for file in files.values())}
    runs = alternate(sides, "render", pairs, before=lambda: None if warm else drop_from_cache(*folders))
    report(
        runs,
        {**arguments, "folder": None, "layers": layers, "memory": memory, "device": device, "cold": not warm},
        as_json,
    )
