"""What rank processes run in tests: a pipeline of their own, divided over the ranks; and the same on one."""

import functools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from test_control_files import peak_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zimage
from zimage.dit.control import Controlled
from zimage.loading.controls import ControlFile
from zimage.parallel.divided import divided
from zimage.parallel.guidance import Halves
from zimage.parallel.ranks import Ranks

HEADS = 6
WIDE = {"dim": 96, "n_heads": HEADS, "n_kv_heads": HEADS, "axes_dims": [4, 6, 6]}  # heads enough for five ranks
CAPTIONS = (9, 40)  # tokens: 32 and 64 when padded
LATENTS = (10, 14)  # 35 image tokens, 64 when padded
Settings = tuple[tuple[str, Any], ...]  # of a pipeline; hashable


@functools.cache
def pipeline(settings: Settings) -> zimage.ZImage:
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in settings}
    return zimage.ZImage.load(device="cpu", **{"dtype": "fp32", **given})


@contextmanager
def shared(pipe: zimage.ZImage, ranks: Ranks | None) -> Iterator[None]:
    """Every component that the pipeline uses meanwhile is divided."""
    plain = pipe.residency.use

    @contextmanager
    def use(name: str, *rest: Any) -> Iterator[Any]:
        with plain(name, *rest) as module, divided(ranks, name, module):
            yield module

    if ranks is not None:
        pipe.residency.use = use
    try:
        yield
    finally:
        pipe.residency.use = plain


def captions(width: int, lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, width, generator=generator) for n in lengths]


def noise(batch: int, size: tuple[int, int] = LATENTS) -> Tensor:
    return torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(4))


def latents(
    ranks: Ranks | None,
    settings: Settings,
    lengths: Sequence[int] = CAPTIONS[:1],
    negative: int = 0,
    nets: Sequence[tuple[str, int]] = (),
    size: tuple[int, int] = LATENTS,
    **options: Any,
) -> Tensor:
    """The end of a run: captions of these lengths in a batch, ControlNets of these files and channels beside."""
    pipe = pipeline(settings)
    width = pipe.model.config("dit").cap_feat_dim
    given = captions(width, (*lengths, negative))
    shown = [(file, torch.randn(1, n, *size, generator=torch.Generator().manual_seed(n))) for file, n in nets]
    others = [given[-1]] * len(lengths) if negative else None
    with shared(pipe, ranks):
        return pipe.denoise(
            given[:-1], noise(len(lengths), size), negative=others, controls=shown, **{"steps": 1, **options}
        )


def drawn(ranks: Ranks, settings: Settings, case: Mapping[str, Any], delays: int = 0) -> tuple[bytes, dict[str, int]]:
    """The bits of `latents` on a rank, and the bytes that it sent; late at random with a seed of `delays`."""
    if delays:
        ranks.exchange = late(ranks.exchange, delays * 100 + ranks.rank)
    found = latents(ranks, settings, **case)
    return found.numpy().tobytes(), dict(ranks.sent)


def drawn_in_halves(
    ranks: Ranks, settings: Settings, case: Mapping[str, Any], delays: int = 0
) -> tuple[bytes, dict[str, int]]:
    """The same with both branches of guidance on halves of the ranks."""
    if delays:
        ranks.exchange = late(ranks.exchange, delays * 100 + ranks.rank)
    halves = Halves.of(ranks)
    found = latents(halves.own, settings, hooks=[halves.hook], **case)
    return found.numpy().tobytes(), dict(ranks.sent + halves.own.sent)


@torch.no_grad()
def operations(ranks: Ranks | None, settings: Settings) -> int:
    """Floating-point operations of products in one evaluation with two unequal captions, on this rank."""
    dit = pipeline(settings).dit
    context = dit.context(dit.refine(captions(dit.config.cap_feat_dim, CAPTIONS)), *LATENTS)
    modulation = dit.modulate(torch.tensor([0.7]))
    with divided(ranks, "dit", dit) if ranks else nullcontext(), FlopCounterMode(display=False) as counter:
        dit.velocity(noise(2), modulation, context)
    return counter.get_total_flops()


@torch.no_grad()
def peak(ranks: Ranks | None, settings: Settings, file: str, side: int, tokens: int) -> int:
    """Bytes that one evaluation of side × side latents with a ControlNet adds to what was there before it.

    gloo lets go of what was sent a moment after it has arrived; that moment is not what is measured.
    """
    if ranks is not None:
        ranks.exchange = late(ranks.exchange, 1)
    pipe, read = pipeline(settings), ControlFile.of(file)
    components = pipe._components(controls=(read,))
    with components.use("dit") as dit, divided(ranks, "dit", dit) if ranks else nullcontext():
        net, sigma = pipe.residency.control(read), torch.tensor([0.7])
        shown = net.embed(torch.randn(1, net.config.control_in_dim, side, side), dit.x_pad_token)
        control = Controlled(net, shown, net.modulate(dit.time(sigma)))
        context = dit.context(dit.refine(captions(dit.config.cap_feat_dim, [tokens])), side, side)
        latents, modulation = noise(1, (side, side)), dit.modulate(sigma)
        return peak_of(lambda: dit.velocity(latents, modulation, context, [control]))


def late(exchange: Any, seed: int) -> Any:
    dice = random.Random(seed)

    def call(*arguments: Any) -> Any:
        time.sleep(dice.random() * 0.01)
        found = exchange(*arguments)
        time.sleep(0.002 + dice.random() * 0.01)
        return found

    return call
