"""Ring 3, opt-in (`pytest --full`): a full-size render from random weights stays within its memory, file by file cast.

Needs 21 GB of disk (ZIMAGE_FULL_SIZE names a folder to keep them in) and, without bf16 arithmetic, half an hour.
"""

import os
from pathlib import Path

import pytest
from test_memory import measure

from bench.machine import drop_from_cache
from bench.pairs import run_side
from bench.render import PROMPT
from bench.weights import write_model

pytestmark = pytest.mark.full

LARGEST_STAGE_GB = 13.5
BUDGETS = (4, 6, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    kept = os.environ.get("ZIMAGE_FULL_SIZE")
    return write_model(Path(kept) if kept else tmp_path_factory.mktemp("full"))


def test_a_render_needs_the_largest_stage_and_not_the_sum(folder):
    drop_from_cache(folder)
    arguments = {"folder": str(folder), "size": 256, "steps": 3, "dtype": "auto", "prompt": PROMPT}
    figures = run_side("zimage", "render", arguments)
    assert figures["peak_gb"] <= LARGEST_STAGE_GB


def test_budgets_are_kept_and_change_no_pixel(folder):
    runs = {budget: measure(folder, "bf16", budget, size=256, threads=2) for budget in (*BUDGETS, None)}
    for budget, run in runs.items():
        assert run["planned"] == pytest.approx(run["peak"], rel=0.1)
        assert run["peak"] <= (1.1 * budget if budget else LARGEST_STAGE_GB) * 1e9
    assert len({run["pixels"] for run in runs.values()}) == 1
