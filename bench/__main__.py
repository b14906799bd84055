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


@click.group()
def main() -> None:
    """Measure a scenario. Figures are medians with their range; the last line is JSON with machine and commit."""


for scenario in (render, memory, step, decode, rewrite, formats, kernels, card, roofline, profile, serve, tables):
    main.add_command(scenario)

if __name__ == "__main__":
    main(prog_name="python -m bench")
