"""Operations by themselves: the kernels' tests, what this card does at most, every kernel, comfy-kitchen's ops."""

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from bench.card.rows import Absent, Bench, Row, Task, must, needs
from bench.kernels import measure
from bench.peaks import Peaks
from bench.timing import timed
from zimage.kernels import backend, specs
from zimage.kernels.norm import rms_norm_scale
from zimage.kernels.quantise import quantise_rows

ROOT = Path(__file__).parents[2]
TESTS = ("tests/test_kernels.py",)
ON_A_GPU = "not machine_code and not the_compiler"  # these run nothing there, and take a minute
TOKENS, WIDTH, INNER = 4096 + 32, 3840, 10240  # of a step at 1024 × 1024, of the DiT, of its feed-forward
SECONDS = 0.3  # of timing per row
LAUNCHES = 500


def tests(bench: Bench) -> Iterator[Task]:
    """pytest on this GPU: every kernel against its reference, on ragged sizes and in every dtype."""
    for file in TESTS:
        yield Task(file, partial(_pytest, file))


def _pytest(file: str) -> Row:
    needs("pytest")
    workers = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]  # most of the time is compiling
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", *workers, "-k", ON_A_GPU, file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    row: Row = {word: int(number) for number, word in counts}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    said = ", ".join(failed[:5]) or (done.stdout + done.stderr).strip()[-200:]
    return must(row, done.returncode == 0, f"pytest ended with status {done.returncode}: {said}")


# ------------------------------------------------------------------ peaks


def peaks(bench: Bench) -> Iterator[Task]:
    """What PyTorch's products of the DiT's largest matrices and a copy reach, beside the maker's figures."""
    device, known = bench.device, bench.peaks
    factors, halves = (cache(partial(_factors, device, dtype)) for dtype in (torch.bfloat16, torch.float16))

    def product(call: Callable[[], object], peak: float | None) -> Row:
        flops = 2 * TOKENS * INNER * WIDTH
        row: Row = {"ms": (ms := timed(call, device, bench.repeats, SECONDS).ms), "tflops": flops / ms / 1e9}
        return row | ({"of_peak": row["tflops"] * 1e12 / peak} if peak else {})

    def peak(name: str) -> float | None:
        return getattr(known, name) if known else None

    yield Task("bf16 product", lambda: product(_times(factors()), peak("bf16")))
    yield Task("fp16 product", lambda: product(_times(halves()), peak("bf16")))
    yield Task(
        "fp16 product, fp16 sums",
        lambda: with_fp16_sums(lambda: product(_times(halves()), peak("fp16_sums"))),
    )
    yield Task("int8 product", lambda: product(_int8_product(*factors()), peak("int8")))
    for name, fast in (("fp8 product", False), ("fp8 product, fast accumulate", True)):
        yield Task(name, partial(lambda fast: product(_fp8_product(*factors(), fast), peak("fp8")), fast))
    yield Task("copy", partial(_copy, device, bench, known))
    for name, kernel in (("a launch by PyTorch", False), ("a launch by Triton", True)):
        yield Task(name, partial(_launches, device, kernel))


