"""One whole render at full size, cold: memory and time from process start to picture, stage by stage."""

from pathlib import Path

import click

from bench.machine import drop_from_cache
from bench.options import DTYPE, FOLDER, JSON, PAIRS, PRECISION, SIZE, sides_of
from bench.pairs import alternate, report
from bench.weights import write_model, write_singles

PROMPT = "a cat face on a blue background"


@click.command()
@FOLDER
@click.option("--against", type=click.Choice(["diffusers", "sdcpp", "none"]), default="diffusers", show_default=True)
@PAIRS
@SIZE(256)
@DTYPE
@PRECISION
@JSON
@click.option("--steps", default=3, show_default=True)
@click.option("--layers", type=int, help="Depth of both transformers, where full size does not fit.")
@click.option("--memory", type=float, help="Our side's budget in GB. Default: by the free memory.")
@click.option("--warm", is_flag=True, help="Do not drop the files from the cache.")
@click.option(
    "--sdcpp", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="sd-cli, for --against sdcpp."
)
def render(
    folder: Path,
    against: str,
    pairs: int,
    size: int,
    dtype: str,
    precision: str,
    as_json: bool,
    steps: int,
    layers: int | None,
    memory: float | None,
    warm: bool,
    sdcpp: Path | None,
) -> None:
    """A whole render, cold: each run is a process of its own, the files' pages are dropped from the cache before it.

    FOLDER is filled with random weights (20.5 GB at full depth) when it is empty. stable-diffusion.cpp gets them as
    single files, which take as much again.
    """
    if (against == "sdcpp") != (sdcpp is not None):
        raise click.UsageError("--against sdcpp and --sdcpp BINARY go together")
    write_model(folder, layers)
    arguments = {"folder": str(folder), "size": size, "steps": steps, "dtype": dtype, "prompt": PROMPT}
    theirs = {"binary": str(sdcpp.absolute()), "files": write_singles(folder)} if sdcpp else {}
    sides = sides_of(against, arguments, {"precision": precision, "memory": memory}, theirs)
    folders = {folder, *(Path(file).parent for file in theirs.get("files", {}).values())}
    runs = alternate(sides, "render", pairs, before=lambda: None if warm else drop_from_cache(*folders))
    report(runs, {**arguments, "folder": None, "layers": layers, "memory": memory, "cold": not warm}, as_json)
