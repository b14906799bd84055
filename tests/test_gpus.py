"""GPUs that cannot be used, and those that fail: one line each, and on `auto` a picture where one can be drawn."""

import re
import types

import pytest
import torch
from torch._dynamo import exc
from torch._inductor.exc import InductorError

import zimage.cli
from zimage.cli import faults, main
from zimage.errors import RequestError
from zimage.loading import devices, gpus
from zimage.loading.devices import choose_device

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of PyPI's torch 2.13.0


@pytest.fixture
def machine(monkeypatch):
    """NVIDIA GPUs of settable capability, a CUDA build of PyTorch and its driver, as far as choosing goes."""
    state = types.SimpleNamespace(gpus=[(8, 9)], built=CU130, cuda="13.0", problem=None, seen=True, current=0)

    def init():
        if state.problem:
            raise RuntimeError(state.problem)

    def count():
        return 0 if state.problem or state.cuda is None else len(state.gpus)

    fakes = {
        "is_available": lambda: count() > 0,
        "device_count": count,
        "current_device": lambda: state.current,
        "get_arch_list": lambda: state.built,
        "get_device_capability": lambda i=0: state.gpus[i],
        "get_device_name": lambda i=0: f"card {i}",
        "init": init,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gpus, "_has_nvidia", lambda: state.seen)
    monkeypatch.setattr(torch.version, "cuda", state.cuda)
    for cached in (devices._warn, gpus.why_none):
        cached.cache_clear()
    yield state
    for cached in (devices._warn, gpus.why_none):
        cached.cache_clear()


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 3), (12, 0), (12, 1)])
def test_a_card_that_pytorch_has_code_for_is_taken(machine, caplog, capability):
    machine.gpus = [capability]
    assert choose_device("auto") == choose_device("cuda") == choose_device("cuda:0") == torch.device("cuda", 0)
    assert not caplog.messages


@pytest.mark.parametrize("capability", [(5, 2), (6, 1), (7, 0), (11, 0), (13, 0)])
def test_a_card_that_pytorch_has_no_code_for_is_not(machine, caplog, capability):
    """A GTX 10xx is seen by PyTorch, and the first operation on it ends in "no kernel image"."""
    machine.gpus = [capability]
    for _ in range(3):  # of each component
        assert choose_device("auto") == torch.device("cpu")
    (line,) = caplog.messages
    assert f"card 0 has compute capability {capability[0]}.{capability[1]}" in line
    assert "code for 7.5 to 12.0" in line
    for name in ("cuda", "cuda:0"):
        with pytest.raises(RequestError, match=f"'{name}' cannot be used: card 0 has compute capability") as refused:
            choose_device(name, "dit_device")
        assert refused.value.fields == ("dit_device",)


def test_intermediate_code_serves_later_cards(machine):
    machine.gpus, machine.built = [(13, 0)], ["sm_90", "compute_90"]
    assert choose_device("auto").type == "cuda"
    machine.gpus = [(8, 9)]
    assert choose_device("auto").type == "cpu"


def test_auto_takes_a_second_card_where_the_first_is_too_old(machine, caplog):
    machine.gpus = [(6, 1), (8, 6)]
    assert choose_device("auto") == torch.device("cuda", 1)
    assert not caplog.messages
    machine.gpus, machine.current = [(8, 6), (8, 9)], 1
    assert choose_device("auto") == torch.device("cuda", 1), "the current one first"


def test_a_driver_that_is_too_old_is_said_once(machine, caplog):
    machine.problem = (
        "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by "
        "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
    )
    for _ in range(3):
        assert choose_device("auto") == torch.device("cpu")
    (line,) = caplog.messages
    assert "too old (found version 12040); this PyTorch is built for CUDA 13.0: update the driver" in line
    with pytest.raises(RequestError, match="'cuda' cannot be used: The NVIDIA driver on your system is too old"):
        choose_device("cuda")


def test_a_pytorch_for_cpus_beside_a_card_is_said(machine, monkeypatch, caplog):
    machine.cuda = None
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose_device("auto") == torch.device("cpu")
    (line,) = caplog.messages
    assert "built for CPUs only; install it with --index-url https://download.pytorch.org/whl/cu130" in line
    with pytest.raises(RequestError, match="'cuda' cannot be used: this PyTorch is built for CPUs only"):
        choose_device("cuda")


