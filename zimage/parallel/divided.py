"""A component divided over ranks while it is in use.

A rank holds all weights and computes its own tokens. Of an evaluation of the DiT

    embed      gives the rank's image tokens
    context    is cut to the rank's caption tokens, and the rotations of its own tokens; so are tokens of controls
    attention  sees whole sequences with some of the heads: see `exchange.py`
    project    takes the rank's image tokens to patches, and gathers those of all ranks

and everything between these looks at one token at a time. Every rank returns the whole velocity, of the same bits. The
context refiner is not divided: it runs once per prompt, on a sequence that is short. Exact strips of a VAE are divided
by `strips.py`; what it computes without strips, every rank does.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zimage.dit.context import Context
from zimage.dit.control import Controlled
from zimage.dit.model import Modulation, ZImageDiT
from zimage.dit.nag import Nag
from zimage.dit.rope import Rotation
from zimage.loading.registry import DIT, VAE
from zimage.parallel.attributes import Change, exchanged
from zimage.parallel.exchange import divided_attention
from zimage.parallel.layout import Layout
from zimage.parallel.ranks import Ranks
from zimage.parallel.strips import divided_walk


def divided(ranks: Ranks, name: str, module: Any) -> AbstractContextManager[None]:
    """Divide a component of this name over the ranks for as long as the context lasts; others stay as they are.

    All ranks must use it in the same way meanwhile. A single rank computes as it does without. Raises RequestError
    where there are too many ranks for a model or a sequence, when it is first evaluated.
    """
    if name == DIT and ranks.size > 1:
        return exchanged([(module, "velocity", partial(divided_velocity, ranks, module))])
    if name == VAE:
        return exchanged([(module, "walk", divided_walk(ranks))])
    return nullcontext()


@torch.no_grad()
def divided_velocity(
    ranks: Ranks,
    dit: ZImageDiT,
    latents: Tensor,
    modulation: Modulation,
    context: Context,
    controls: Sequence[Controlled] = (),
    skipped: Collection[int] = (),
) -> Tensor:
    """`ZImageDiT.velocity`, for inference; never from CUDA graphs, which could not wait for other ranks."""
    image = context.image_rotation.cos.shape[1]
    layout = Layout.of(ranks.size, image, caption_lengths(context), dit.config.n_heads)
    own = [c._replace(tokens=layout.image.part(c.tokens, ranks.rank)) for c in controls]
    with exchanged(_changes(ranks, layout, dit, [control.net for control in controls])):
        return type(dit).velocity(dit, latents, modulation, own_context(context, layout, ranks.rank), own, skipped)


def caption_lengths(context: Context) -> list[int]:
    """Padded tokens of the caption and, with NAG, of the negative one."""
    seen, tokens = context.seen, context.tokens.shape[1]
    return [seen.caption, tokens - seen.caption] if isinstance(seen, Nag) else [tokens]


def own_context(context: Context, layout: Layout, rank: int) -> Context:
    """What a rank needs of a context. Paddings stay those of whole sequences, which its attention sees.

    Its attention gives it back its own tokens with all heads, so that NAG's norms are whole there.
    """
    seen = context.seen
    if isinstance(seen, Nag):
        seen = seen._replace(image=layout.image.lengths[rank], caption=layout.captions.segments[0][rank])
    return Context(
        tokens=layout.captions.part(context.tokens, rank),
        image_rotation=Rotation(*(layout.image.part(turn, rank) for turn in context.image_rotation)),
        rotation=Rotation(*(layout.whole.part(turn, rank) for turn in context.rotation)),
        seen=seen,
    )


def _changes(ranks: Ranks, layout: Layout, dit: ZImageDiT, nets: Iterable[nn.Module]) -> Iterator[Change]:
    """What an evaluation calls, in the form that is divided."""
    own = layout.image.runs[ranks.rank]
    yield dit, "embed", partial(dit.embed, part=slice(own.start, own.stop))
    yield dit, "project", partial(_project, ranks, layout, dit.project)
    divided = (module for part in (dit.noise_refiner, dit.layers, *nets) for module in part.modules())
    for module in dict.fromkeys(divided):  # one ControlNet may be there twice, with two pictures
        if "attend" in vars(module):
            yield module, "attend", partial(divided_attention, ranks, layout, vars(module)["attend"])


def _project(ranks: Ranks, layout: Layout, project: Any, x: Tensor, modulation: Modulation, count: int) -> Tensor:
    """Patch values (B, N, 4·C) of the image tokens of all ranks, without pads; a rank's begin its x (B, l_r, dim)."""
    real = [len(range(run.start, min(run.stop, count))) for run in layout.image.runs]
    return ranks.all_gather("patches", project(x, modulation, real[ranks.rank]), real)
