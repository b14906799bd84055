"""`python -m bench SCENARIO`: what a render costs, beside a peer in the same run."""

import click

from bench.card import card
from bench.decode import decode
from bench.formats import formats
from bench.kernels import kernels
from bench.memory import memory
from bench.profile import profile
from bench.render import render
from bench.rewrite import rewrite
from bench.roofline import roofline
from bench.serve import serve
from bench.step import step
from bench.tables import tables
from zimage.cli.sweep import sweep


@click.group()
def main() -> None:
    """Measure a scenario. Figures are medians with their range; the last line is JSON with machine and commit."""


SCENARIOS = (render, memory, step, decode, rewrite, formats, kernels, card, roofline, profile, sweep, serve, tables)
for scenario in SCENARIOS:
    main.add_command(scenario)

if __name__ == "__main__":
    main(prog_name="python -m bench")