def _factors(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(TOKENS, WIDTH, device=device).to(dtype), torch.randn(INNER, WIDTH, device=device).to(dtype)


def _times(factors: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: factors[0] @ factors[1].t()


def with_fp16_sums(call: Callable[[], Row]) -> Row:
    """A call with PyTorch's switch for fp16 sums in fp16 products on."""
    switches = torch.backends.cuda.matmul
    if not hasattr(switches, "allow_fp16_accumulation"):
        raise Absent(f"PyTorch {torch.__version__} has no allow_fp16_accumulation")
    before = switches.allow_fp16_accumulation
    switches.allow_fp16_accumulation = True
    try:
        return call()
    finally:
        switches.allow_fp16_accumulation = before


def _int8_product(a: Tensor, w: Tensor) -> Callable[[], Tensor]:
    x, y = (quantise_rows(rows, torch.int8)[0] for rows in (a, w))
    return lambda: torch._int_mm(x, y.t())


def _fp8_product(a: Tensor, w: Tensor, fast: bool) -> Callable[[], Tensor]:
    if torch.cuda.get_device_capability() < (8, 9):
        raise Absent("this GPU has no fp8 products")
    (x, x_scale, *_), (y, y_scale, *_) = (quantise_rows(rows, torch.float8_e4m3fn) for rows in (a, w))
    y_scale = y_scale.reshape(1, -1).contiguous()
    return lambda: torch._scaled_mm(x, y.t(), x_scale, y_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)


def _copy(device: torch.device, bench: Bench, known: Peaks | None) -> Row:
    source = torch.empty((1 << 20 if bench.small else 1 << 30) // 4, device=device)
    target = torch.empty_like(source)
    ms = timed(lambda: target.copy_(source), device, bench.repeats, SECONDS).ms
    row: Row = {"ms": ms, "gbps": 2 * source.nbytes / ms / 1e6}
    return row | ({"of_peak": row["gbps"] * 1e9 / known.bandwidth} if known else {})


def _launches(device: torch.device, kernel: bool) -> Row:
    """Microseconds of this host's time that a launch takes: a step has 460 to 490 of them."""
    x = torch.zeros(1, 4, 64, device=device, dtype=torch.bfloat16)
    call: Callable[[], object] = partial(rms_norm_scale, x, x[0, 0], x[:, :1], 1e-5) if kernel else x.abs
    call()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(LAUNCHES):
        call()
    row = {"launch_us": (time.perf_counter() - started) / LAUNCHES * 1e6}
    torch.cuda.synchronize(device)
    return row


# ------------------------------------------------------------------ kernels


def kernels(bench: Bench) -> Iterator[Task]:
    """Every kernel against its reference at the published sizes, over the least time; comfy-kitchen's ops beside."""
    yield Task("Triton", _triton)
    for spec in specs():
        yield Task(spec.name, partial(_kernel, bench, spec))
    for name, ours in KITCHEN.items():
        yield Task(f"comfy-kitchen {name}", partial(_kitchen, bench, ours))


def _triton() -> Row:
    """Whether Triton builds kernels here at all, or in which words the references are said to run."""
    said = Said()
    log = logging.getLogger("zimage")
    log.addHandler(said)
    try:
        backend.check_triton(torch.device("cuda", torch.cuda.current_device()))
    finally:
        log.removeHandler(said)
    return must({}, backend.ACTIVE, "; ".join(said.lines) or "the fused kernels are off")


class Said(logging.Handler):
    """Keeps the lines of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _kernel(bench: Bench, spec: backend.Spec) -> Row:
    if torch.cuda.get_device_capability() < divmod(spec.least_capability, 10):
        raise Absent(f"needs compute capability {spec.least_capability / 10}")
    found = measure(spec, "cuda", bench.repeats, ("kernel", "torch"), SECONDS)
    row: Row = {"difference": found["difference"], "torch_ms": found["torch"]}
    if "kernel" in found:
        row = {"ms": found["kernel"], **rates(found, found["kernel"]), **row}
    return must(row, "error" not in found, found.get("error", ""))


def rates(work: Row, ms: float) -> Row:
    """GB/s, TFLOP/s and the time over the least time, as far as these are known."""
    row: Row = {"gbps": work["megabytes"] / ms}
    row |= {"tflops": work["tflop"] * 1e3 / ms} if "tflop" in work else {}
    return row | ({"over_floor": ms / work["floor_ms"]} if "floor_ms" in work else {})


def _kitchen(bench: Bench, call: Callable) -> Row:
    needs("comfy_kitchen")
    import comfy_kitchen

    torch.manual_seed(0)
    run, traffic = call(comfy_kitchen, lambda *shape: torch.randn(shape, device=bench.device).bfloat16())
    ms = timed(run, bench.device, bench.repeats, SECONDS).ms
    return {"ms": ms, "gbps": traffic / ms / 1e6}


def _their_residual(kitchen, make):
    x, branch, weight, gate = (make(1, TOKENS, WIDTH), make(1, TOKENS, WIDTH), make(WIDTH), make(1, 1, WIDTH))
    return partial(kitchen.rms_gated_residual, branch, weight, x, gate), 3 * x.nbytes


def _their_rows(kitchen, make):
    x = make(TOKENS, WIDTH)
    return partial(kitchen.quantize_int8_rowwise, x), x.nbytes * 3 // 2


def _their_product(kitchen, make):
    x, codes, scale = make(TOKENS, WIDTH), make(INNER, WIDTH).to(torch.int8), make(INNER).float().abs()
    return partial(kitchen.int8_linear, x, codes, scale, out_dtype=x.dtype), x.nbytes + codes.nbytes


# Their ops that do the work of one of ours: those of a block, with the same arguments.
KITCHEN = {"gated_residual": _their_residual, "quantise_rows int8": _their_rows, "int8 product": _their_product}
