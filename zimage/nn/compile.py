"""Regional compilation: the forward of a transformer block is compiled once and serves all blocks of its kind.

The number of tokens is dynamic and everything else static, so another prompt or size does not compile again.
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

TOKENS = 1  # the axis of a block's activations and of its rotation tables
GROUPS = ("context_refiner", "noise_refiner", "layers", "control_noise_refiner", "control_layers")
KINDS = 64  # compilations of a block: by its modulation, its units, and which layers have branches of which ranks


def compile_blocks(dit: nn.Module) -> None:
    """Compile the blocks of a DiT or a ControlNet in place; the first use of each kind takes some seconds."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)  # of the whole process
    torch._dynamo.config.specialize_float = True  # as well: kernels take the units of fp16 as constants
    blocks = [block for name, group in dit.named_children() if name in GROUPS for block in group.children()]
    compiled = torch.compile(type(blocks[0]).forward, fullgraph=True)
    for block in blocks:
        block.forward = partial(_run, compiled, weakref.ref(block))  # a cycle would outlive the model


def _run(
    compiled: Callable[..., Tensor], block: "weakref.ref[nn.Module]", x: Tensor, rotation: tuple[Tensor, ...], *rest
) -> Tensor:
    for tensor in (x, *rotation):
        torch._dynamo.maybe_mark_dynamic(tensor, TOKENS)
    return compiled(block(), x, rotation, *rest)
