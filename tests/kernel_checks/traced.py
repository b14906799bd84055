"""`python -m kernel_checks.traced PRECISION…`: what the compiler makes of a block whose kernels are launched.

A transformer block on CPU tensors is traced with the kernels switched on; a driver that executes nothing takes the
launches. One JSON line per precision: graphs and graph breaks for several lengths, and the kernels of the graphs.
"""

import json
import sys
from collections import Counter
from functools import partial
from unittest import mock

import torch
import triton
from torch import nn
from torch.utils import _triton

from kernel_checks.compiled import NothingRuns
from zimage.dit.blocks import Block, BlockModulation
from zimage.dit.rope import Rotation
from zimage.kernels import backend, tuning
from zimage.nn.compile import compile_blocks
from zimage.nn.packed import PackedLinear, Scaled
from zimage.nn.quant import DTYPES, QuantisedLinear

DIM, HEADS, LENGTHS = 384, 3, (32, 96, 160)
ROTATED = 64  # columns of int8 codes that were rotated together (ConvRot)


class Blocks(nn.Module):
    """As much of a DiT as `compile_blocks` asks for."""

    def __init__(self, block: Block):
        super().__init__()
        self.layers, self.context_refiner, self.noise_refiner = nn.ModuleList([block]), nn.Module(), nn.Module()


def traced(precision: str) -> dict:
    model, kernels = Blocks(block(precision)), Counter()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=partial(counted, kernels))):
        compile_blocks(model)
    m = BlockModulation(*(torch.ones(1, 1, DIM, dtype=torch.bfloat16) for _ in range(4)))
    for length in LENGTHS:
        turn = Rotation(*torch.zeros(2, 1, length, DIM // HEADS // 2).unbind())
        model.layers[0](torch.zeros(1, length, DIM, dtype=torch.bfloat16), turn, None, m)
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "kernels": kernels,
    }


def block(precision: str) -> Block:
    made = Block(DIM, HEADS, 1e-5, modulated=True).bfloat16().eval().requires_grad_(False)
    linears = [path for path, m in made.named_modules() if isinstance(m, nn.Linear) and "adaLN" not in path]
    for path in linears if precision != "bf16" else ():
        linear = made.get_submodule(path)
        if precision == "rotated":
            codes, scale = torch.ones_like(linear.weight, dtype=torch.int8), torch.ones(())
            linear = PackedLinear(Scaled(codes, scale, rotated=ROTATED))
        made.set_submodule(path, QuantisedLinear(linear, DTYPES.get(precision, torch.int8)))
    return made


def counted(kernels: Counter, graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
    table = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
    for node in graph.graph.nodes:
        if "kernel_idx" in node.kwargs:
            kernel = table.get_kernel(node.kwargs["kernel_idx"])
            kernels[getattr(kernel, "fn", kernel).__module__.rpartition(".")[2]] += 1
    return graph


if __name__ == "__main__":
    triton.runtime.driver.set_active(NothingRuns(89))
    _triton.has_triton = lambda: True  # or the compiler would trace into Triton itself
    backend.fuses = lambda *tensors, least_capability: True
    tuning._key = lambda *sizes: str(sizes)
    for precision in sys.argv[1:]:
        print(json.dumps({"precision": precision, **traced(precision)}))
