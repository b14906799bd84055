"""A step of the published DiT on a pretended card, launch by launch: the least time of its parts in every precision.

The card is that of the tests (`tests/cuda`), so this runs in a clone with g++, Triton and pytest, and in a process of
its own, since Triton's interpreter has to be chosen before anything imports `zimage`:

    python -m bench.counted '{"sizes": [1024], "tokens": 32, "precisions": ["bf16"]}'
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from bench.peaks import Peaks

RING = Path(__file__).parents[1] / "tests"
Launched = list[list[Any]]  # (part, FLOPs, bytes, dtype's name, how many alike) of a step


def counted_rows(peaks: Peaks, sizes: Sequence[int], tokens: int, precisions: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a table: the milliseconds of each part of a step at the first size; totals, launches and bytes at all.

    Raises ClickException, in one line, where there can be no pretended card.
    """
    steps = counted(sizes, tokens, precisions)
    first = {name: milliseconds(steps[f"{name} {sizes[0]}"], peaks) for name in precisions}
    parts = sorted(
        {part for by_part in first.values() for part in by_part},
        key=lambda part: -max(by_part.get(part, 0.0) for by_part in first.values()),
    )
    rows = [_row(f"{part}, ms", (first[p].get(part) for p in precisions), precisions) for part in parts]
    for size in sizes:
        launched = [steps[f"{name} {size}"] for name in precisions]
        label = f"a step at {size} × {size}"
        rows.append(_row(f"**{label}, ms**", (sum(milliseconds(x, peaks).values()) for x in launched), precisions))
        rows.append(_row(f"{label}: GB", (sum(n * b for _, _, b, _, n in x) / 1e9 for x in launched), precisions))
        rows.append(_row(f"{label}: launches", (sum(n for *_, n in x) for x in launched), precisions))
    return rows


def milliseconds(launched: Launched, peaks: Peaks) -> dict[str, float]:
    """The least time of every part: each launch is bound by its arithmetic or by its bytes."""
    import torch

    found: dict[str, float] = {}
    for part, flops, traffic, dtype, number in launched:
        rate = peaks.rate(getattr(torch, dtype) if dtype else None, part == "attention", fp16_sums=True)
        found[part] = found.get(part, 0.0) + number * peaks.seconds(flops, traffic, rate) * 1e3
    return found


def _row(label: str, values: Iterable[float | None], precisions: Sequence[str]) -> dict[str, str]:
    cells = ("–" if v is None else str(v) if isinstance(v, int) else f"{v:.1f}" for v in values)
    return {"part": label, **dict(zip(precisions, cells, strict=True))}


def counted(sizes: Sequence[int], tokens: int, precisions: Sequence[str]) -> dict[str, Launched]:
    """What every step launches, by "PRECISION SIZE", counted in a process of its own."""
    asked = json.dumps({"sizes": list(sizes), "tokens": tokens, "precisions": list(precisions)})
    command = [sys.executable, "-m", "bench.counted", asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RING.parent)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise click.ClickException(f"nothing can be counted here: {reason.removeprefix('SystemExit: ')}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------ the process


def main(asked: str) -> None:
    for folder in (RING, RING / "cuda"):
        sys.path.insert(0, str(folder))
    try:
        import emulate  # type: ignore[import-not-found]  # noqa: F401 - before anything that imports zimage
        import pretended  # type: ignore[import-not-found]
    except ImportError as error:
        raise SystemExit(f"{error.name or error} is missing (a clone with the extra `test` has it)") from None
    if why := pretended.why_not():
        raise SystemExit(why)
    print(json.dumps(_steps(pretended, **json.loads(asked))))


def _steps(pretended: Any, sizes: list[int], tokens: int, precisions: list[str]) -> dict[str, Launched]:
    import torch

    from bench.card import models

    device, found = torch.device("cuda", 0), {}
    with torch.no_grad(), pretended.pretend() as card:
        for precision in precisions:
            dit = models.random_model("transformer", device, precision)
            for size in sizes:
                step = models.a_step(dit, size, device, tokens)
                with card.count() as count:
                    step()
                found[f"{precision} {size}"] = summed(count.launches)
    return found


def summed(launches: Iterable[Any]) -> Launched:
    """Launches that are alike, as one entry with their number."""
    found: dict[tuple, int] = {}
    for launch in launches:
        dtype = str(launch.dtype).removeprefix("torch.") if launch.dtype else None
        key = (part_of(launch), launch.flops, launch.bytes, dtype)
        found[key] = found.get(key, 0) + 1
    return [[*key, number] for key, number in found.items()]


def part_of(launch: Any) -> str:
    """The part of a step that a launch belongs to: a product, attention, the file of our kernel, or PyTorch's rest."""
    if launch.name == "attention":
        return "attention"
    if launch.flops:
        return "products"
    return launch.name.partition(".")[0] if "." in launch.name else "PyTorch's own passes"


if __name__ == "__main__":
    main(sys.argv[1])
