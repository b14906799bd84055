"""Ring 3, opt-in (`pytest --full`): a full-size render from random weights stays within its memory, file by file cast.

Needs 21 GB of disk (ZIMAGE_FULL_SIZE names a folder to keep them in) and, without bf16 arithmetic, half an hour.
"""

import os
from pathlib import Path

import pytest

from bench.machine import drop_from_cache
from bench.pairs import run_side
from bench.render import PROMPT
from bench.weights import write_model

pytestmark = pytest.mark.full

LARGEST_STAGE_GB = 13.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    kept = os.environ.get("ZIMAGE_FULL_SIZE")
    return write_model(Path(kept) if kept else tmp_path_factory.mktemp("full"))


def test_a_render_needs_the_largest_stage_and_not_the_sum(folder):
    drop_from_cache(folder)
    arguments = {"folder": str(folder), "size": 256, "steps": 3, "dtype": "auto", "prompt": PROMPT}
    figures = run_side("zimage", "render", arguments)
    assert figures["peak_gb"] <= LARGEST_STAGE_GB
