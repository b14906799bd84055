"""Options that scenarios share."""

from pathlib import Path
from typing import Any

import click

FOLDER = click.argument("folder", type=click.Path(path_type=Path))
AGAINST = click.option("--against", type=click.Choice(["diffusers", "none"]), default="diffusers", show_default=True)
PAIRS = click.option("--pairs", default=5, show_default=True, help="Runs of each side, in alternation.")
DTYPE = click.option("--dtype", default="bf16", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), show_default=True)
PRECISION = click.option("--precision", default="bf16", type=click.Choice(["bf16", "int8", "fp8"]), show_default=True)
DEVICE = click.option("--device", default="cpu", show_default=True, help="Of both sides: cpu, cuda or cuda:N.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print only the line of JSON.")


def SIZE(default: int) -> Any:
    return click.option("--size", default=default, show_default=True, help="Side of the picture in pixels.")


def sides_of(
    against: str, common: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The arguments of our side and, if there is one, of the peer."""
    return {"zimage": common | ours} | ({against: common | (theirs or {})} if against != "none" else {})
