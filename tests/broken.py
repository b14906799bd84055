"""Packages that are installed and do not work: written as files, in every way that people meet."""

import sys
from pathlib import Path

# What a package's file holds, and what an error about it must tell. None: a folder without files, a namespace package.
KINDS = {
    "built for another PyTorch": (
        "raise ImportError('x.so: undefined symbol: _ZN3c104cuda9SetDevice')",
        "undefined symbol",
    ),
    "a library is missing": ("raise OSError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
    "another version's parts": ("import os\nos.no_such_name", "no_such_name"),
    "another Python's syntax": ("def (:", "SyntaxError"),
    "its extension fails": ("raise RuntimeError('CUDA driver version is insufficient\\nand more')", "insufficient"),
    "it asserts": ("assert False", "AssertionError"),
    "a namespace": (None, "AttributeError"),
    "empty": ("", "AttributeError"),
    "fails at the first call": (
        "def __getattr__(name):\n    def fail(*a, **k): raise TypeError(name)\n    return fail",
        "TypeError",
    ),
    "gives rubbish": ("def __getattr__(name):\n    return lambda q, *a, **k: q * float('nan')", "results differ"),
}


def write(folder: Path, package: str, source: str | None) -> None:
    """A package in `folder`, which must be on the path."""
    forget(package)
    place = folder / package
    place.mkdir()
    if source is not None:
        (place / "__init__.py").write_text(source)


def forget(*packages: str) -> None:
    """Let what was imported be imported anew."""
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]
