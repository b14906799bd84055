"""Triton where it can run, and what every op here shares: when to launch its kernel, and its specification.

Triton is imported only on a machine with a GPU (or where it was imported before, as tests do), so a CPU never pays for
it. Where it is missing, decorated kernels stay plain functions that nothing calls.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ACTIVE = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or "triton" in sys.modules)

if ACTIVE:
    import triton
    import triton.language as tl

    jit, constexpr = triton.jit, tl.constexpr
else:
    tl, constexpr = None, object

    def jit(kernel: Callable) -> Callable:
        return kernel


@dataclass(frozen=True)
class Spec:
    """What tests and bench need to know of an op.

    `reference` and `launch` take the same arguments and return the same tensors; `launch` may write over those that
    `in_place` counts. `inputs(make, **sizes)` builds arguments with make(*shape), which draws normal values. `cases`
    are small and ragged; `model` is the published model at 1024 × 1024. `least_bytes(*arguments)` is what must move:
    every input read and every output written once.
    """

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    inputs: Callable[..., tuple]
    cases: tuple[Mapping[str, int], ...]
    model: Mapping[str, int]
    least_bytes: Callable[..., int]
    in_place: tuple[int, ...] = ()
    least_capability: int = 80  # of the GPU
    stores_little: bool = False  # a few results per program: the width of the stores does not matter
    rounds_once: bool = True  # results have the inputs' dtype; False: they are fp32 whatever the inputs


def fuses(*tensors: Tensor) -> bool:
    """Whether a kernel may run on these: on a GPU, with nothing to differentiate (kernels have no backward)."""
    if not (ACTIVE and tensors[0].is_cuda):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n: Triton's blocks have such sizes."""
    return 1 << (n - 1).bit_length()
