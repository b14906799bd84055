"""What rank processes run in tests: VAEs in exact strips, divided over the ranks and on one."""

import functools
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tiny import KL, WAN, randomised
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from zimage.parallel import strips
from zimage.parallel.divided import divided
from zimage.parallel.ranks import Ranks
from zimage.vae import AutoencoderKL, AutoencoderKLWan, walk
from zimage.vae.autoencoder import Autoencoder

VAES = {"kl": (AutoencoderKL, KL), "wan": (AutoencoderKLWan, WAN)}


class Case(NamedTuple):
    """Latents of a size (h, w), or the picture that has them; `values` of a strip where its height is not given."""

    size: tuple[int, int]
    height: int | None = None  # pixels
    values: int = 4 << 20
    batch: int = 1
    dtype: torch.dtype = torch.float32
    gpu: bool = False  # the way of a GPU, without kernels
    sleeps: bool = False


@functools.cache
def vae(name: str, dtype: torch.dtype = torch.float32) -> Autoencoder:
    cls, config = VAES[name]
    return randomised(cls.from_config(config), seed=51).eval().requires_grad_(False).to(dtype)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(52))


def both(model: Autoencoder, case: Case) -> list[Tensor]:
    """A decoded picture and encoded latents, in exact strips."""
    h, w = case.size
    latents, picture = noise(case.batch, 16, h, w), noise(case.batch, 3, 8 * h, 8 * w).clamp(-1, 1)
    way = {"tile_size": case.height, "tile_mode": "exact"}
    return [model.decode(latents, **way), model.encode(picture, **way)]


def surroundings(patches: pytest.MonkeyPatch, case: Case, ranks: Ranks) -> None:
    patches.setattr(walk, "strip_values", lambda device: case.values)
    if case.gpu:
        for module in (walk, strips):
            patches.setattr(module, "on_gpu", lambda device: True)
    if case.sleeps:
        patches.setattr(Ranks, "exchange", late(Ranks.exchange, ranks.rank))


def late(exchange: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """An exchange that begins a little later than asked, by chance."""
    chance = random.Random(seed)

    def delayed(*args: Any) -> Any:
        if chance.random() < 0.2:
            time.sleep(0.02 * chance.random())
        return exchange(*args)

    return delayed


def differing(ranks: Ranks, name: str, cases: list[Case]) -> list[tuple[Case, str, float]]:
    """The cases whose bits on several ranks are not those of one, and by how much."""
    found = []
    for case in cases:
        with pytest.MonkeyPatch.context() as patches:
            surroundings(patches, case, ranks)
            model = vae(name, case.dtype)
            plain = both(model, case)
            with divided(ranks, "vae", model):
                shared = both(model, case)
        for way, ours, one in zip(("decode", "encode"), shared, plain, strict=True):
            if not torch.equal(ours, one):
                found.append((case, way, float((ours - one).abs().max())))
    return found


def flops(ranks: Ranks, name: str, case: Case) -> tuple[int, int]:
    """What this rank computes of both ways, and what one rank computes."""
    model, counted = vae(name), []
    for component in ("vae", ""):
        with divided(ranks, component, model), FlopCounterMode(display=False) as counter:
            both(model, case)
        counted.append(counter.get_total_flops())
    return counted[0], counted[1]


class Largest(TorchDispatchMode):
    """The bytes of the largest memory that is taken meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


def largest(ranks: Ranks, name: str, case: Case) -> int:
    """The bytes of the largest memory that this rank takes at once in a decode."""
    with divided(ranks, "vae", vae(name)), Largest() as seen:
        vae(name).decode(noise(1, 16, *case.size), tile_size=case.height, tile_mode="exact")
    return seen.bytes


def sent(ranks: Ranks, name: str, case: Case) -> dict[str, int]:
    """Bytes that this rank sends in a decode, by kind."""
    before = ranks.sent.copy()
    with divided(ranks, "vae", vae(name)):
        vae(name).decode(noise(1, 16, *case.size), tile_size=case.height, tile_mode="exact")
    return dict(ranks.sent - before)
