"""Failures of a GPU and of PyTorch's compiler, told in one line: what failed, and what to do.

They reach the command line as PyTorch raised them. Their classes are told by name, so that nothing is imported for it.
"""

import re

from zimage.errors import one_line
from zimage.settings.environment import DEBUG

SHOWN = 200  # characters of PyTorch's own words
REPORT = f"run it again; if it stays, please report it with the traceback that {DEBUG}=1 shows"
COMPILERS = ("torch._dynamo.", "torch._inductor.")
GPU = re.compile(r"CUDA|CUBLAS|cuDNN|CUDNN|nvrtc|NVRTC|Triton Error|\bMPS\b|device type", re.ASCII)
# What PyTorch says, and what to do about it.
ADVICE = {
    r"no kernel image|device kernel image is invalid|unsupported toolchain|invalid device function": (
        "this PyTorch has no code for the GPU: see https://pytorch.org/get-started/locally, or pass --device cpu"
    ),
    r"driver version is insufficient|driver on your system is too old|forward compatibility was attempted": (
        "update the GPU's driver, or pass --device cpu"
    ),
    r"illegal memory access|misaligned address|illegal instruction|unspecified launch failure|device-side assert": (
        f"run it again; if it stays, with CUDA_LAUNCH_BLOCKING=1 and {DEBUG}=1, and please report it"
    ),
    r"ECC|device lost|GPU is lost|fallen off|unrecoverable|unknown error|hardware stack error": (
        "the GPU or its driver is at fault: see what nvidia-smi says, and restart the machine"
    ),
    r"launch timed out": "the system's time limit ended it: choose a smaller size, or a GPU without a screen",
    r"out of memory": "another program holds its memory: end that, choose another --device, or pass --device cpu",
    r"busy or unavailable": "another program has the GPU for itself: end that, or pass --device cpu",
    r"unable to find an engine": "memory may be short: set --memory below what is free, or choose a smaller size",
    r"not (currently )?(implemented|supported)": "this device lacks the operation: pass --device cpu",
}


def told(error: Exception) -> str | None:
    """What failed and what to do, where it is the GPU's or the compiler's failure, else None."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")  # others are hints for developers
    reason = one_line(f"{type(error).__name__}: {first}", SHOWN)
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
    if any(kind.startswith(COMPILERS) for kind in kinds):
        return f"--compile failed ({reason}); leave out --compile"
    if "torch.AcceleratorError" not in kinds and not (isinstance(error, RuntimeError) and GPU.search(str(error))):
        return None
    found = (advice for words, advice in ADVICE.items() if re.search(words, str(error)))
    return f"the GPU failed ({reason}); {next(found, REPORT)}"
