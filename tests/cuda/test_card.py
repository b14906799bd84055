"""`bench card` on a pretended card: every row runs, and what goes wrong in one is told as a failure of that row."""

import gc
import json
import os
import weakref

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pretended import needs_pretended, pretend

from bench import pairs
from bench.__main__ import main
from bench.card import pictures, steps, watch, worker
from bench.card.rows import Bench, Section, Task, must
from bench.sides import zimage as our_side
from bench.sides.clock import Clock
from zimage.kernels import backend

pytestmark = [pytest.mark.cuda, needs_pretended]


class InThisProcess:
    """The worker without a process of its own, which could not see the pretended card."""

    def __init__(self, work: worker.Work):
        self.messages = worker.messages(work)

    def next(self, seconds: float) -> worker.Message:
        return json.loads(json.dumps(next(self.messages)))

    def end(self) -> None:
        self.messages.close()


class NoGraphs:
    """Captures nothing, and replays nothing: results are zeros on a pretended card in any case."""

    def __init__(self, device: object): ...

    def capture(self, run):
        return lambda: None, run()


def side_in_this_process(module: str, scenario: str, arguments: dict) -> dict:
    os.environ["ZIMAGE_BENCH_STARTED"] = "0"
    clock = Clock()
    assert (module, scenario) == ("zimage", "render")
    our_side.render(clock, **arguments)
    return clock.figures


@pytest.fixture
def dry(monkeypatch, tmp_path):
    """Runs `bench card` on a pretended card; returns its exit status, its output and its rows."""
    monkeypatch.setattr("zimage.loading.graphs.CudaGraphs", NoGraphs)
    monkeypatch.setattr(pairs, "run_side", side_in_this_process)
    monkeypatch.setattr(pictures, "decibels", lambda found, expected: 99.0)  # what comes from the card is zeros
    monkeypatch.setattr(watch.watched, "__defaults__", (InThisProcess,))

    def run(*arguments: str) -> tuple[int, str, dict]:
        output = tmp_path / "card.json"
        gc.freeze()  # what the tests have imported need not be looked through again and again
        with pretend():
            done = CliRunner().invoke(main, ["card", "--output", str(output), *arguments])
        gc.unfreeze()
        rows = json.loads(output.read_text())["rows"] if output.exists() else []
        return done.exit_code, done.output, {f"{row['section']}/{row['name']}": row for row in rows}

    return run


# As few as show that each kind of row runs: each op costs half a millisecond here.
ROWS = [
    "peaks",
    "kernels/[!c]*",
    "demo/int8",
    "steps/*[!d]",
    "attention/sdpa-flash",
    "attention/flash2",
    "packed/GGUF Q8_0",
    "text/write*",
    "decode/exact*",
    "memory/[!f]*",
    "render/int8*",
]
SMALL = ("--small", "--size", "64", "--repeats", "1", "--minutes", "60")


def only(*rows: str) -> list[str]:
    return [word for row in rows for word in ("--only", row)]


@pytest.mark.full
def test_every_row_runs(dry):
    status, output, rows = dry(*SMALL, *only(*ROWS))
    assert status == 0, output
    assert {name.split("/")[0] for name in rows} == {row.split("/")[0] for row in ROWS}
    assert "absent  flash2" in output
    assert rows["steps/bf16 64"]["ms"] > 0
    assert rows["steps/int8 64"]["peak_mb"] <= rows["steps/int8 64"]["planned_mb"] + 2
    assert all(row["streamed"] > 0 for name, row in rows.items() if name.startswith("memory/bf16 in"))


def raises():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")


def planted(bench):
    """Rows that go wrong, planted."""
    yield Task("raises", raises)
    yield Task("draws another picture", lambda: must({"psnr_db": 21.3}, False, "21.3 dB to the CPU's picture"))
    yield Task("is in order", lambda: {"ms": 1.0})


def test_what_goes_wrong_in_a_row_is_a_failure_of_that_row(dry, monkeypatch):
    monkeypatch.setattr(worker, "SECTIONS", (Section("decode", "planted", 20, planted),))
    status, output, rows = dry()
    assert status == 1
    assert rows["decode/raises"]["error"].startswith("RuntimeError: CUDA error: an illegal memory access")
    assert rows["decode/draws another picture"] | {"took_s": 0} == {
        "section": "decode",
        "name": "draws another picture",
        "psnr_db": 21.3,
        "error": "21.3 dB to the CPU's picture",
        "took_s": 0,
    }
    assert "error" not in rows["decode/is in order"]
    assert "FAILED decode/raises" in output
    assert "3 rows: 1 ok, 2 FAILED" in output


