"""Triton where it can run, and what all ops share: the choice between a kernel and its reference, and `Spec`.

Triton is imported only on a machine with a GPU (or if it was imported before, as in tests), so other machines do not
pay for it. Without Triton, decorated kernels stay plain functions that nothing calls. It compiles at run time, so that
it may fail at any kernel's first launch, for want of a compiler, of room in its cache or of support for a GPU: then one
line says why, and the op's reference runs from there on. An error of the GPU itself is never hidden.
"""

import contextlib
import errno
import importlib.util
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("zimage")


def _is_wanted() -> bool:
    """Whether Triton is here, and a GPU for it. PyTorch's warning of an old driver is left to `loading.devices`."""
    if "triton" in sys.modules:
        return True
    with warnings.catch_warnings(action="ignore"):
        return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


LEAST_CAPABILITY = 75  # of a GPU that PyTorch and Triton still support, as `capability` counts
ACTIVE = _is_wanted()
BROKEN: Exception | None = None  # why Triton cannot run, until it has been said
FAILED: set[Callable[..., Any]] = set()  # launches that did, whose references run instead

if ACTIVE:
    try:
        import triton
        import triton.language as tl

        jit = triton.jit
    except Exception as error:  # a broken package raises errors of any kind
        ACTIVE, BROKEN = False, error

if not ACTIVE:

    class tl:  # type: ignore[no-redef]
        """Stands in for `triton.language` in the signatures of kernels where Triton is missing."""

        constexpr = object

    def jit(kernel: Callable) -> Callable:
        return kernel


class KernelError(RuntimeError):
    """A kernel could not be built or launched here; the GPU itself is in order, and nothing has been written."""


@jit
def _one_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def check_triton(device: torch.device) -> None:
    """Turn the kernels off, and log the reason in one line, if Triton cannot build a kernel for this GPU."""
    global ACTIVE, BROKEN
    if device.type == "cuda" and ACTIVE and capability(device) >= LEAST_CAPABILITY:
        try:
            enqueue(_one_kernel, (1,), torch.zeros(1, device=device))
            torch.cuda.synchronize(device)
        except KernelError as error:
            ACTIVE, BROKEN = False, error
    if device.type == "cuda" and BROKEN is not None:
        _log_failure("the fused kernels are off, since Triton cannot run here", BROKEN)
        BROKEN = None


@dataclass(frozen=True)
class Spec:
    """What tests and bench need to know about an op.

    `reference` and `launch` take the same arguments and return the same tensors; `launch` may overwrite the arguments
    at the positions in `in_place`. `inputs(make, **sizes)` builds arguments with make(*shape), which draws normal
    values. `cases` are small, ragged sizes; `model` holds those of the published model at 1024 × 1024.
    `least_bytes(*arguments)` counts what must move: every input is read and every output written once; `flops` counts
    the operations of products, which run on tensor cores. `variants` are launches that give the same bits.
    """

    name: str
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    launch: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[..., tuple]
    cases: tuple[Mapping[str, int], ...]
    model: Mapping[str, int]
    least_bytes: Callable[..., int]
    flops: Callable[..., int] | None = None
    variants: tuple[Callable[..., Tensor], ...] = ()
    in_place: tuple[int, ...] = ()
    least_capability: int = LEAST_CAPABILITY  # of the GPU
    stores_little: bool = False  # a few results per program: the width of the stores does not matter
    levels_of_a_sum: bool = False  # results are quantised after a sum, whose order moves a few by one level
    of_rounded: bool = False  # fp32 results tell of values that were rounded to the inputs' dtype
    rounds_once: bool = True  # results have the inputs' dtype; False: they are fp32 whatever the inputs
    exact: bool = False  # the same bits as the reference
    half_only: bool = False  # the op takes its reference in fp32
    narrow_loads: bool = False  # what is read lies at addresses that allow no 128 bits at a time


def choose(
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    *tensors: Tensor,
    least_capability: int = LEAST_CAPABILITY,
) -> Callable[..., Any]:
    """The function of an op for these tensors: its `launch` where a kernel may run on them, else its `reference`.

    A launch that fails is replaced by the reference, now and for the rest of the process.
    """
    if launch in FAILED or not fuses(*tensors, least_capability=least_capability):
        return reference
    return launch if torch.compiler.is_compiling() else partial(_launched_or_computed, launch, reference)


def _launched_or_computed(launch: Callable[..., Any], reference: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return launch(*arguments)
    except KernelError as error:
        FAILED.add(launch)
        name = f"{launch.__module__.rpartition('.')[2]}.{launch.__name__}"
        _log_failure(f"the fused kernel of {name} is off, since it cannot run here", error)
        return reference(*arguments)


def fuses(*tensors: Tensor, least_capability: int = LEAST_CAPABILITY) -> bool:
    """Whether a kernel may run on these tensors: on a GPU that can, and with nothing to differentiate.

    Kernels have no backward.
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

    Compiled code sets the GPU by itself. Raises KernelError, or whatever is wrong with the GPU.
    """
    device = first.device
    if device.type != "cuda" or torch.compiler.is_compiling():
        kernel[grid](first, *arguments, **options)
        return
    elsewhere = device.index != torch.cuda.current_device()
    try:
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            kernel[grid](first, *arguments, **options)
    except Exception as error:  # Triton raises what its tools raise: RuntimeError, CalledProcessError, OSError …
        if "out of memory" in str(error):
            raise
        torch.cuda.synchronize(device)  # raises where the GPU has failed: every call does from then on
        raise KernelError(f"{type(error).__name__}: {error}") from error


def _log_failure(consequence: str, error: Exception) -> None:
    """One line: what happened, and what to do. The whole reason is logged as information."""
    reason = error.__cause__ or error
    first = (str(reason).strip().splitlines() or [""])[0]
    log.warning("%s (%s: %s); renders are slower. %s", consequence, type(reason).__name__, first, _remedy(reason))
    log.info("%s", "".join(traceback.format_exception(reason)).rstrip())


def _remedy(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR):
        return "Set TRITON_CACHE_DIR to a folder that can be written"
    if isinstance(error, ImportError | AttributeError | SyntaxError):
        return "Install it anew, in the version that this PyTorch asks for"
    return "Triton needs a C compiler and Python's headers (Debian: gcc, python3-dev)"


def tokens_per_program(tokens: int) -> int:
    """How many tokens, of all that a kernel works on, one program takes: they share one read of the weights.

    With few tokens it takes few, so that 128 programs, one per multiprocessor of an RTX 4090, share the work from 128
    tokens on. The weights (7.7 KB of bf16 at width 3840) are then read more often, but from the GPU's L2 cache: the
    bytes that tests count per program hold these reads as well (6 % of an RMS norm's with 16 tokens, half with one),
    those that cross the memory bus do not. Three values only, since each compiles a kernel of its own.
    """
    if tokens >= 2048:
        return 16
    return 4 if tokens >= 512 else 1


def bytes_of(*tensors: Tensor) -> int:
    """The size of the tensors' values together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def any_bytes(make: Callable[..., Tensor], *shape: int) -> Tensor:
    """Bytes of any value, for the inputs of a Spec whose codes have no numbers that would be wrong."""
    return (99 * make(*shape)).to(torch.int32).bitwise_and(255).to(torch.uint8)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: Triton's blocks have such sizes."""
    return 1 << (n - 1).bit_length()
