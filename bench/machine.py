"""The machine that figures were measured on, and bringing it into a known state."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, commit and versions, for the JSON line."""
    import torch

    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(x.split()[1]) // 1024**2 for x in _lines("/proc/meminfo") if x.startswith("MemTotal")), None)
    return {
        "cpu": (models or [platform.machine()])[0],
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "torch": torch.__version__,
        "commit": _said_by("git", "rev-parse", "--short", "HEAD"),
    }


def describe_gpu(device: Any) -> dict[str, Any]:
    """The GPU, its driver, and the packages that can make a difference on it."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    named = ("triton", "diffusers", "comfy-kitchen", "flash-attn", "xformers", "sageattention")
    return {
        "gpu": torch.cuda.get_device_name(device),
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "cuda": torch.version.cuda,
        "packages": {name: found for name in named if (found := _version(name))},
    }


def _said_by(*command: str) -> str:
    """The first word that a command prints; nothing where it is not installed or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_line() -> str:
    """The command that started this run, with FOLDER in place of the folder of weights."""
    arguments = ["FOLDER" if Path(argument).is_dir() else argument for argument in sys.argv[1:] if argument != "--json"]
    return shlex.join(["python", "-m", "bench", *arguments])


def drop_from_cache(*folders: Path) -> None:
    """Ask the kernel to forget the cached pages of every file in these folders; this needs no privileges."""
    for file in (file for folder in folders for file in folder.rglob("*")):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
