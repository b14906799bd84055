"""`python -m kernel_checks.compiled CAPABILITY [FILE…]`: what every kernel becomes on a GPU, with no GPU at hand.

The ops' own launch code runs on CPU tensors of the published model's sizes through a driver that executes nothing, so
kernels are compiled with the specialisation that a real launch would infer. FILEs with specifications
take the place of the project's kernels. One JSON line per kernel: registers, spills, stack and shared memory as ptxas
reports them, memory and matrix instructions as the machine code has them, occupancy.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from kernel_checks import load
from zimage.kernels import specs
from zimage.kernels.backend import Spec

SHARED_MEMORY = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}  # bytes a block may use
VARIED = (86, 90, 120)  # where variants are compiled, too: sm_80 and sm_89 run the same code as sm_86
WARPS, BLOCKS, REGISTERS = 48, 24, 65_536  # of one multiprocessor of an RTX 4090


class NothingRuns(DriverBase):
    """Enough of a CUDA driver for Triton to compile for `capability` and believe that it launched."""

    def __init__(self, capability: int):
        self.capability = capability
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    @classmethod
    def is_active(cls):
        return True

    def get_device_properties(self, device):
        return {
            "max_shared_mem": SHARED_MEMORY[self.capability],
            "multiprocessor_count": 128,
            "max_num_regs": REGISTERS,
            "warpSize": 32,
        }

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def map_python_to_cpp_type(self, kind):
        return kind

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("nothing runs here")


def launches(call, *arguments) -> list[tuple[object, tuple[int, ...]]]:
    """The compiled kernel and grid of every launch that a call makes."""
    seen, run = [], JITFunction.run

    def recording(self, *args, grid, **options):
        kernel = run(self, *args, grid=grid, **options)
        seen.append((kernel, tuple(grid)))
        return kernel

    JITFunction.run = recording
    try:
        call(*arguments)
    finally:
        JITFunction.run = run
    return seen


def describe(kernel, capability: int) -> dict:
    """What the assembler and the disassembler say of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        target = re.search(r"^\.target (sm_\w+)", kernel.asm["ptx"], re.MULTILINE)[1]
        said = output(get_ptxas(capability).path, "-v", f"--gpu-name={target}", ptx, "-o", Path(folder, "again.cubin"))
        code = output(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    stack, spilled, reloaded = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    )
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return {
        "target": target,
        "registers": registers,
        "stack": stack,
        "spills": spilled + reloaded,
        "shared": shared,
        "memory": dict(Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)[\w.]*)", code))),
        "matrix": dict(Counter(re.findall(r"\b([A-Z]+MMA[\w.]*)", code))),
        "warps": warps,
        "occupancy": occupancy(registers, warps, shared),
    }


def occupancy(registers: int, warps: int, shared: int) -> float:
    """Share of an RTX 4090 multiprocessor's warps that may be resident; registers go in units of 256 per warp."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED_MEMORY[89] // (shared + 1024)
    return min(WARPS // warps, BLOCKS, by_registers, by_shared) * warps / WARPS


def output(*command) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main(capability: int, files: list[str]) -> None:
    triton.runtime.driver.set_active(NothingRuns(capability))
    planted = [value for file in files for value in vars(load(Path(file))).values() if isinstance(value, Spec)]
    for spec in planted or specs():
        if capability < spec.least_capability:
            continue
        arguments = spec.inputs(lambda *shape: torch.zeros(shape, dtype=torch.bfloat16), **spec.model)
        for launch in (spec.launch, *(spec.variants if capability in VARIED else ())):
            for kernel, grid in launches(launch, *arguments):
                print(json.dumps({"op": spec.name, "grid": grid, **describe(kernel, capability)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
