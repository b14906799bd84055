"""What travels between ranks: bits as they are, of every dtype and shape, counted."""

import pytest
import torch

from zimage.parallel.ranks import Ranks

SIZES = (1, 2, 3, 5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.int64, torch.bool]


def part(dtype: torch.dtype, source: int, target: int) -> torch.Tensor:
    """What one rank gives another: (2, source, target + 1), so that nothing comes from rank 0."""
    values = torch.arange(2 * source * (target + 1)).view(2, source, target + 1) + source * 10 + target
    return (values % 2 if dtype is torch.bool else values % 8).to(dtype)


def exchanged(ranks: Ranks, dtype: torch.dtype) -> int:
    """With parts that are not contiguous; returns the bytes sent."""
    others = range(ranks.size)
    parts = [part(dtype, ranks.rank, other).mT.contiguous().mT for other in others]
    found = ranks.exchange("x", parts, [(2, source, ranks.rank + 1) for source in others])
    for source, got in enumerate(found):
        assert got.dtype is dtype
        assert torch.equal(got.double(), part(dtype, source, ranks.rank).double())
    return ranks.sent["x"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank_gets_what_was_meant_for_it(pool, size, dtype):
    sent = pool.run(size, exchanged, dtype)
    counts = [sum(part(dtype, a, b).nbytes for b in range(size) if a != b) for a in range(size)]
    assert sent == counts


def gathered(ranks: Ranks) -> tuple[list[float], int]:
    own = torch.full((1, ranks.rank, 3), float(ranks.rank))
    found = ranks.all_gather("g", own, list(range(ranks.size)))
    return found[0, :, 0].tolist(), ranks.sent["g"]


@pytest.mark.parametrize("size", SIZES)
def test_uneven_parts_are_gathered_in_the_order_of_ranks(pool, size):
    found = pool.run(size, gathered)
    assert [values for values, _ in found] == [[r for r in range(size) for _ in range(r)]] * size
    assert [sent for _, sent in found] == [(size - 1) * rank * 3 * 4 for rank in range(size)]


def told(ranks: Ranks, source: int):
    values = {"steps": 8, "prompts": ["ä cat", None], "scale": 0.1}
    tensors = {
        "a": torch.linspace(0, 1, 6).view(2, 3).bfloat16().T,
        "nothing": torch.empty(0, 4),
        "one": torch.tensor(7),
    }
    mine = ranks.rank == source
    found, got = ranks.share("s", values if mine else "not read", tensors if mine else None, source)
    assert found == values
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensor) and got[name].dtype is tensor.dtype for name, tensor in tensors.items())
    return ranks.sent["s"]


@pytest.mark.parametrize("size", SIZES)
def test_plain_values_and_tensors_are_shared(pool, size):
    sent = pool.run(size, told, size - 1)
    assert sent[:-1] == [0] * (size - 1)
    assert (sent[-1] > 0) == (size > 1)


def broadcast(ranks: Ranks) -> list[float]:
    return ranks.broadcast("b", torch.full((2, 2), float(ranks.rank)), 1).flatten().tolist()


def test_a_tensor_is_broadcast(pool):
    assert pool.run(3, broadcast) == [[1.0] * 4] * 3


def halved(ranks: Ranks) -> tuple[int, int, int, list[int]]:
    own, which = ranks.halves()
    return own.rank, own.size, which, own.all_gather("g", torch.tensor([ranks.rank]), [1] * own.size, dim=0).tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_halves_are_groups_of_their_own(pool, size):
    half = size // 2
    expected = [
        (rank % half, half, rank // half, [*range(rank // half * half, rank // half * half + half)])
        for rank in range(size)
    ]
    assert pool.run(size, halved) == expected
