"""The sides of the bench on a pretended card: with `--device cuda` nothing of them stays on the CPU."""

import os

import pytest
import torch
from pretended import needs_pretended, pretend

from bench.render import PROMPT
from bench.sides import zimage as ours
from bench.sides.clock import Clock
from bench.weights import SMALL, write_model

pytestmark = [pytest.mark.cuda, needs_pretended]
CUDA = {"dtype": "bf16", "device": "cuda"}
SCENARIOS = {
    "step": {"size": 64, "tokens": 8, "repeats": 1, "precision": "int8", "compiled": False},
    "decode": {"size": 64, "repeats": 1, "tile_mode": "exact", "tile_size": None},
    "rewrite": {"prompt_tokens": 8, "tokens": 3},
    "render": {"size": 64, "steps": 2, "prompt": PROMPT, "precision": "int8"},
}


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("small"), configs=SMALL))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_our_side_runs_on_the_card(scenario, small_folder, monkeypatch):
    monkeypatch.setitem(os.environ, "ZIMAGE_BENCH_STARTED", "0")
    with pretend() as card:
        clock = Clock()
        getattr(ours, scenario)(clock, small_folder, **SCENARIOS[scenario], **CUDA)
        assert clock.wait is torch.cuda.synchronize
    assert card.total.launches
    assert clock.figures["gpu_peak_gb"] > 0
    assert min(clock.figures.values()) >= 0
