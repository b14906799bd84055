"""Batches on a Ray cluster of their own, each within its test."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("ray") is None:  # not imported here: what is set before that is part of the tests
    pytest.skip("the extra ray is not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch):
    """As the suite computes itself: bits of a CPU may depend on the number of threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "poison"))
