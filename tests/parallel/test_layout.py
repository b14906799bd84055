"""Who holds what: runs as even as possible, and sequences cut and put together again."""

import itertools

import pytest
import torch

from zimage.errors import RequestError
from zimage.parallel.layout import Layout, Split, attention_elements, check_ranks, shares


def test_shares_are_even_and_the_longer_ones_come_first():
    assert shares(30, 4) == (8, 8, 7, 7)
    assert shares(30, 8) == (4, 4, 4, 4, 4, 4, 3, 3)
    assert shares(3, 5) == (1, 1, 1, 0, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_parts_of_all_ranks_make_up_the_whole(size):
    split = Split((shares(64, size), shares(37, size)))
    whole = torch.arange(2 * 101 * 3).view(2, 101, 3)
    parts = split.parts(whole)
    assert [part.shape[1] for part in parts] == split.lengths
    assert torch.equal(split.whole(parts), whole)
    assert all(torch.equal(split.part(whole, rank), part) for rank, part in enumerate(parts))


def test_a_rank_has_image_tokens_first_then_caption_tokens():
    layout = Layout.of(2, image=32, captions=(64, 32), heads=30)
    whole = torch.arange(128)[None]
    assert layout.whole.part(whole, 1)[0].tolist() == [*range(16, 32), *range(64, 96), *range(112, 128)]
    assert layout.image.part(whole[:, :32], 1)[0].tolist() == [*range(16, 32)]
    assert layout.joint[0].part(whole[:, :96], 1)[0].tolist() == [*range(16, 32), *range(64, 96)]


def test_a_length_tells_the_sequence():
    layout = Layout.of(3, image=64, captions=(32,), heads=30)
    assert layout.split(0, 22) is layout.image
    assert layout.split(0, 22 + 11) is layout.joint[0]
    with pytest.raises(ValueError, match=r"rank 2 has 21 or 31 tokens in attention, and not 22"):
        layout.split(2, 22)


def test_too_many_ranks():
    with pytest.raises(RequestError, match=r"30 heads .* 31 ranks; use at most 30") as caught:
        check_ranks(31, 30)
    assert caught.value.fields == ("gpus",)
    with pytest.raises(RequestError, match=r"a caption of 32 tokens .* 33 ranks; use at most 32"):
        Layout.of(33, image=64, captions=(32,), heads=40)
    Layout.of(30, image=32, captions=(32,), heads=30)


@pytest.mark.parametrize("size", range(2, 31))
def test_both_captions_of_an_evaluation_are_told_apart(size):
    """On every rank, whatever their lengths: with NAG the image attends twice."""
    for words, others in itertools.permutations(range(32, 161, 32), 2):
        layout = Layout.of(size, image=64, captions=(words, others), heads=30)
        for rank in range(size):
            assert [layout.split(rank, split.lengths[rank]) for split in layout.joint] == list(layout.joint)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_the_formula_counts_every_element_that_changes_its_rank(size):
    """An element moves when the rank of its token is not the rank of its head: three times there, once back."""
    tokens, heads = shares(41, size), shares(30, size)
    of_token = [rank for rank, count in enumerate(tokens) for _ in range(count)]
    of_head = [rank for rank, count in enumerate(heads) for _ in range(count)]
    moved = sum(a != b for a, b in itertools.product(of_token, of_head))
    assert attention_elements(2, 128, tokens, heads) == (3 + 1) * 2 * 128 * moved
