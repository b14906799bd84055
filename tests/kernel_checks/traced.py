"""`python -m kernel_checks.traced KIND…`: what the compiler makes of a block whose kernels are launched.

A transformer block on CPU tensors is traced with the kernels switched on; a driver that executes nothing takes the
launches. One JSON line per kind of matrices ("bf16", a precision, or one of PACKED): graphs and graph breaks for
several lengths, and the kernels and products of the graphs.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
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
from zimage.nn import ggml, layers
from zimage.nn.compile import compile_blocks
from zimage.nn.packed import NVFP4, Grouped, Int4, Packed, PackedLinear, Scaled
from zimage.nn.quant import DTYPES, QuantisedLinear

DIM, HEADS, LENGTHS = 768, 6, (32, 96, 160)  # blocks of 256 divide it
ROTATED = 64  # columns of int8 codes that were rotated together (ConvRot)


class Blocks(nn.Module):
    """As much of a DiT as `compile_blocks` asks for."""

    def __init__(self, block: Block):
        super().__init__()
        self.layers, self.context_refiner, self.noise_refiner = nn.ModuleList([block]), nn.Module(), nn.Module()


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def in_blocks(rows: int, columns: int, kind: str) -> Packed:
    return ggml.GGML(zeros(rows, columns // ggml.NUMBERS[kind] * ggml.BYTES[kind]), kind)


PACKED: dict[str, Callable[[int, int], Packed]] = {  # by (out, in)
    "mxfp8": lambda o, i: Grouped(zeros(o, i, dtype=torch.float8_e4m3fn), zeros(o, i // 32), 32),
    "int4 ConvRot": lambda o, i: Int4(zeros(o, i // 2), torch.ones(o, 1), 64),
    "nvfp4": lambda o, i: NVFP4(zeros(o, i // 2), zeros(o, i // 16, dtype=torch.float8_e4m3fn), torch.ones(())),
    "Q5_1": lambda o, i: in_blocks(o, i, "Q5_1"),
    "Q6_K": lambda o, i: in_blocks(o, i, "Q6_K"),
}


def traced(kind: str) -> dict:
    model, kernels = Blocks(block(kind)), Counter()
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


def block(kind: str) -> Block:
    made = Block(DIM, HEADS, 1e-5, modulated=True).bfloat16().eval().requires_grad_(False)
    linears = [path for path, m in made.named_modules() if isinstance(m, nn.Linear) and "adaLN" not in path]
    for path in linears if kind != "bf16" else ():
        linear = made.get_submodule(path)
        if kind == "rotated":
            codes, scale = torch.ones_like(linear.weight, dtype=torch.int8), torch.ones(())
            linear = PackedLinear(Scaled(codes, scale, rotated=ROTATED))
        packed = PACKED[kind](*linear.weight.shape) if kind in PACKED else None
        made.set_submodule(
            path, PackedLinear(packed) if packed else QuantisedLinear(linear, DTYPES.get(kind, torch.int8))
        )
    return made


def counted(kernels: Counter, graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
    table = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
    for node in graph.graph.nodes:
        if "kernel_idx" in node.kwargs:
            kernel = table.get_kernel(node.kwargs["kernel_idx"])
            kernels[getattr(kernel, "fn", kernel).__module__.rpartition(".")[2]] += 1
        if node.target is torch.nn.functional.linear:
            kernels["linear"] += 1
    return graph


if __name__ == "__main__":
    triton.runtime.driver.set_active(NothingRuns(89))
    _triton.has_triton = lambda: True  # or the compiler would trace into Triton itself
    backend.fuses = lambda *tensors, least_capability: True
    tuning._key = lambda *sizes: str(sizes)
    layers.PIECE = layers.GPU_PIECE  # as on a GPU
    for kind in sys.argv[1:]:
        print(json.dumps({"kind": kind, **traced(kind)}))
