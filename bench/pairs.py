"""Implementations in alternation: each run is a process of its own; figures are medians, spreads and paired ratios."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench.machine import command_line, describe_machine

Runs = dict[str, list[dict[str, float]]]


def alternate(
    sides: dict[str, dict[str, Any]], scenario: str, pairs: int, before: Callable[[], None] = lambda: None
) -> Runs:
    """Run `scenario` `pairs` times on every side (name → arguments), in turn; returns {name: figures of each run}.

    A name is that of a module in bench.sides, with "+note" appended where one module runs several times.
    """
    runs: Runs = {name: [] for name in sides}
    for pair in range(pairs):
        for name in list(sides)[:: 1 if pair % 2 == 0 else -1]:
            before()
            runs[name].append(run_side(name.split("+")[0], scenario, sides[name]))
            print(f"pair {pair + 1}/{pairs} {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs


def run_side(module: str, scenario: str, arguments: dict[str, Any]) -> dict[str, float]:
    """Run one side in a fresh process; returns its figures."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
        command = [sys.executable, "-m", f"bench.sides.{module}", scenario, json.dumps(arguments), out.name]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ZIMAGE_BENCH_STARTED": str(time.monotonic())}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(out.read())


def report(runs: Runs, settings: dict[str, Any], as_json: bool = False) -> None:
    """Print medians (minimum to maximum), the ratio of each side to the last one, then everything as a line of JSON."""
    common = set.intersection(*(set(rs[0]) for rs in runs.values()))  # not every peer reports everything
    figures = [f for f in next(iter(runs.values()))[0] if f in common]
    medians = {side: {f: statistics.median(r[f] for r in rs) for f in figures} for side, rs in runs.items()}
    spread = {side: {f: [min(r[f] for r in rs), max(r[f] for r in rs)] for f in figures} for side, rs in runs.items()}
    *ours, peer = runs
    ratios = {side: {f: _paired(runs[side], runs[peer], f) for f in figures} for side in ours}
    if not as_json:
        print(f"{'':14}" + "".join(f"{side:>28}" for side in runs) + "".join(f"{'ratio':>9}" for _ in ratios))
        for f in figures:
            cells = [f"{medians[s][f]:.3g} ({spread[s][f][0]:.3g} to {spread[s][f][1]:.3g})" for s in runs]
            shares = "".join(f"{ratio[f]:>9.3f}" for ratio in ratios.values())
            print(f"{f:14}" + "".join(f"{c:>28}" for c in cells) + shares)
    about = {"machine": describe_machine(), "command": command_line(), **settings}
    print(json.dumps({**about, "median": medians, "spread": spread, "ratio": ratios}))


def _paired(ours: list[dict], theirs: list[dict], figure: str) -> float:
    """The median of the ratios pair by pair: what changes over time affects both runs of a pair."""
    return round(statistics.median(a[figure] / (b[figure] or 1e-9) for a, b in zip(ours, theirs, strict=True)), 4)
