"""The tables that documents show of a saved run of `bench card`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bench.card import report
from bench.card.record import key
from bench.card.rows import Row

NONE = "No GPU has been measured with this command yet.\n"
OTHERS = {  # row → its label in the short table
    "decode/whole 1024": "decoding 1024 × 1024",
    "text/write": "writing, a token",
    "text/write, CUDA graphs": "the same with CUDA graphs",
    "memory/bf16 in 12 GB": "a 1024 × 1024 render of 2 steps in 12 GB, bf16",
    "memory/int8 in 8 GB": "the same in 8 GB, int8",
    "render/bf16, cold": "a 1024 × 1024 render of 8 steps, process start to picture, cold",
    "render/bf16, warm": "the same, files in the page cache",
    "render/diffusers bf16, warm": "the same by diffusers",
}


def short(result: Mapping[str, Any]) -> str:
    """Steps by precision and size, and the few other figures of the top README, of rows that were run."""
    rows = {key(row): row for row in result["rows"] if "not_run" not in row}
    sizes = result["settings"]["sizes"]
    lines = _table(["a step, ms (over the floor)", *(f"{size} × {size}" for size in sizes)], _steps(rows, sizes))
    others = [[label, _figure(rows[name])] for name, label in OTHERS.items() if name in rows]
    return "\n".join([*lines, "", *_table(["", "measured"], others), "", source(result), ""])


def long(result: Mapping[str, Any]) -> str:
    """Every row, section by section."""
    lines = ([row["section"], row["name"], *_state(row)] for row in result["rows"])
    return "\n".join([*_table(["section", "row", "", "figures"], lines), "", source(result), ""])


def source(result: Mapping[str, Any]) -> str:
    """The command that measures the figures, and the machine these come from."""
    machine = result["machine"]
    return (
        f"`{result['command']}` ({result['gpu']}, driver {result['driver']}, PyTorch {machine['torch']}, "
        f"commit {machine['commit']})"
    )


def _steps(rows: Mapping[str, Row], sizes: Iterable[int]) -> Iterator[list[str]]:
    names = [name.removeprefix("steps/").split(" ") for name in rows if name.startswith("steps/")]
    for precision in dict.fromkeys(name[0] for name in names if name[0] != "diffusers"):
        yield [precision, *(_step(rows.get(f"steps/{precision} {size}")) for size in sizes)]
        compiled = [_step(rows.get(f"steps/{precision} {size} compiled")) for size in sizes]
        if any(cell != "–" for cell in compiled):
            yield [f"{precision}, compiled", *compiled]
    theirs = [_step(rows.get(f"steps/diffusers bf16 {size}")) for size in sizes]
    if any(cell != "–" for cell in theirs):
        yield ["diffusers, bf16", *theirs]


def _step(row: Row | None) -> str:
    if row is None or "ms" not in row or "error" in row:
        return "–"
    return f"{row['ms']:.3g}" + (f" ({row['over_floor']:.2f})" if "over_floor" in row else "")


def _figure(row: Row) -> str:
    word, reason = report.status(row)
    return ", ".join(report.figures(row)) if word == "ok" else f"{word}: {reason}"


def _state(row: Row) -> tuple[str, str]:
    word, reason = report.status(row)
    return word, reason.replace("|", "/") or ", ".join(report.figures(row))


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    cells = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(row)} |" for row in cells]
