"""What a run prints: a line per row, as it is measured, and a summary."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bench.card.rows import Row, Section

NAME = 34  # columns
FIGURES: dict[str, Callable[[Any], str]] = {  # in this order; others are in the file only
    "ms": lambda ms: f"{ms:.3g} ms" if ms < 1000 else f"{ms:.0f} ms",
    "tflops": lambda value: f"{value:.0f} TFLOP/s",
    "gbps": lambda value: f"{value:.0f} GB/s",
    "of_peak": lambda share: f"{share:.0%} of the maker's figure",
    "over_floor": lambda ratio: f"{ratio:.2f} × floor",
    "launch_us": lambda us: f"{us:.3g} µs",
    "torch_ms": lambda ms: f"PyTorch {ms:.3g} ms",
    "ms_per_token": lambda ms: f"{ms:.1f} ms a token",
    "first_token_ms": lambda ms: f"first {ms:.0f} ms",
    "total_s": lambda s: f"{s:.2f} s in all",
    "first_step_s": lambda s: f"first step {s:.2f} s",
    "step_s": lambda s: f"a step {s:.3f} s",
    "decode_s": lambda s: f"decode {s:.2f} s",
    "load_s": lambda s: f"load {s:.2f} s",
    "first_s": lambda s: f"first {s:.2f} s",
    "again_s": lambda s: f"again {s:.2f} s",
    "peak_mb": lambda mb: f"peak {mb}",
    "planned_mb": lambda mb: f"planned {mb} MB",
    "gpu_peak_gb": lambda gb: f"{gb:.1f} GB on the GPU",
    "psnr_db": lambda db: f"{db} dB",
    "difference": lambda share: f"differs by {share:.2g}",
    "streamed": lambda blocks: f"{blocks} blocks streamed",
    "passed": lambda n: f"{n} passed",
    "skipped": lambda n: f"{n} skipped",
    "failed": lambda n: f"{n} failed",
}


def heading(about: dict[str, Any], minutes: float, output: str) -> Iterator[str]:
    machine = about["machine"]
    yield (
        f"{about['gpu']}, {about['gpu_memory_gb']} GB, driver {about['driver']} · PyTorch {machine['torch']} · "
        f"commit {machine['commit'] or 'unknown'}"
    )
    yield f"At most {minutes:g} minutes. Every row is saved in {output} as soon as it is measured."


def title(section: Section, seconds: float) -> str:
    return f"\n{section.name}: {section.title} (at most {seconds:.0f} s)"


def line(row: Row) -> str:
    """One row: whether it is in order, its name, and its figures or the reason."""
    state, reason = status(row)
    return f"  {state:8}{row['name']:{NAME}}  {reason or ', '.join(figures(row))}".rstrip()


def status(row: Row) -> tuple[str, str]:
    """(word, reason or "")"""
    for name, word in (("error", "FAILED"), ("absent", "absent"), ("not_run", "not run")):
        if name in row:
            return word, row[name]
    return "ok", ""


def figures(row: Row) -> Iterator[str]:
    for name, written in FIGURES.items():
        if name in row:
            yield written(row[name])


def summary(rows: Iterable[Row], output: str) -> Iterator[str]:
    found = [status(row)[0] for row in rows]
    words = ", ".join(f"{found.count(word)} {word}" for word in ("ok", "FAILED", "absent", "not run") if word in found)
    yield f"\n{len(found)} rows: {words}. They are in {output}."
