"""Kernels that cannot be built: their references run and one line says why; errors of the GPU are not hidden."""

import importlib
import pkgutil
import runpy
import subprocess
import sys
import types

import broken
import pytest
import torch

from zimage import kernels
from zimage.kernels import backend, norm, tuning
from zimage.kernels.backend import KernelError, check_triton, choose, enqueue
from zimage.kernels.norm import reference, rms_norm_scale

GPU = torch.device("cuda", 0)
FIRST = types.SimpleNamespace(device=GPU)  # a tensor on it, as far as launching goes
# What Triton 3.7 raises, and what a user is told to do.
FAILURES = {
    "no compiler": (RuntimeError("Failed to find C compiler. Please specify via CC.\nmore"), "gcc, python3-dev"),
    "no headers": (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "gcc, python3-dev"),
    "no such compiler": (FileNotFoundError(2, "No such file or directory", "cc"), "gcc, python3-dev"),
    "a cache that is not ours": (PermissionError(13, "Permission denied", "/x"), "TRITON_CACHE_DIR"),
    "a disk that is read-only": (OSError(30, "Read-only file system", "/x"), "TRITON_CACHE_DIR"),
    "a disk that is full": (OSError(28, "No space left on device"), "TRITON_CACHE_DIR"),
    "its driver was built elsewhere": (ImportError("cuda_utils.so: undefined symbol"), "Install it anew"),
}


class Kernel:
    """A kernel whose launch fails."""

    def __init__(self, error):
        self.error, self.launches = error, 0

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches += 1
            raise self.error

        return launch


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is in order, as far as launching goes."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(backend, "ACTIVE", True)
    monkeypatch.setattr(backend, "BROKEN", None)
    monkeypatch.setattr(backend, "FAILED", set())
    monkeypatch.setattr(backend, "fuses", lambda *_, **__: True)
    backend.capability.cache_clear()
    yield
    backend.capability.cache_clear()


@pytest.mark.parametrize("failure", FAILURES)
def test_where_triton_cannot_compile_the_kernels_are_off(gpu, monkeypatch, caplog, failure):
    error, remedy = FAILURES[failure]
    monkeypatch.setattr(backend, "_one_kernel", Kernel(error))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: FIRST)
    for _ in range(2):
        check_triton(GPU)
    assert not backend.ACTIVE
    (line,) = caplog.messages
    assert remedy in line
    assert "\n" not in line
    assert str(error).splitlines()[0] in line


@pytest.mark.parametrize("failure", FAILURES)
def test_a_kernel_that_fails_later_leaves_its_work_to_the_reference(gpu, monkeypatch, caplog, failure):
    """The first kernel may run and another not: no `ptxas` for its options, a size or a dtype that it does not take."""
    error, remedy = FAILURES[failure]
    kernel = Kernel(error)
    monkeypatch.setattr("zimage.kernels.norm._kernel", kernel)
    monkeypatch.setattr(
        "zimage.kernels.norm.enqueue", lambda kernel, grid, first, *rest, **_: enqueue(kernel, grid, FIRST)
    )
    x, weight, scale = torch.randn(1, 3, 8), torch.randn(8), torch.randn(1, 1, 8)
    for _ in range(3):
        assert torch.equal(rms_norm_scale(x, weight, scale, 1e-5), reference(x, weight, scale, 1e-5))
    assert kernel.launches == 1
    assert backend.ACTIVE, "the other kernels go on"
    (line,) = caplog.messages
    assert "norm.launch" in line
    assert remedy in line
    assert "\n" not in line


def test_the_whole_reason_is_told_on_request(gpu, caplog):
    def launch():
        enqueue(Kernel(RuntimeError("first\nsecond")), (1,), FIRST)

    caplog.set_level("INFO", "zimage")
    choose(launch, lambda: None)()
    assert any("Traceback" in line and "second" in line for line in caplog.messages)


def test_an_error_of_the_gpu_is_not_hidden(gpu, monkeypatch, caplog):
    """After an illegal access every call fails: a reference would only fail later, and elsewhere."""

    def lost(device):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)

    def launch():
        enqueue(Kernel(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")), (1,), FIRST)

    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        choose(launch, lambda: "computed")()
    assert not caplog.messages
    assert not backend.FAILED


def test_a_lack_of_memory_is_not_a_failure_of_a_kernel(gpu):
    def launch():
        enqueue(Kernel(RuntimeError("Triton Error [CUDA]: out of memory")), (1,), FIRST)

    with pytest.raises(RuntimeError, match="out of memory") as raised:
        choose(launch, lambda: "computed")()
    assert not isinstance(raised.value, KernelError)


def test_a_fault_of_a_launch_is_not_hidden(gpu):
    def launch(x):
        return x.no_such_attribute

    with pytest.raises(AttributeError):
        choose(launch, lambda x: x)(torch.zeros(1))


@pytest.mark.parametrize(
    "kind", [kind for kind in broken.KINDS if kind not in ("fails at the first call", "gives rubbish")]
)
def test_a_triton_that_cannot_be_imported_is_done_without(monkeypatch, tmp_path, kind):
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    source, tells = broken.KINDS[kind]
    broken.write(tmp_path, "triton", source)
    again = runpy.run_path(backend.__file__, run_name="zimage.kernels.again")
    broken.forget("triton")
    assert not again["ACTIVE"]
    if source:
        assert tells in f"{type(again['BROKEN']).__name__}: {again['BROKEN']}"


def test_a_triton_that_could_not_be_imported_is_told_once(gpu, monkeypatch, caplog):
    monkeypatch.setattr(backend, "ACTIVE", False)
    monkeypatch.setattr(backend, "BROKEN", OSError("libtriton.so: cannot open shared object file"))
    check_triton(torch.device("cpu"))
    assert not caplog.messages
    check_triton(GPU)
    check_triton(GPU)
    (line,) = caplog.messages
    assert "libtriton.so" in line


def test_a_configuration_that_cannot_be_built_is_left_out(monkeypatch):
    """A card with less shared memory than a 4090 keeps the kernel, in another size."""
    large, small = (tuning.Configuration(rows, 128, 64, 8, 3) for rows in (256, 64))
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, configuration: configuration.warps)

    def run(configuration):
        if configuration in unable:
            raise KernelError("OutOfResources: out of resource: shared memory, Required: 147456")

    unable = [large]
    assert tuning.fastest([large, small], run) == small
    unable.append(small)
    with pytest.raises(KernelError, match="OutOfResources"):
        tuning.fastest([large, small], run)


def test_compiled_code_chooses_too(gpu, monkeypatch):
    """In one graph, and anew once a launch has failed elsewhere."""
    monkeypatch.setattr("zimage.kernels.norm.launch", lambda x, weight, scale, eps: 2 * x)
    x, weight, scale = torch.randn(1, 3, 8), torch.randn(8), torch.randn(1, 1, 8)
    compiled = torch.compile(lambda: rms_norm_scale(x, weight, scale, 1e-5), fullgraph=True, backend="eager")
    assert torch.equal(compiled(), 2 * x)
    backend.FAILED.add(norm.launch)
    assert torch.equal(compiled(), reference(x, weight, scale, 1e-5))


def test_every_op_chooses_by_this_one_function():
    """One that asked `fuses` itself would end a render where its kernel cannot be built."""
    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"zimage.kernels.{found.name}")
        if module is not backend:
            assert not hasattr(module, "fuses"), found.name
