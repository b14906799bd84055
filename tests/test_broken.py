"""`gen` with packages that are installed and broken, on a GPU as far as choosing goes: a picture, or one line."""

import broken
import pytest
import torch

from zimage.cli import main
from zimage.loading import residency
from zimage.nn import attention

GPU = torch.device("cuda", 0)
RENDER = ["gen", "a cat", "--steps", "1", "-q", "-o", "cat.png", "--device", "cpu"]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Attention is chosen as for a Hopper GPU, from packages in a folder; all is computed on the CPU."""
    choose, samples = residency.choose_attention, attention._samples
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention, "_samples", lambda device, *rest: samples(torch.device("cpu"), *rest))
    monkeypatch.setattr(residency, "choose_attention", lambda name, device, *rest: choose(name, GPU, *rest))
    monkeypatch.setattr(attention, "FAILED", set())
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(packages)
    monkeypatch.chdir(tmp_path)
    yield packages
    broken.forget("flash_attn_interface", "flash_attn")


@pytest.mark.parametrize("kind", broken.KINDS)
def test_auto_draws_a_picture_and_says_so_in_one_line(gpu, tmp_path, capsys, kind):
    source, tells = broken.KINDS[kind]
    broken.write(gpu, "flash_attn_interface", source)
    assert main([*RENDER, "--dtype", "bf16"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: attention: PyTorch's own runs, since flash3 does not work here (")
    assert tells in line
    assert (tmp_path / "cat.png").is_file()


@pytest.mark.parametrize("kind", broken.KINDS)
@pytest.mark.parametrize(("name", "package"), [("flash3", "flash_attn_interface"), ("flash2", "flash_attn")])
def test_a_named_one_is_refused_in_one_line(gpu, tmp_path, capsys, name, package, kind):
    source, tells = broken.KINDS[kind]
    broken.write(gpu, package, source)
    assert main([*RENDER, "--dtype", "bf16", "--attention", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: attention {name} does not work here (")
    assert tells in line
    assert not (tmp_path / "cat.png").exists()


def test_the_whole_reason_with_v(gpu, capsys):
    broken.write(gpu, "flash_attn_interface", "raise OSError('libcudart.so.12')")
    assert main([*[word for word in RENDER if word != "-q"], "--dtype", "bf16", "-v"]) == 0
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "flash_attn_interface/__init__.py" in err


@pytest.mark.parametrize("arguments", [["--attention", "sage"], ["--attention", "xformers"]])
def test_what_cannot_be_compiled_is_refused(gpu, capsys, arguments):
    assert main([*RENDER, "--dtype", "bf16", "--compile", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be compiled; use sdpa, or leave out --compile" in line
