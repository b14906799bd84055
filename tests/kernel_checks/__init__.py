"""What the kernel tests stand on: a trustworthy interpreter, and compilation with no GPU at hand."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load(file: Path) -> ModuleType:
    """A Python file as a module."""
    description = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module
