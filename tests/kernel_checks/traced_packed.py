"""`python -m kernel_checks.traced_packed`: what `--compile` makes of packed layers where kernels run, without a GPU.

Dynamo traces CPU tensors as if they were a GPU's, and Triton's driver executes nothing. One JSON line per kind: the
operations of each graph that inputs of two lengths took.
"""

import json

import torch
import triton
from torch import nn
from torch.utils import _triton

from kernel_checks.compiled import NothingRuns
from zimage.kernels import backend
from zimage.nn import ggml, layers
from zimage.nn.packed import NVFP4, Grouped, Int4, Packed, PackedLinear, Scaled

ROWS, COLUMNS = 512, 256


def packed_kinds() -> dict[str, Packed]:
    codes, scale = torch.zeros(ROWS, COLUMNS, dtype=torch.int8), torch.ones(ROWS, 1)
    halves = torch.zeros(ROWS, COLUMNS // 2, dtype=torch.uint8)
    fp8 = codes.view(torch.float8_e4m3fn)
    found: dict[str, Packed] = {
        "fp8": Scaled(fp8, torch.ones(())),
        "mxfp8": Grouped(fp8, torch.zeros(ROWS, COLUMNS // 32, dtype=torch.uint8), 32),
        "int4 ConvRot": Int4(halves, scale, 256),
        "nvfp4": NVFP4(halves, torch.zeros(ROWS, COLUMNS // 16).to(torch.float8_e4m3fn), torch.ones(())),
    }
    for kind in ("Q8_0", "Q5_1", "Q5_K", "Q6_K"):
        width = COLUMNS // ggml.NUMBERS[kind] * ggml.BYTES[kind]
        found[kind] = ggml.GGML(torch.zeros(ROWS, width, dtype=torch.uint8), kind)
    return found


def always(*_: object, **__: object) -> bool:
    return True


def graphs_of(layer: nn.Module) -> list[list[str]]:
    """The functions that every graph calls, for inputs of two lengths."""
    graphs: list[list[str]] = []

    def record(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(type(layer).forward, fullgraph=True, backend=record)
    for length in (32, 96):
        x = torch.zeros(1, length, COLUMNS, dtype=torch.bfloat16)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        compiled(layer, x)
    return graphs


def main() -> None:
    triton.runtime.driver.set_active(NothingRuns(89))
    _triton.has_triton, backend.fuses, layers.PIECE = always, always, layers.GPU_PIECE
    for kind, packed in packed_kinds().items():
        print(json.dumps({"kind": kind, "graphs": graphs_of(PackedLinear(packed))}), flush=True)


if __name__ == "__main__":
    main()