@pytest.mark.parametrize("hidden", [True, False])
def test_a_machine_without_a_card_hears_nothing(machine, caplog, hidden):
    machine.problem = "No CUDA GPUs are available" if hidden else "Found no NVIDIA driver on your system."
    machine.seen = hidden
    assert choose_device("auto") == torch.device("cpu")
    assert not caplog.messages
    with pytest.raises(RequestError, match="'cuda' is not on this machine; use auto or cpu"):
        choose_device("cuda")


# ------------------------------------------------------------------ failures that reach the command line

AFTER = "\nCUDA kernel errors might be asynchronously reported at some other API call\nFor debugging consider …"
FAILURES = {
    "CUDA error: no kernel image is available for execution on the device": "no code for the GPU",
    "CUDA error: the provided PTX was compiled with an unsupported toolchain.": "no code for the GPU",
    "CUDA error: an illegal memory access was encountered": "CUDA_LAUNCH_BLOCKING=1",
    "CUDA error: misaligned address": "CUDA_LAUNCH_BLOCKING=1",
    "CUDA error: device-side assert triggered": "CUDA_LAUNCH_BLOCKING=1",
    "CUDA error: unspecified launch failure": "CUDA_LAUNCH_BLOCKING=1",
    "CUDA error: uncorrectable ECC error encountered": "nvidia-smi",
    "CUDA error: the launch timed out and was terminated": "smaller size",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable": "another program",
    "CUDA error: CUDA driver version is insufficient for CUDA runtime version": "update the GPU's driver",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`": "report it",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED": "report it",
    "GET was unable to find an engine to execute this computation (cuDNN)": "memory may be short",
    "Triton Error [CUDA]: invalid argument": "report it",
    "Triton Error [CUDA]: an illegal memory access was encountered": "CUDA_LAUNCH_BLOCKING=1",
    "The operator 'aten::_int_mm' is not currently implemented for the MPS device.": "--device cpu",
}


def test_a_gpu_that_is_full_before_anything_is_loaded():
    line = faults.told(torch.AcceleratorError("CUDA error: out of memory" + AFTER))
    assert line.startswith("the GPU failed (AcceleratorError: CUDA error: out of memory); another program holds")


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
@pytest.mark.parametrize("text", FAILURES)
def test_a_gpu_that_fails_is_one_line(tmp_path, monkeypatch, capsys, text, kind):
    def fail(*_):
        raise kind(text + AFTER)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zimage.dit.ZImageDiT.velocity", fail)
    assert main(["gen", "a cat", "--steps", "1", "-q", "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the GPU failed ({kind.__name__}: {text.split(' when')[0]}")
    assert FAILURES[text] in line
    assert "asynchronously" not in line
    assert not list(tmp_path.iterdir())


def compiler_errors():
    yield exc.Unsupported("Attempted to call function marked as skipped\n  Explanation: …")
    yield exc.InternalTorchDynamoError("what happened")
    yield exc.TorchRuntimeError("Dynamo failed to run FX node with fake tensors")
    yield exc.FailOnRecompileLimitHit("recompile_limit reached with fullgraph=True")
    yield exc.BackendCompilerFailed(lambda: None, RuntimeError("no compiler"), None)
    yield InductorError(RuntimeError("Failed to find C compiler"), None)


@pytest.mark.parametrize("error", list(compiler_errors()), ids=lambda error: type(error).__name__)
def test_a_compiler_that_fails_is_one_line(tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zimage.dit.ZImageDiT.velocity", fail)
    assert main(["gen", "a cat", "--steps", "1", "-q", "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"error: --compile failed \({type(error).__name__}: .+\); leave out --compile", line)


def test_the_traceback_of_a_gpus_failure_is_shown_on_request(monkeypatch, capsys):
    monkeypatch.setenv("ZIMAGE_DEBUG", "1")
    assert zimage.cli.unexpected(torch.AcceleratorError("CUDA error: misaligned address"), False) == 1
    err = capsys.readouterr().err
    assert "AcceleratorError" in err.splitlines()[0]
    assert err.splitlines()[-1].startswith("error: the GPU failed")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), TypeError("CUDA"), OSError("CUDA")])
def test_other_faults_are_not_the_gpus(error):
    assert faults.told(error) is None
