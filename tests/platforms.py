"""Commands as they would run on Windows or macOS: without the functions, modules and files that these lack.

`python -m tests.platforms win32 '[["gen", "a cat"], …]'` runs each command and prints their statuses. Libraries are
imported first, since only the project's own code is to meet the other system. What is imitated of Windows: an open file
can be neither replaced nor removed, a folder cannot be opened.
"""

import builtins
import ctypes
import json
import os
import pathlib
import signal
import sys
from types import SimpleNamespace

LACKS = {
    "win32": {
        os: "sysconf fork getuid geteuid getgid uname fchmod fchown chown mkfifo posix_fadvise pread pwrite killpg "
        "setsid getpgid sched_getaffinity sched_setaffinity sendfile getloadavg nice memfd_create "
        "O_NONBLOCK O_DIRECTORY O_CLOEXEC O_NOFOLLOW O_SYNC O_DIRECT",
        signal: "pthread_kill pthread_sigmask SIGHUP SIGKILL SIGALRM SIGUSR1 SIGUSR2 SIGPIPE SIGCHLD alarm setitimer",
    },
    "darwin": {
        os: "posix_fadvise sched_getaffinity sched_setaffinity O_DIRECT memfd_create pipe2 copy_file_range eventfd",
        signal: "sigtimedwait sigwaitinfo SIGRTMIN",
    },
}
MODULES = {"win32": "fcntl resource termios tty pty pwd grp", "darwin": "msvcrt winreg"}
AVAILABLE = 7_000_000_000  # bytes of memory that Windows tells


def become(platform: str) -> None:
    import click  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch

    PIL.Image.init()
    torch.set_num_threads(1)
    exists = pathlib.Path.is_file

    def is_file(path: pathlib.Path) -> bool:
        return not str(path).startswith(("/proc", "/sys")) and exists(path)

    pathlib.Path.is_file = is_file
    for module, names in LACKS[platform].items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for name in MODULES[platform].split():
        sys.modules[name] = None
    if platform == "win32":
        _windows()
    sys.platform = platform


def _windows() -> None:
    def memory(status) -> int:
        status._obj.available = AVAILABLE
        return 1

    def nothing(name, *_, **__):
        raise TypeError("Windows has no library of the process itself")

    ctypes.CDLL = nothing
    ctypes.windll = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=memory))
    for name in ("replace", "rename", "unlink", "remove", "link"):
        setattr(os, name, _refusing(getattr(os, name), name))
    os.open = _only_files(os.open)


def _refusing(function, name: str):
    def run(path, *rest, **options):
        named = [path, *rest[:1]] if name != "link" else [path]
        for one in named:
            if _is_open(os.path.realpath(os.fspath(one))):
                raise PermissionError(13, "The process cannot access the file because it is being used", str(one))
        return function(path, *rest, **options)

    return run


def _is_open(path: str) -> bool:
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return any(os.path.realpath(link) == path for link in links if os.path.lexists(link))


def _only_files(function):
    def run(path, *rest, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *rest, **options)

    return run


if __name__ == "__main__":
    become(sys.argv[1])
    from zimage.cli import main

    statuses = [main(command) for command in json.loads(sys.argv[2])]
    builtins.print(json.dumps(statuses))
