"""Z-Image in plain PyTorch. Importing this is cheap: torch is loaded when something that needs it is first used.

import zimage
pipe = zimage.ZImage.load("Z-Image-Turbo")          # no argument: the bundled demo model
pipe.generate("a cat", seed=42).images[0].save("cat.png")
"""

import importlib
from typing import TYPE_CHECKING, Any

from zimage.errors import ZImageError
from zimage.settings import Request
from zimage.version import __version__

if TYPE_CHECKING:
    from zimage.pipeline import Event, Job, Result, ZImage, load_component

__all__ = ["Event", "Job", "Request", "Result", "ZImage", "ZImageError", "__version__", "load_component"]

_FROM_PIPELINE = {"Event", "Job", "Result", "ZImage", "load_component"}
_SUBPACKAGES = {"dit", "flow", "pictures", "pipeline", "text", "vae"}


def __getattr__(name: str) -> Any:
    if name in _FROM_PIPELINE:
        return getattr(importlib.import_module("zimage.pipeline"), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"zimage.{name}")
    raise AttributeError(f"module 'zimage' has no attribute {name!r}")
