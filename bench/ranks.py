"""A step and a decode on several ranks, on paper: what the rank with most to do computes, moves and waits for.

The published model runs on meta tensors as one rank of several, divided by the very code that divides it on GPUs; what
it would exchange is counted. Its time is the sum of three, since nothing of them overlaps:

    computing   arithmetic at the maker's peak, or every weight read once, as `roofline.py` has it
    travelling  the larger of the bytes that a rank sends and gets, at its link's rate; and a latency for each exchange
    packing     two passes over what it sends and two over what it gets, at the rate of its memory

Caption tokens, picture and link are assumptions, and so is that all ranks send at once at the full rate of their links.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.peaks import Peaks
from bench.roofline import Cost, costs, count, quicker_share
from bench.weights import COMPONENTS
from zimage.loading.registry import DIT, VAE
from zimage.loading.weights import on_meta
from zimage.parallel.divided import divided
from zimage.parallel.ranks import Ranks


class Link(NamedTuple):
    """How GPUs of one machine are joined: bytes/s that each sends while it gets as many, and seconds to begin."""

    name: str
    bandwidth: float
    latency: float


NVLINK = Link("NVLink 4, 450 GB/s", 450e9, 20e-6)
LINKS = {
    # Without direct access to one another every byte is copied to the host and from there: half of 31.5 GB/s.
    "rtx4090": Link("PCIe 4.0 × 16 through the host, 15.75 GB/s", 15.75e9, 50e-6),
    "h100": NVLINK,
    "h200": NVLINK,
}


class Counted(Ranks):
    """One of several ranks of which there are no others: counts what it would exchange."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.sent = rank, size, Counter()
        self.exchanges = self.travelling = self.packed = 0  # a number, and bytes

    def exchange(self, kind: str, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        found = [parts[0].new_empty(tuple(shape)) for shape in shapes]
        sends, gets = (self._of_others(tensors) for tensors in (parts, found))
        self.sent[kind] += sends
        self.exchanges += 1
        self.travelling += max(sends, gets)
        self.packed += 2 * sum(map(_bytes, [*parts, *found]))
        return found

    def _of_others(self, tensors: Sequence[Tensor]) -> int:
        """Bytes; every rank has as many of the tensors, one rank's after the other's."""
        each = len(tensors) // self.size
        return sum(_bytes(tensor) for i, tensor in enumerate(tensors) if i // each != self.rank)


class Share(NamedTuple):
    """What one rank does."""

    cost: Cost
    exchanges: int
    travelling: int  # bytes: of each exchange the larger of what is sent and what arrives
    packed: int  # bytes, read and written

    def seconds(self, peaks: Peaks, link: Link, precision: str) -> tuple[float, float]:
        """Computing, and all that is done for other ranks."""
        moving = self.travelling / link.bandwidth + self.exchanges * link.latency + self.packed / peaks.bandwidth
        return self.cost.seconds(peaks, precision), moving


def rank_rows(
    peaks: Peaks, link: Link, numbers: Sequence[int], size: int, tokens: int, precision: str
) -> list[dict[str, str]]:
    """Rows of a table with a column for each number of ranks."""
    rows = []
    for name, share in (("step", step_share), ("decode", decode_share)):
        found = [share(size, tokens, precision, number) for number in numbers]
        times = [each.seconds(peaks, link, precision) for each in found]
        alone = sum(share(size, tokens, precision, 1).seconds(peaks, link, precision))
        label = f"a {name} at {size} × {size}"
        rows += [
            _row(f"**{label}, ms**", numbers, [f"{sum(each) * 1e3:.1f}" for each in times]),
            _row(f"{label}: computing, ms", numbers, [f"{computing * 1e3:.1f}" for computing, _ in times]),
            _row(f"{label}: exchanging, ms", numbers, [f"{moving * 1e3:.1f}" for _, moving in times]),
            _row(f"{label}: MB through a link", numbers, [f"{each.travelling / 1e6:.1f}" for each in found]),
            _row(f"{label}: exchanges", numbers, [str(each.exchanges) for each in found]),
            _row(f"{label}: times as fast", numbers, [f"{alone / sum(each):.2f}" for each in times]),
        ]
    return rows


def _row(label: str, numbers: Sequence[int], values: Sequence[str]) -> dict[str, str]:
    ranks = [f"{number} rank{'s' * (number > 1)}" for number in numbers]
    return {"part": label, **dict(zip(ranks, values, strict=True))}


@cache
def step_share(size: int, tokens: int, precision: str, number: int) -> Share:
    """What the first rank does in an evaluation: of the longest runs of tokens and heads."""
    with on_meta(), torch.no_grad():
        dit, caption, latents = _dit(), torch.zeros(tokens, 2560, dtype=torch.bfloat16), _latents(size)
        context, modulation = dit.context(dit.refine([caption]), *latents.shape[2:]), dit.modulate(torch.zeros(1))
        ranks = Counted(0, number)
        with divided(ranks, DIT, dit):
            _, flops = count(lambda: dit.velocity(latents, modulation, context))
    products = round(quicker_share(dit, precision) * flops.products)
    weights = costs(size, tokens, precision)["step"].bytes
    return _share(Cost(products, flops.total - products, weights), ranks)


@cache
def decode_share(size: int, tokens: int, precision: str, number: int) -> Share:
    """What a rank in the middle does in a decode: one of two has another above it only."""
    with on_meta(), torch.no_grad():
        cls, config, _ = COMPONENTS["vae"]
        vae, ranks = cls.from_config(config).bfloat16(), Counted(number // 2, number)
        with divided(ranks, VAE, vae):
            _, flops = count(lambda: vae.decode(_latents(size), tile_mode="exact"))
    return _share(Cost(0, flops.total, costs(size, tokens, precision)["decode"].bytes), ranks)


def _share(cost: Cost, ranks: Counted) -> Share:
    if ranks.size == 1:
        return Share(cost, 0, 0, 0)  # nothing is divided for one
    return Share(cost, ranks.exchanges, ranks.travelling, ranks.packed)


@cache
def _dit() -> Any:
    cls, config, _ = COMPONENTS["transformer"]
    return cls.from_config(config).bfloat16()


def _latents(size: int) -> Tensor:
    return torch.zeros(1, 16, size // 8, size // 8)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
