"""Configurations that are timed once, and remembered in a file that anyone may have damaged."""

import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from pretended import needs_pretended, pretend

from zimage.kernels import scaled_product, tuning
from zimage.kernels.scaled_product import CONFIGURATIONS

pytestmark = [pytest.mark.cuda, needs_pretended]
BEST = CONFIGURATIONS[2]


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """The devices on which something was timed; BEST is always the quickest."""
    devices: list[int] = []

    def milliseconds(run, configuration):
        run(configuration)
        devices.append(torch.cuda.current_device())
        return 1.0 if configuration == BEST else 2.0

    with torch.no_grad(), pretend(devices=2):
        monkeypatch.setattr(tuning, "may_time", lambda: True)
        monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
        monkeypatch.setattr(tuning, "file", lambda: tmp_path / "cache" / "tuning.json")
        forget()
        yield devices
        forget()


def forget() -> None:
    """As a new process."""
    tuning._table.cache_clear()
    tuning._key.cache_clear()


def multiply(M: int, N: int = 64, K: int = 64, device: int = 0, dtype: torch.dtype = torch.int8) -> None:
    x, weight = (torch.zeros(n, K, dtype=dtype, device=f"cuda:{device}") for n in (M, N))
    scaled_product.launch(x, x[:, :1].float(), weight, weight[:, :1].float().t(), None, torch.bfloat16)


ONCE = len(CONFIGURATIONS) * tuning.ROUNDS


def test_once_for_each_class_of_sizes_and_process(timed):
    for M, expected in ((4128, 1), (4096, 1), (8191, 1), (32, 2), (33, 2), (4128, 2)):
        multiply(M)
        assert len(timed) == expected * ONCE
    multiply(4128, N=128)
    multiply(4128, K=128)
    assert len(timed) == 4 * ONCE
    forget()
    multiply(4128)
    assert len(timed) == 4 * ONCE
    assert set(tuning.read(tuning.file()).values()) == {BEST}


def test_the_quickest_is_launched(timed, monkeypatch):
    launched, launch_as = [], scaled_product.launch_as
    monkeypatch.setattr(scaled_product, "launch_as", lambda c, *rest: launched.append(c) or launch_as(c, *rest))
    multiply(4128)
    multiply(4128)
    assert launched[-2:] == [BEST, BEST]


def test_fp8_is_never_timed(timed):
    """Its sums are in fp32, and their order depends on the configuration."""
    multiply(4128, dtype=torch.float8_e4m3fn)
    assert not timed


def test_times_are_taken_on_the_tensors_gpu(timed):
    multiply(4128, device=1)
    assert set(timed) == {1}
    assert torch.cuda.current_device() == 0


def test_nothing_is_timed_while_a_graph_is_recorded(timed, monkeypatch):
    monkeypatch.setattr(tuning, "may_time", lambda: False)
    multiply(4128)
    assert not timed
    monkeypatch.setattr(tuning, "may_time", lambda: True)
    multiply(4128)
    assert len(timed) == ONCE


def test_compiled_code_takes_what_serves_the_most_rows(timed):
    device = torch.device("cuda", 0)
    assert tuning.known("int8 product", 64, 64, device, CONFIGURATIONS) == 0
    for M, chosen in ((4128, BEST), (32, CONFIGURATIONS[4])):
        key = tuning._key("int8 product", 64, 64, device, 1 << (M.bit_length() - 1))
        tuning._keep(key, chosen)
    assert CONFIGURATIONS[tuning.known("int8 product", 64, 64, device, CONFIGURATIONS)] == BEST


def test_two_threads_time_once(timed):
    chosen = []

    def choose():
        device = torch.device("cuda", 0)
        chosen.append(tuning._timed("a key", device, CONFIGURATIONS, lambda configuration: time.sleep(1e-3)))

    threads = [threading.Thread(target=choose) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == [BEST] * 4
    assert len(timed) == ONCE


DAMAGED = [
    "",
    "{",
    "[]",
    "5",
    "null",
    '{"a": 5}',
    '{"a": [1, 2]}',
    '{"a": ["x", 1, 1, 1, 1]}',
    '{"a": [1e999, 1, 1, 1, 1]}',
    "[" * 100_000,
    "\x00\xff",
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_costs_another_timing(timed, caplog, text):
    caplog.set_level(logging.DEBUG, "zimage")
    tuning.file().parent.mkdir()
    tuning.file().write_bytes(text.encode("latin-1"))
    multiply(4128)
    assert len(timed) == ONCE
    assert "is not a file of kernel timings" in caplog.text
    assert list(tuning.read(tuning.file()).values()) == [BEST]


def test_a_choice_that_is_not_ours_is_made_anew(timed):
    multiply(4128)
    (key,) = tuning.read(tuning.file())
    tuning.write(tuning.file(), {key: tuning.Configuration(1 << 20, 3, 0, -1, 99), "another": BEST})
    forget()
    multiply(4128)
    assert len(timed) == 2 * ONCE
    assert tuning.read(tuning.file()) == {key: BEST, "another": BEST}


def test_a_folder_that_cannot_be_written_does_not_matter(timed, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "zimage")
    (tmp_path / "a file").touch()
    monkeypatch.setattr(tuning, "file", lambda: tmp_path / "a file" / "tuning.json")
    multiply(4128)
    multiply(4128)
    assert len(timed) == ONCE
    assert "the choice is not remembered" in caplog.text


def test_the_file_is_replaced_at_once(tmp_path, monkeypatch):
    file = tmp_path / "tuning.json"
    tuning.write(file, {"a": BEST})

    def fail(*names):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.write(file, {"b": BEST})
    assert json.loads(file.read_text()) == {"a": list(BEST)}
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.json"]


def test_the_file_lies_in_tritons_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert tuning.file().parent == tmp_path


def test_kernels_import_no_compiler():
    """It takes seconds and 150 MB."""
    code = "import sys, zimage.kernels.scaled_product; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