def test_a_picture_below_the_bar_fails(dry, monkeypatch):
    monkeypatch.setattr(pictures, "pictures", lambda prompts, pipe, request: [np.zeros(4)])
    monkeypatch.setattr(pictures, "decibels", lambda found, expected: 21.3)
    status, _, rows = dry(*SMALL, *only("demo/int8"))
    assert status == 1
    assert "21.3 dB to the CPU's picture; at least 40" in rows["demo/int8"]["error"]


def test_a_kernel_that_disagrees_fails(dry, monkeypatch):
    monkeypatch.setattr("bench.kernels.relative", lambda ours, theirs: float("nan"))
    status, _, rows = dry(*SMALL, *only("kernels/swiglu"))
    assert status == 1
    assert "disagrees with its reference by nan" in rows["kernels/swiglu"]["error"]
    assert "ms" not in rows["kernels/swiglu"], "a kernel that fails its check gets no speed figure"


def test_fp16_by_cublas_is_not_our_product():
    bench = Bench(torch.device("cuda", 0), (64,), 1, small=True)
    with torch.no_grad(), pretend() as card:
        dit = steps.made(bench, "fp16")
        launched = []
        for measured in (steps._step, steps._by_cublas):
            with card.count() as count:
                measured(bench, lambda: dit, *(("fp16", 64) if measured is steps._step else ()))
            launched.append(count.by_name())
    ours, theirs = launched
    assert ours["half_product.kernel"] > 0 == theirs["half_product.kernel"]
    assert theirs["mm"] > ours["mm"]


def test_no_two_models_lie_on_the_card_at_once(monkeypatch):
    """Two in bf16 are more than a card of 24 GB has."""
    alive = weakref.WeakSet()

    def made(*_: object) -> torch.nn.Module:
        gc.collect()
        assert not alive
        alive.add(model := torch.nn.Module())
        return model

    monkeypatch.setattr(steps, "made", made)
    monkeypatch.setattr(steps, "_diffusers", made)
    monkeypatch.setattr(steps, "compile_blocks", lambda _: None)
    monkeypatch.setattr(steps, "give_graphs", lambda *_, **__: None)
    monkeypatch.setattr(steps, "_measured", lambda *_: {"peak_mb": 0, "planned_mb": 0})
    for task in steps.steps(Bench(torch.device("cpu"), (64,), 1, small=True)):
        task.measure()


def test_triton_that_cannot_compile_is_a_failure_with_its_reason(dry, monkeypatch):
    def fail(*arguments, **options):
        raise backend.KernelError("Failed to find C compiler")

    monkeypatch.setattr(backend, "enqueue", fail)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "BROKEN", None)
        status, _, rows = dry(*SMALL, *only("kernels/Triton"))
    assert status == 1
    assert "Failed to find C compiler" in rows["kernels/Triton"]["error"]


def test_a_peak_beyond_the_plan_fails(dry, monkeypatch):
    monkeypatch.setattr("bench.card.steps.step_bytes", lambda dit, size: -(10**8))
    status, _, rows = dry(*SMALL, *only("steps/bf16*4"))
    assert status == 1
    assert "were planned" in rows["steps/bf16 64"]["error"]


def test_a_run_goes_on_where_it_was_cut_off(dry, monkeypatch):
    """Rows that are there are not measured again; a file of another kind of run is refused."""
    calls = []
    row = Task("once", lambda: calls.append(1) or {"ms": 1.0})
    later = Task("later", lambda: {"ms": 2.0} if len(calls) > 1 else must({}, False, "not yet"))
    monkeypatch.setattr(worker, "SECTIONS", (Section("decode", "planted", 20, lambda bench: iter((row, later))),))
    assert dry()[0] == 1
    assert "exists; pass --resume" in dry()[1]
    calls.append(1)
    status, _, rows = dry("--resume")
    assert (status, len(calls), len(rows)) == (0, 2, 2)
    status, output, _ = dry("--resume", "--repeats", "3")
    assert status == 1
    assert "is of another settings" in output
