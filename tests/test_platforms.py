"""Windows and macOS, as far as they can be imitated: what they lack is not asked for, and what they tell is heard."""

import ast
import ctypes
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from zimage.errors import RequestError
from zimage.loading import memory
from zimage.loading.devices import choose_dtype
from zimage.loading.memory import available_memory, release_cached
from zimage.nn.quant import check_precision

ROOT = Path(__file__).parent.parent
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
COMMANDS = [
    ["gen", "a cat", "--steps", "1", "-o", "a.png"],
    ["gen", "a dog", "--steps", "2", "-o", "b.png", "--images", "2", "--save-state", "s.state"],
    ["gen", "--from", "b.png", "-o", "c.webp", "--image", "a.png", "--strength", "0.5"],
    ["gen", "a cat", "--steps", "1", "--cache-folder", "cache", "--precision", "int8", "--memory", "2", "-v"],
    ["encode", "a", "-o", "e.safetensors"],
    ["info"],
    ["tokens", "a"],
    ["config", "path"],
    ["weights", "convert", str(ROOT / "weights" / "demo"), "converted"],
    ["weights", "verify", "converted"],
]


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_every_command_runs(platform, tmp_path):
    command = [sys.executable, "-m", "tests.platforms", platform, json.dumps(COMMANDS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ZIMAGE_CONFIG": os.devnull, "ZIMAGE_DEBUG": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [0] * len(COMMANDS), done.stderr
    assert {"a.png", "b.png", "b-2.png", "c.webp", "e.safetensors"} <= set(os.listdir(tmp_path))
    assert "s.state" not in os.listdir(tmp_path)


def test_a_state_is_kept_and_resumed_where_nothing_can_be_locked(monkeypatch, tmp_path):
    from zimage.formats import lock

    monkeypatch.setattr(lock, "fcntl", None)
    path, new = tmp_path / "s", tmp_path / "n"
    first = lock.Lock(path)
    for text in ("one", "two"):
        new.write_text(text)
        first.publish(new)
        new.unlink(missing_ok=True)
        assert path.read_text() == text
    new.write_text("three")
    with pytest.raises(FileExistsError):
        lock.Lock(path).publish(new)
    lock.Lock.of(path).publish(new)
    assert path.read_text() == "three"
    with pytest.raises(FileNotFoundError):
        lock.Lock.of(tmp_path / "nowhere")


def test_windows_tells_its_free_memory(monkeypatch):
    def tell(status):
        assert status._obj.length == ctypes.sizeof(status._obj) == 64  # of MEMORYSTATUSEX
        status._obj.available = 5_000_000_000
        return 1

    kernel = types.SimpleNamespace(GlobalMemoryStatusEx=tell)
    monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "sysconf")
    assert available_memory(CPU) == 5_000_000_000
    kernel.GlobalMemoryStatusEx = lambda status: 0
    with pytest.raises(OSError, match="GlobalMemoryStatusEx failed"):
        available_memory(CPU)


def test_a_mac_tells_all_its_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / name.strip("/"))
    assert available_memory(CPU) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory.process_memory() == 0


def test_the_memory_of_a_macs_gpu(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5_000)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append(True))
    assert available_memory(MPS) == 7_000
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 13_000)
    assert available_memory(MPS) == 0
    release_cached(MPS)
    assert emptied


@pytest.mark.parametrize(("newer", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_macs_gpu_computes_in_bf16_from_macos_14_on(monkeypatch, newer, dtype):
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: newer and (major, minor) <= (14, 0)
    )
    assert choose_dtype(None, MPS) == dtype
    assert choose_dtype("fp32", MPS) == torch.float32


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_macs_gpu_has_no_narrow_products(precision):
    with pytest.raises(RequestError, match=f"precision {precision} does not run on a Mac's GPU"):
        check_precision(precision, MPS, torch.bfloat16)
    check_precision("bf16", MPS, torch.bfloat16)


def test_windows_has_no_products_in_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    check_precision("fp8", CUDA, torch.bfloat16)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RequestError, match="precision fp8 does not run on Windows"):
        check_precision("fp8", CUDA, torch.bfloat16)
    check_precision("int8", CUDA, torch.bfloat16)


# What these modules lack somewhere; where it is used, its line or the one around it asks first.
SOMEWHERE = {
    "os": {"sysconf", "fork", "getuid", "geteuid", "uname", "sched_getaffinity", "posix_fadvise", "pread", "mkfifo"}
    | {"fchmod", "chown", "statvfs", "O_NONBLOCK", "O_DIRECTORY", "O_NOFOLLOW", "killpg", "setsid", "getloadavg"},
    "signal": {"pthread_kill", "pthread_sigmask", "SIGHUP", "SIGKILL", "SIGALRM", "SIGPIPE", "setitimer", "alarm"},
}
ALLOWED = {
    ("zimage/loading/memory.py", "sysconf"),  # after Windows has been told apart
    ("zimage/interrupts.py", "pthread_kill"),  # behind hasattr
}
ABSENT = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog"}  # modules
DOING_WITHOUT = {"zimage/formats/lock.py", "weights/fetch.py", "zimage/serve/listening.py"}


@pytest.mark.parametrize(
    "file", [f for d in ("zimage", "kernels", "weights") for f in sorted((ROOT / d).rglob("*.py"))], ids=str
)
def test_what_not_every_system_has_is_not_used_unasked(file):
    name = file.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in SOMEWHERE.get(node.value.id, ()):
                assert (name, node.attr) in ALLOWED, f"{name}:{node.lineno} uses {node.value.id}.{node.attr}"
        elif isinstance(node, ast.Import):
            absent = ABSENT & {alias.name for alias in node.names}
            assert not absent or name in DOING_WITHOUT, f"{name}:{node.lineno}"
