"""The fused operations of the model, one file per op: plain-PyTorch reference, Triton kernel, dispatch and SPEC.

Off a GPU every op is its reference. Tests and bench walk `specs()`, which finds the specifications in every file of
this folder, so adding an op means adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage.kernels.backend import Spec


def specs() -> list[Spec]:
    """The specification of every op that has a kernel, file by file."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [spec for name in names for spec in specs_in(importlib.import_module(f"{__name__}.{name}"))]


def specs_in(module: ModuleType) -> list[Spec]:
    """Those that a file defines, each by itself or several in a tuple."""
    from zimage.kernels.backend import Spec

    values = [each for value in vars(module).values() for each in (value if isinstance(value, tuple) else (value,))]
    return [each for each in values if isinstance(each, Spec)]
