"""A decode and an encode divided over ranks: the bits of exact strips on one rank."""

import pytest
import torch
import walks
from walks import Case

SIZES = (1, 2, 3, 4, 5)
HEIGHTS = (8, 16, 24, 40, 104, 4096)
CASES = [
    *(Case((13, 4), height) for height in HEIGHTS),
    *(Case((13, 4), values=values) for values in (1, 600, 2500, 9000, 4 << 20)),
    *(Case(size, height) for size in ((1, 1), (2, 9), (7, 3)) for height in (8, 24, None)),
    Case((6, 5), 24, batch=2),
    Case((13, 4), 40, dtype=torch.bfloat16),
    Case((13, 4), values=2500, dtype=torch.bfloat16),
    Case((13, 4), 40, gpu=True),
    Case((9, 5), values=2500, gpu=True, height=8),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", walks.VAES)
def test_bits_are_those_of_strips_on_one_rank(pool, name, size):
    assert pool.run(size, walks.differing, name, CASES) == [[]] * size
