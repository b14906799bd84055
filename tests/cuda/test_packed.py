"""Packed files on a pretended card: a step of the published size in every kind, and what loading does with the others."""

import time

import pytest
import torch
from pretended import needs_pretended, pretend
from test_steps import CARD, TOKENS, step
from torch import nn

from bench.card import random_model
from zimage.loading.plan import Workload
from zimage.loading.sizes import dit_bytes
from zimage.nn import ggml
from zimage.nn.packed import NVFP4, Grouped, Int4, PackedLinear, Scaled, widened_bytes

pytestmark = [pytest.mark.cuda, needs_pretended]


def codes(rows, columns, dtype=torch.uint8):
    return torch.zeros(rows, columns, dtype=dtype, device=CARD)


def scale(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=CARD)


E4M3 = torch.float8_e4m3fn
KINDS = {
    "fp8": lambda o, i: Scaled(codes(o, i, E4M3), scale()),
    "fp8 rows": lambda o, i: Scaled(codes(o, i, E4M3), scale(o, 1)),
    "fp8 blocks": lambda o, i: Grouped(codes(o, i, E4M3), scale(o, i // 128), 128),
    "mxfp8": lambda o, i: Grouped(codes(o, i, E4M3), scale(o, i // 32, dtype=torch.uint8), 32),
    "int8": lambda o, i: Scaled(codes(o, i, torch.int8), scale(o, 1)),
    "int8 ConvRot": lambda o, i: Scaled(codes(o, i, torch.int8), scale(o, 1), 256),
    "int4 ConvRot": lambda o, i: Int4(codes(o, i // 2), scale(o, 1), 256),
    "nvfp4": lambda o, i: NVFP4(codes(o, i // 2), scale(o, i // 16, dtype=E4M3), scale()),
    **{
        kind: lambda o, i, k=kind: ggml.GGML(codes(o, i // ggml.NUMBERS[k] * ggml.BYTES[k]), k) for kind in ggml.BYTES
    },
}


def pack_blocks(dit: nn.Module, kind: str) -> None:
    for name, layer in list(dit.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith(("layers.", "noise_refiner.", "context_refiner.")):
            if "adaLN" not in name:
                owner, _, leaf = name.rpartition(".")
                setattr(dit.get_submodule(owner), leaf, PackedLinear(KINDS[kind](*layer.weight.shape)))


def test_a_step():
    with torch.no_grad(), pretend() as card:
        dit = random_model("transformer", CARD)
        plain = step(card, dit, 1024)
        for kind in KINDS:
            t = time.time()
            pack_blocks(dit, kind)
            count = step(card, dit, 1024)
            print(f"{kind:13} {len(count.launches)} {count.bytes/plain.bytes:.3f} {count.bytes/1e9:.1f} {count.peak/1e6:.0f} {count.seconds():.4f} {time.time()-t:.1f}s", count.syncs, count.copies)
            dit = random_model("transformer", CARD)
