"""The fused operations of the model, one file per op: plain-PyTorch reference, Triton kernel, dispatch and SPEC.

Off a GPU every op is its reference. Tests and bench walk `specs()`, which finds the specifications in every file of
this folder, so adding an op means adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage.kernels.backend import Spec


def specs() -> list[Spec]:
    """The specification of every op that has a kernel, file by file."""
    from zimage.kernels.backend import Spec

    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [value for module in modules for value in vars(module).values() if isinstance(value, Spec)]
