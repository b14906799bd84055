"""Sequence parallelism: an evaluation on several ranks is that of one, to rounding, and its bits are always the same.

fp32: the largest error over the largest value is at most 1e-5.
"""

import pytest
import renders
import torch
from tiny import relative_error

SIZES = (2, 3, 4, 5)
LIMIT = 1e-5


def error(pool, size: int, settings: renders.Settings, case: dict) -> float:
    """Of the velocity in a run of one step, where the latents end at noise − velocity."""
    plain = renders.latents(None, settings, **case)
    first, *others = pool.run(size, renders.drawn, settings, case)
    assert all(bits == first[0] for bits, _ in others)  # every rank goes on with the same latents
    found = torch.frombuffer(bytearray(first[0]), dtype=torch.float32).view(plain.shape)
    noise = renders.noise(len(plain), case.get("size", renders.LATENTS))
    return relative_error(noise - found, noise - plain)


@pytest.fixture
def model(wide_folder):
    return (("path", str(wide_folder)),)


CASES = {
    "one caption": {},
    "two captions of one length": {"lengths": (9, 9)},
    "two captions of unequal lengths": {"lengths": (9, 40)},
    "guidance": {"lengths": (9,), "negative": 40, "guidance": 3.5},
    "guidance of two": {"lengths": (9, 40), "negative": 70, "guidance": 3.5},
    "the least of tokens": {"lengths": (1,), "size": (2, 2)},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_is_that_of_one_rank(pool, model, size, case):
    assert error(pool, size, model, CASES[case]) <= LIMIT
