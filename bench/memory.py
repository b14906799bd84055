"""The same cold render under smaller and smaller memory budgets: its time, and the memory that it takes."""

from pathlib import Path

import click

from bench.machine import drop_from_cache
from bench.options import DEVICE, DTYPE, FOLDER, JSON, PAIRS, SIZE
from bench.pairs import alternate, report
from bench.render import PROMPT
from bench.weights import write_model


@click.command()
@FOLDER
@PAIRS
@SIZE(256)
@DEVICE
@DTYPE
@JSON
@click.option("--steps", default=3, show_default=True)
@click.option(
    "--budgets", default="8,6,4", show_default=True, help="In GB, each measured beside the default in the same run."
)
@click.option("--warm", is_flag=True, help="Leave the files in the page cache.")
def memory(
    folder: Path, pairs: int, size: int, device: str, dtype: str, as_json: bool, steps: int, budgets: str, warm: bool
) -> None:
    """Render a picture, cold, under each memory budget and by default; ratios are to the default."""
    write_model(folder)
    common = {"folder": str(folder), "size": size, "steps": steps, "dtype": dtype, "prompt": PROMPT, "device": device}
    sides = {f"zimage+{budget:g} GB": common | {"memory": budget} for budget in map(float, budgets.split(","))}
    sides["zimage+default"] = common
    runs = alternate(sides, "render", pairs, before=lambda: None if warm else drop_from_cache(folder))
    runs = {name.split("+")[1]: figures for name, figures in runs.items()}
    report(runs, {**common, "folder": None, "cold": not warm}, as_json)
