"""A decode and an encode divided over ranks: the bits of exact strips on one rank."""

import pytest
import torch
import walks
from walks import Case

import zimage

SIZES = (1, 2, 3, 4, 5)
CASES = [
    *(Case((9, 4), height) for height in (8, 24, 40, 4096)),
    *(Case((9, 4), values=values) for values in (600, 2500, 4 << 20)),
    Case((3, 2), values=1),
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


@pytest.mark.parametrize("name", walks.VAES)
def test_bits_do_not_hang_on_who_is_late(pool, name):
    cases = [Case((9, 4), 8, sleeps=True), Case((7, 3), values=900, sleeps=True)]
    assert pool.run(4, walks.differing, name, cases) == [[]] * 4


@pytest.mark.parametrize("size", [2, 3])
def test_attention_is_divided_by_queries_where_there_are_enough(pool, size):
    """1024 tokens for each rank."""
    side = {2: 46, 3: 56}[size]
    case = Case((side, side), 64)
    assert pool.run(size, walks.differing, "kl", [case]) == [[]] * size
    assert all(kinds["tokens"] > 0 for kinds in pool.run(size, walks.sent, "kl", case))


TALL = Case((64, 4), 8)


@pytest.mark.parametrize("name", walks.VAES)
def test_ranks_divide_the_work(pool, name):
    """But for the mid block, which all of them run: 4 to 7 % of the tiny models' work."""
    counted = pool.run(4, walks.flops, name, TALL)
    assert sum(own for own, _ in counted) <= 1.25 * counted[0][1]
    assert max(own for own, _ in counted) <= 0.32 * counted[0][1]


@pytest.mark.parametrize("name", walks.VAES)
def test_no_rank_holds_a_whole_map(pool, name):
    """But for maps of the latents' size, and the picture of 3 channels."""
    picture = 3 * 4 * 64 * TALL.size[0] * TALL.size[1]
    (one,) = pool.run(1, walks.largest, name, TALL)
    for own in pool.run(4, walks.largest, name, TALL):
        assert own <= max(0.3 * one, picture), f"{own} of {one} bytes"


@pytest.mark.parametrize(("asked", "found"), [({}, "exact"), ({"tile_mode": "off"}, "off")])
def test_a_plan_for_ranks_divides_the_decode(wide_folder, asked, found):
    pipe = zimage.ZImage.load(wide_folder, device="cpu")
    assert pipe.prepare(zimage.Request(prompt="a cat", width=64, height=64)).plan.tile_mode == "off"
    pipe.planner.divide(2)
    assert pipe.prepare(zimage.Request(prompt="a cat", width=64, height=64, **asked)).plan.tile_mode == found
