"""`python -m bench SCENARIO`: what a render costs, beside a peer in the same run."""

import sys

import click

from bench.card import card
from bench.decode import decode
from bench.fewer import fewer
from bench.formats import formats
from bench.kernels import kernels
from bench.memory import memory
from bench.profile import profile
from bench.render import render
from bench.rewrite import rewrite
from bench.roofline import roofline
from bench.samplers import samplers
from bench.serve import serve
from bench.step import step
from bench.tables import tables
from bench.variety import variety
from zimage.__main__ import main as zimage
from zimage.cli.compare import compare
from zimage.cli.metrics import metrics
from zimage.cli.sweep import sweep

SCENARIOS = (
    render,
    memory,
    step,
    decode,
    rewrite,
    formats,
    fewer,
    samplers,
    kernels,
    card,
    roofline,
    profile,
    serve,
    tables,
    variety,
)
EXPERIMENTS = (sweep, metrics, compare)  # commands of `zimage`, which people look for here too


@click.group()
def main() -> None:
    """Measure a scenario. Figures are medians with their range; the last line is JSON with machine and commit."""


for scenario in (*SCENARIOS, *EXPERIMENTS):
    main.add_command(scenario)

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in [command.name for command in EXPERIMENTS]:
        sys.exit(zimage())  # where a failure is one line
    main(prog_name="python -m bench")
