"""NVIDIA GPUs that are here and that this PyTorch cannot use: why not, and what would help."""

import re
import shutil
import warnings
from functools import cache
from pathlib import Path

import torch

INDEX = "https://download.pytorch.org/whl"
LOCALLY = "https://pytorch.org/get-started/locally"


def current() -> int:
    """The number of the current GPU. PyTorch begins to use GPUs here, and its warnings are what `why_not` says."""
    with warnings.catch_warnings(action="ignore"):
        return torch.cuda.current_device()


@cache
def why_none() -> str:
    """Why PyTorch sees no GPU although the machine has one; "" where it sees one, or there is none, or it is hidden."""
    if torch.cuda.is_available() or torch.version.hip is not None or not _has_nvidia():
        return ""
    if torch.version.cuda is None:
        return f"this PyTorch is built for CPUs only; install it with --index-url {INDEX}/cu130 --force-reinstall"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        if "No CUDA GPUs are available" in reason:  # the user's own CUDA_VISIBLE_DEVICES
            return ""
        return f"{reason}; this PyTorch is built for CUDA {torch.version.cuda}: update the driver, or see {LOCALLY}"
    return ""


def why_not(index: int) -> str:
    """Why a GPU that PyTorch sees cannot run its code, or ""."""
    built = [(match[1], int(match[2])) for arch in torch.cuda.get_arch_list() if (match := _ARCH.match(arch))]
    if not built or torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    if any(_runs(kind, number, 10 * major + minor) for kind, number in built):
        return ""
    least, most = (f"{n // 10}.{n % 10}" for n in (min(built, key=_number)[1], max(built, key=_number)[1]))
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and this PyTorch has code for "
        f"{least} to {most}; for a build that has, see {LOCALLY}"
    )


_ARCH = re.compile(r"(sm|compute)_(\d+)")


def _number(built: tuple[str, int]) -> int:
    return built[1]


def _runs(kind: str, number: int, capability: int) -> bool:
    """Code for a GPU (sm) runs on later ones of its generation, intermediate code (compute) on all later ones."""
    return number <= capability and (kind == "compute" or number // 10 == capability // 10)


def _has_nvidia() -> bool:
    """Whether the machine has an NVIDIA GPU for its users, as far as files tell."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None
