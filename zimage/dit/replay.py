"""The DiT's velocity, replayed from CUDA graphs where launching it takes longer than computing it.

A graph is captured for each shape of latents and captions, each choice of units in fp16 and of layers to skip. The
latents, the modulation and the context are its inputs, so one graph serves all steps, prompts and guidance; the weights
are not, so `forget` must be called when they move. An evaluation with ControlNets is never captured: each of their
blocks is work of its own, a graph would be captured for every choice of files and scales, and it would hold their
weights.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from zimage.dit.blocks import BlockModulation
from zimage.dit.context import Context
from zimage.dit.control import Controlled
from zimage.dit.model import Modulation, ZImageDiT, ZImageDiTConfig
from zimage.dit.nag import Nag, is_ragged
from zimage.dit.rope import Rotation
from zimage.dit.units import Units
from zimage.nn.graphs import Graphs, captured

# An evaluation's launches take 6 ms of Python at the least, and an H100's host took 22 to 58, while it computes 14
# TFLOP in some 20: with more, graphs gain nothing. It is 512 × 512 pixels for the published model, and any picture for
# the demo.
LARGEST = 14e12  # FLOP
KEPT = 8  # shapes


def replay_velocity(dit: ZImageDiT, graphs: Graphs) -> None:
    """Exchange the `velocity` of this model."""
    vars(dit)["velocity"] = ReplayedVelocity(dit, graphs)


def forget_graphs(dit: torch.nn.Module) -> None:
    """Drop what was captured, because weights are about to be exchanged."""
    if isinstance(replayed := vars(dit).get("velocity"), ReplayedVelocity):
        replayed.captured.clear()


def pays(config: ZImageDiTConfig, tokens: int) -> bool:
    """Whether a graph is quicker for `tokens` of images and captions together, over the whole batch."""
    return tokens <= most_tokens(config)


def most_tokens(config: ZImageDiTConfig) -> int:
    """The most tokens for which a graph is captured: 12·dim² weights a block, each multiplied and added once."""
    blocks = config.n_layers + config.n_refiner_layers
    return int(LARGEST / (2 * 12 * config.dim**2 * blocks))


class ReplayedVelocity:
    """`ZImageDiT.velocity` of one model, which it does not keep alive: a cycle would outlive it."""

    def __init__(self, dit: ZImageDiT, graphs: Graphs):
        self._dit, self._graphs = weakref.ref(dit), graphs
        self.captured: dict[tuple, Callable[..., Tensor]] = {}

    def __call__(
        self,
        latents: Tensor,
        modulation: Modulation,
        context: Context,
        controls: Sequence[Controlled] = (),
        skipped: Collection[int] = (),
    ) -> Tensor:
        dit = self._dit()
        assert dit is not None  # its caller holds it
        tokens = len(latents) * context.rotation.cos.shape[1]
        if controls or is_ragged(context.seen) or torch.is_grad_enabled() or not pays(dit.config, tokens):
            return type(dit).velocity(dit, latents, modulation, context, controls, skipped)
        inputs, left_out = list(_tensors(latents, modulation, context)), tuple(skipped)
        varying = latents, modulation.final, context.tokens, context.rotation.cos
        nag = context.seen[1:] if isinstance(context.seen, Nag) else None  # all but its scale
        key = (modulation.units, nag, left_out, *((x.shape, x.dtype, x.device) for x in varying))
        if key not in self.captured:
            while len(self.captured) >= KEPT:
                del self.captured[next(iter(self.captured))]
            image_tokens = context.image_rotation.cos.shape[1]
            run = partial(_evaluated, self._dit, image_tokens, nag, modulation.units, left_out)
            self.captured[key] = captured(run, inputs, self._graphs)
        return self.captured[key](*inputs)


def _tensors(latents: Tensor, modulation: Modulation, context: Context) -> Iterator[Tensor]:
    """All that an evaluation reads besides weights; the image's rotation is the beginning of the joint one."""
    yield from (latents, context.tokens, *context.rotation, modulation.final)
    for block in (*modulation.noise_refiner, *modulation.layers):
        yield from block
    if isinstance(context.seen, Nag):
        yield context.seen.scale


def _evaluated(
    reference: "weakref.ref[ZImageDiT]",
    image_tokens: int,
    nag: tuple | None,
    units: Units,
    skipped: Collection[int],
    *tensors: Tensor,
) -> Tensor:
    """The velocity from the tensors in the order of `_tensors`; numbers stay those of the capture."""
    dit = reference()
    assert dit is not None
    latents, captions, cos, sin, final, *parts = tensors
    seen = None if nag is None else Nag(parts.pop(), *nag)
    blocks = [BlockModulation(*parts[i : i + 4]) for i in range(0, len(parts), 4)]
    refiners = len(dit.noise_refiner)
    joint, image = Rotation(cos, sin), Rotation(cos[:, :image_tokens], sin[:, :image_tokens])
    modulation = Modulation(blocks[:refiners], blocks[refiners:], final, units)
    return type(dit).velocity(dit, latents, modulation, Context(captions, image, joint, seen), (), skipped)
