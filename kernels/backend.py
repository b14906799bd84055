"""Triton where it can run, and what all ops share: the decision to launch a kernel, and `Spec`.

Triton is imported only on a machine with a GPU (or if it was imported before, as in tests), so other machines do not
pay for it. Without Triton, decorated kernels stay plain functions that nothing calls.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("zimage")

ACTIVE = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or "triton" in sys.modules)

if ACTIVE:
    import triton
    import triton.language as tl

    jit = triton.jit
else:

    class tl:  # type: ignore[no-redef]
        """Stands in for `triton.language` in the signatures of kernels where Triton is missing."""

        constexpr = object

    def jit(kernel: Callable) -> Callable:
        return kernel


@jit
def _one_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def check_triton(device: torch.device) -> None:
    """Turn the kernels off, and log the reason in one line, if Triton cannot build a kernel for this GPU.

    Triton needs a C compiler and Python's headers at run time, which many machines lack; the references run anywhere.
    """
    global ACTIVE
    if not ACTIVE or device.type != "cuda":
        return
    try:
        enqueue(_one_kernel, (1,), torch.zeros(1, device=device))
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton raises what its tools raise: RuntimeError, CalledProcessError, OSError …
        ACTIVE = False
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(
            "the fused kernels are off, since Triton cannot compile here (%s); renders are slower. "
            "It needs a C compiler and Python's headers (Debian: gcc, python3-dev)",
            reason,
        )


@dataclass(frozen=True)
class Spec:
    """What tests and bench need to know about an op.

    `reference` and `launch` take the same arguments and return the same tensors; `launch` may overwrite the arguments
    at the positions in `in_place`. `inputs(make, **sizes)` builds arguments with make(*shape), which draws normal
    values. `cases` are small, ragged sizes; `model` holds those of the published model at 1024 × 1024.
    `least_bytes(*arguments)` counts what must move: every input is read and every output written once.
    """

    name: str
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    launch: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[..., tuple]
    cases: tuple[Mapping[str, int], ...]
    model: Mapping[str, int]
    least_bytes: Callable[..., int]
    in_place: tuple[int, ...] = ()
    least_capability: int = 75  # of the GPU
    stores_little: bool = False  # a few results per program: the width of the stores does not matter
    levels_of_a_sum: bool = False  # results are quantised after a sum, whose order moves a few by one level
    rounds_once: bool = True  # results have the inputs' dtype; False: they are fp32 whatever the inputs


def fuses(*tensors: Tensor, least_capability: int = 75) -> bool:
    """Whether a kernel may run on these tensors: on a GPU that can, and with nothing to differentiate.

    Kernels have no backward. The oldest GPUs that PyTorch still supports are of compute capability 7.5.
    """
    if not (ACTIVE and tensors[0].is_cuda) or capability(tensors[0].device) < least_capability:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


@cache
def capability(device: torch.device) -> int:
    """A GPU's compute capability as one number: 89 for 8.9."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def enqueue(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: object, **options: object) -> None:
    """Launch a kernel on the GPU of its first argument: Triton launches on the current one, wherever the tensors are.

    Compiled code sets the GPU by itself.
    """
    device = first.device
    if device.type != "cuda" or torch.compiler.is_compiling() or device.index == torch.cuda.current_device():
        kernel[grid](first, *arguments, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](first, *arguments, **options)


def bytes_of(*tensors: Tensor) -> int:
    """The size of the tensors' values together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: Triton's blocks have such sizes."""
    return 1 << (n - 1).bit_length()
