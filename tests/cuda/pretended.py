"""A pretended NVIDIA GPU: the pipeline runs on `cuda` with shapes and devices, and nothing is computed there.

    with pretend(capability=(8, 9), free=24e9) as card:
        pipe = zimage.ZImage.load(folder)            # device auto is cuda:0
        with card.count() as step:                   # counts may be nested
            pipe.dit.velocity(latents, modulation, context)
        assert not step.syncs and len(step.launches) <= 470 and step.peak <= planned

Tensors on `cuda` are FakeTensors (PyTorch's own: shapes, dtypes, strides, device checks). Tensors on the CPU are real,
so prompts are tokenised and noise levels computed as ever. What comes back from the card is zeros. A Triton kernel is
not run: its name, grid and devices are recorded. What this cannot see: numbers, speed, races, what cuBLAS and cuDNN do.

Recorded are launches (one per PyTorch op that computes, one per Triton kernel), the bytes that they read and write at
least, FLOPs, copies between devices, waits of the host for the card (`.item()`, copies back, blocking copies to it)
with the project's line that caused them, and the storage that is alive. Tensors of two devices in one op or kernel are
an error, and so is a kernel that is launched on another device than its tensors'. Where a SPEC has
`flops(*arguments)`, its kernel's arithmetic is counted too.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch._dynamo  # before anything is replaced: it lists the functions of torch.cuda
import torch.nn.functional as F
from counted import RTX4090, Card, Count, Launch, project_line
from pretended_ops import PretendedOps, attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from zimage import kernels
from zimage.kernels import backend, tuning
from zimage.loading import weights

__all__ = ["RTX4090", "Card", "Count", "needs_pretended", "pretend"]
HERE = Path(__file__).parent
NOWHERE = 1 << 62  # no address: hints to the kernel about it are refused
LARGEST_GRID = (1 << 31, 1 << 16, 1 << 16)
Patches = Iterator[contextlib.AbstractContextManager]


@contextlib.contextmanager
def pretend(devices: int = 1, capability: tuple[int, int] = (8, 9), free: float = 24e9) -> Iterator[Card]:
    """Pretend to have `devices` NVIDIA GPUs of one compute capability with `free` bytes each."""
    guard, card = _guard(), Card(devices, capability, free)
    guard.pretend_devices(devices)
    guard.pretend_current(0)
    with contextlib.ExitStack() as stack:
        ops = PretendedOps(card)
        for patch in (*_torch_patches(card, guard), *_weight_patches(ops.fake), *_kernel_patches(card)):
            stack.enter_context(patch)
        stack.enter_context(ops)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") makes a CPU tensor and copies it
        backend.capability.cache_clear()
        try:
            yield card
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            backend.capability.cache_clear()
            guard.pretend_current(0)


@functools.cache
def _guard() -> ctypes.CDLL:
    """The compiled guard; built once per process, and PyTorch keeps it until the process ends."""
    folder = Path(torch.__file__).parent
    library = Path(tempfile.mkdtemp(prefix="pretended-"), "guard.so")
    command = ["g++", "-std=c++20", "-shared", "-fPIC", HERE / "guard.cpp", "-o", library]
    subprocess.run([*command, f"-I{folder}/include", f"-L{folder}/lib", "-lc10"], check=True, capture_output=True)
    return ctypes.CDLL(str(library))


def why_not() -> str | None:
    """Why there can be no pretended card here, or None."""
    if torch.cuda.is_available():
        return "there is a real GPU"
    if importlib.util.find_spec("triton") is None:
        return "needs the extra `triton`"
    try:
        subprocess.run(["g++", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "needs g++"
    return None


needs_pretended = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


# ------------------------------------------------------------------ torch.cuda


class _Stream:
    """A stream on which nothing runs."""

    def __init__(self, device: object = None, **_: object):
        self.device, self.cuda_stream, self.stream_id = device, 0, 0

    def synchronize(self) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...


class _Event:
    def __init__(self, *_: object, **__: object): ...
    def record(self, *_: object) -> None: ...
    def wait(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, later: object) -> float:
        return 1.0


class _Graph:
    """A CUDA graph of nothing."""

    def replay(self) -> None: ...

    def pool(self) -> tuple[int, int]:
        return 0, 0


@contextlib.contextmanager
def _capture(card: Card, graph: _Graph, *_: object, **__: object) -> Iterator[None]:
    """What a capture may not hold ends it, as on a card."""
    with card.count() as count:
        yield
    if what := [*count.syncs, *(copy.line for copy in count.copies)]:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what[0]}")
    card.captures.append(count)


def _torch_patches(card: Card, guard: ctypes.CDLL) -> Patches:
    def index_of(device: torch.device | str | int | None = None) -> int:
        index = device if device is None or isinstance(device, int) else torch.device(device).index
        return guard.pretended_current() if index is None else index

    def exchange(index: int) -> int:
        before = guard.pretended_current()
        if index >= 0:
            guard.pretend_current(index)
        return before

    major, minor = card.capability
    properties = SimpleNamespace(
        name="Pretended", major=major, minor=minor, total_memory=card.free, multi_processor_count=128
    )
    replaced: dict[str, object] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: card.devices,
        "current_device": guard.pretended_current,
        "set_device": lambda device: guard.pretend_current(index_of(device)),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_capability": lambda device=None: card.capability,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "mem_get_info": lambda device=None: (card.free - card.live[index_of(device)], card.free),
        "memory_allocated": lambda device=None: card.live[index_of(device)],
        "memory_reserved": lambda device=None: card.live[index_of(device)],
        "max_memory_allocated": lambda device=None: card.most[index_of(device)],
        "reset_peak_memory_stats": lambda device=None: card.most.pop(index_of(device), None),
        "set_per_process_memory_fraction": lambda share, device=None: None,
        "empty_cache": lambda: None,
        "_sleep": lambda ticks: None,
        "synchronize": lambda device=None: card.waited(project_line()),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": _Stream,
        "set_stream": lambda stream: None,
        "CUDAGraph": _Graph,
        "graph": functools.partial(_capture, card),
        "graph_pool_handle": lambda: (0, 0),
    }
    for name, value in replaced.items():
        yield mock.patch.object(torch.cuda, name, value)
    yield mock.patch.object(torch.accelerator, "empty_host_cache", card.gave_back)
    yield mock.patch.object(torch._C, "_cuda_endAllocateToPool", create=True)
    yield mock.patch.object(torch.version, "cuda", "13.0")
    yield mock.patch.object(F, "scaled_dot_product_attention", attention(card, F.scaled_dot_product_attention))


# ------------------------------------------------------------------ weights and kernels


def _weight_patches(fake: FakeTensorMode) -> Patches:
    """FakeTensors without devices behind them; those that are streamed stay FakeTensors while they are on the host,
    since `weight.data = …` keeps a tensor's class."""
    data, leave, mark = torch.Tensor.data, weights._leave, weights._marked

    def exchange(weight: FakeTensor, value: Tensor) -> None:
        value = value if isinstance(value, FakeTensor) else fake.from_tensor(value)
        data.__set__(weight, value)
        weight.fake_device = value.fake_device

    def left(model, name, stored, *how):
        return leave(model, name, fake.from_tensor(stored), *how)

    def marked(matrix):
        tensors = {name: fake.from_tensor(x) for name, x in vars(matrix).items() if isinstance(x, Tensor)}
        return mark(dataclasses.replace(matrix, **tensors))

    yield mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda self: True))
    yield mock.patch.object(FakeTensor, "data_ptr", lambda x: NOWHERE + x.untyped_storage()._cdata, create=True)
    yield mock.patch.object(FakeTensor, "data", property(data.__get__, exchange), create=True)
    yield mock.patch.object(FakeTensor, "record_stream", create=True)
    yield mock.patch.object(weights, "_leave", left)
    yield mock.patch.object(weights, "_marked", marked)


