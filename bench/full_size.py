"""One full-size render beside diffusers: memory, cold start, stage by stage, in alternation on the same weights.

    python -m bench.full_size FOLDER [--peer diffusers] [--pairs 5] [--size 256] [--steps 3] [--dtype bf16]

FOLDER is filled with random weights (20.5 GB) when it is empty. Each run is a process of its own; before each, the
folder's pages are dropped from the cache, so that cold means cold. Prints a table, then one line of JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from bench.machine import describe_machine, drop_from_cache
from bench.weights import write_model

PROMPT = "a cat face on a blue background"
FIGURES = ("total", "encode", "encode_warm", "first_step", "step", "decode", "peak_gb")


@click.command(help=__doc__.splitlines()[0])
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--peer", type=click.Choice(["diffusers", "none"]), default="diffusers", show_default=True)
@click.option("--pairs", default=5, show_default=True, help="Cold runs of each side, alternated.")
@click.option("--size", default=256, show_default=True)
@click.option("--steps", default=3, show_default=True)
@click.option("--dtype", default="bf16", type=click.Choice(["auto", "bf16", "fp32"]), show_default=True)
@click.option("--layers", type=int, help="Depth of both transformers, where full size does not fit.")
@click.option("--warm", is_flag=True, help="Do not drop the files from the cache.")
def main(
    folder: Path, peer: str, pairs: int, size: int, steps: int, dtype: str, layers: int | None, warm: bool
) -> None:
    write_model(folder, layers)
    sides = ["zimage", peer] if peer != "none" else ["zimage"]
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for pair in range(pairs):
        for side in sides if pair % 2 == 0 else sides[::-1]:
            if not warm:
                drop_from_cache(folder)
            runs[side].append(run_side(side, folder, size, steps, dtype))
            print(f"pair {pair + 1}/{pairs} {side}: {runs[side][-1]}", file=sys.stderr, flush=True)
    report(runs, {"size": size, "steps": steps, "dtype": dtype, "layers": layers, "cold": not warm})


def run_side(side: str, folder: Path, size: int, steps: int, dtype: str) -> dict[str, float]:
    """Run one side in a fresh process; returns its figures."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
        command = [
            sys.executable,
            "-m",
            f"bench.sides.{side}",
            str(folder),
            str(size),
            str(steps),
            dtype,
            PROMPT,
            out.name,
        ]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ZIMAGE_BENCH_STARTED": str(time.monotonic())}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(out.read())


def report(runs: dict[str, list[dict]], settings: dict) -> None:
    medians = {side: {f: statistics.median(r[f] for r in rs) for f in FIGURES} for side, rs in runs.items()}
    spread = {side: {f: [min(r[f] for r in rs), max(r[f] for r in rs)] for f in FIGURES} for side, rs in runs.items()}
    ratios = {}
    if len(runs) == 2:
        ours, theirs = runs.values()
        ratios = {f: statistics.median(a[f] / b[f] for a, b in zip(ours, theirs, strict=True)) for f in FIGURES}
    print(f"{'':14}" + "".join(f"{side:>28}" for side in runs) + (f"{'ratio':>9}" if ratios else ""))
    for f in FIGURES:
        cells = [f"{medians[s][f]:.2f} ({spread[s][f][0]:.2f} to {spread[s][f][1]:.2f})" for s in runs]
        print(f"{f:14}" + "".join(f"{c:>28}" for c in cells) + (f"{ratios[f]:>9.3f}" if ratios else ""))
    print(json.dumps({"machine": describe_machine(), **settings, "median": medians, "spread": spread, "ratio": ratios}))


if __name__ == "__main__":
    main()
