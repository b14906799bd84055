"""The tables of results in our documents, made from what scenarios saved: no figure there is typed by hand."""

import json
import re
from pathlib import Path
from typing import Any

import click

from bench.card.table import NONE, long, short

CARD = {"card": short, "card_rows": long}  # of results/card.json, once a GPU has been measured
HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCUMENTS = (HERE.parent / "README.md", HERE / "README.md", HERE / "NOTES.md")
HEADLINES = {  # of the top README: a saved result and one of its figures
    "a cold render of 256 × 256 in 3 steps, process start to picture": ("render_bf16", "total"),
    "one step at 256 × 256 with the DiT's products in int8 (diffusers: bf16)": ("step_int8", "step"),
    "decoding 1024 × 1024 in exact strips": ("decode_1024", "decode"),
}
BLOCK = re.compile(r"<!-- result: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
LABELS = {
    "total": "process start to decoded picture",
    "load": "imports, checks",
    "encode": "encode, cold",
    "encode_warm": "encode, warm",
    "first_step": "first step, cold",
    "step": "a step, warm",
    "decode": "decode",
    "prefill": "prompt to first token",
    "token": "a token after it",
    "cpu": "time on the processor, all cores",
    "peak_gb": "**peak memory**, GB",
    "gpu_peak_gb": "**peak GPU memory**, GB",
    "memory_ratio": "peak over weights and cache",
}


@click.command()
@click.argument("documents", nargs=-1, type=click.Path(path_type=Path, exists=True))
def tables(documents: tuple[Path, ...]) -> None:
    """Fill every block `<!-- result: NAME -->` of DOCUMENTS (default: ours) from bench/results/NAME.json."""
    for document in documents or DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """The text with the table of every block made anew."""

    def table_of(name: str) -> str:
        if name in CARD:
            return CARD[name](read("card")) if (RESULTS / "card.json").exists() else NONE
        return headlines() if name == "headlines" else table(read(name))

    return BLOCK.sub(lambda block: f"<!-- result: {block[1]} -->\n{table_of(block[1])}<!-- end -->", text)


def read(name: str) -> dict[str, Any]:
    """A saved result, as `python -m bench SCENARIO … --json > bench/results/NAME.json` writes it."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(result: dict[str, Any]) -> str:
    """Medians of every side with minimum and maximum, ratios to the last side, and below them their command."""
    if "rows" in result:
        return "\n".join([*_listed(result["rows"]), "", _source(result), ""])
    medians, spread, sides = result["median"], result["spread"], list(result["median"])
    ratios = result["ratio"]
    header = ["seconds", *sides, *(f"{side} / {sides[-1]}" for side in ratios)]
    lines = [_row(header), _row(["---", *["--:"] * (len(header) - 1)])]
    for figure in (name for name in LABELS if name in medians[sides[0]]):
        cells = [f"{_short(medians[side][figure])} ({_range(spread[side][figure])})" for side in sides]
        lines.append(_row([LABELS[figure], *cells, *(f"{ratio[figure]:.2f}" for ratio in ratios.values())]))
    return "\n".join([*lines, "", _source(result), ""])


def headlines() -> str:
    """The few figures of the top README: seconds and peak memory of both sides."""
    results = {title: (read(name), figure) for title, (name, figure) in HEADLINES.items()}
    sides = list(next(iter(results.values()))[0]["median"])
    lines = [_row(["", *sides]), _row(["---", *["--:"] * len(sides)])]
    for title, (result, figure) in results.items():
        medians = [result["median"][side] for side in sides]
        lines.append(_row([title, *(f"{_short(m[figure])} s, {_short(m['peak_gb'])} GB" for m in medians)]))
    return "\n".join([*lines, ""])


def _listed(rows: list[dict[str, Any]]) -> list[str]:
    """A table with one column per entry of the rows."""
    names = list(rows[0])
    values = [_row([str(row[name]) for name in names]) for row in rows]
    return [_row(names), _row(["---", *["--:"] * (len(names) - 1)]), *values]


def _source(result: dict[str, Any]) -> str:
    """The command that measures the figures, and the machine these come from."""
    machine = result["machine"]
    how = f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, PyTorch {machine['torch']}"
    return f"`{result['command']}` ({how}, commit {machine['commit']})"


def _range(ends: list[float]) -> str:
    return " to ".join(map(_short, ends))


def _short(value: float) -> str:
    return f"{value:.3g}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
