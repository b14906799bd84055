"""Mutated inputs of every kind: each is used, or refused in one line; none hangs, takes memory or reaches the last net.

A few cases of each kind run always; `pytest -m fuzz --cases 20000 --seed 7` runs more.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import ring
from fuzz.ring import KINDS

ALWAYS = 12  # cases of a kind


@pytest.fixture(scope="module")
def worker():
    worker = ring.Worker()
    yield worker
    worker.stop()


def test_the_corpus(worker):
    check(worker, "corpus", seed=0, cases=1000, chunk=1000)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_of_each_kind(worker, kind):
    check(worker, kind, seed=1, cases=ALWAYS)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_many_of_each_kind(worker, kind, request):
    cases = request.config.getoption("--cases") // len(KINDS)
    check(worker, kind, request.config.getoption("--seed"), cases)


def test_the_long_run_as_our_readme_asks_for_it():
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "fuzz", "--cases", "70", "--seed", "7", __file__]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert done.stdout.count(".") >= len(KINDS)


def check(worker, kind, seed, cases, chunk=ring.CHUNK):
    tally = ring.Tally()
    ring.run(worker, kind, seed, cases, tally, chunk)
    print(f"{kind}: {dict(tally.outcomes)}, slowest {tally.slowest:.1f} s, largest {tally.largest / 1e6:.0f} MB")
    assert not tally.findings, "\n".join(map(str, tally.findings[:20]))
    assert tally.outcomes["refused"] > tally.outcomes.total() / 10  # mutations that all pass have not reached anything