def _kernel_patches(card: Card) -> Patches:
    """Triton kernels are recorded instead of run; the first kernel of an op carries the bytes that its SPEC tells."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    costs: list[tuple[int, int, torch.dtype | None]] = []
    for kind in (InterpretedFunction, JITFunction):
        yield mock.patch.object(kind, "run", _recorded_kernel(card, costs))
    yield mock.patch.object(backend, "ACTIVE", True)
    yield mock.patch.object(tuning, "may_time", return_value=False)
    yield mock.patch.object(backend, "_launched_or_computed", lambda launch, reference, *arguments: launch(*arguments))
    for module in (importlib.import_module(f"zimage.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)):
        for spec in kernels.specs_in(module):
            for name in [name for name, value in vars(module).items() if value is spec.launch]:
                yield mock.patch.object(module, name, _costed_launch(costs, spec))


def _recorded_kernel(card: Card, costs: list) -> Callable:
    def run(self, *arguments, grid, warmup=False, **options):
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__qualname__.lstrip('_')}"
        devices = {x.device for x in (*arguments, *options.values()) if isinstance(x, Tensor)}
        current = torch.device("cuda", torch.cuda.current_device())
        fits = all(0 < n < limit for n, limit in zip(grid, LARGEST_GRID, strict=False))
        if devices != {current} or not fits:  # an ordinary error would turn the kernel off and run its reference
            pytest.fail(f"{name} at {project_line()}, with grid {grid} on {current}, is given tensors on {devices}")
        card.launched(Launch(name, current, *(costs.pop() if costs else ())))

    return run


def _costed_launch(costs: list, spec: backend.Spec) -> Callable:
    @functools.wraps(spec.launch)
    def run(*arguments, **options):
        flops = spec.flops(*arguments, **options) if getattr(spec, "flops", None) else 0
        dtype = next(x.dtype for x in arguments if isinstance(x, Tensor)) if flops else None
        costs[:] = [(spec.least_bytes(*arguments, **options), flops, dtype)]
        return spec.launch(*arguments, **options)

    return run
