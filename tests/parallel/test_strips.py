"""A decode and an encode divided over ranks: the bits of exact strips on one rank."""

import pytest
import torch
import walks
from walks import Case

SIZES = (1, 2, 3, 4, 5)
CASES = [
    *(Case((9, 4), height) for height in (8, 24, 40, 4096)),
    *(Case((9, 4), values=values) for values in (1, 600, 2500, 4 << 20)),
    Case((1, 1), 8),
    Case((2, 7), 8),
    Case((7, 3), values=900),
    Case((3, 5), 8, batch=2),
    Case((7, 3), 24, dtype=torch.bfloat16),
    Case((7, 3), values=900, dtype=torch.bfloat16),
    Case((7, 3), 8, gpu=True),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", walks.VAES)
def test_bits_are_those_of_strips_on_one_rank(pool, name, size):
    assert pool.run(size, walks.differing, name, CASES) == [[]] * size
