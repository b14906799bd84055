"""Z-Image in plain PyTorch. Importing this is cheap: whatever is named is imported when it is first used.

import zimage
pipe = zimage.ZImage.load("Z-Image-Turbo")          # no argument: the bundled demo model
pipe.generate("a cat", seed=42).images[0].save("cat.png")
"""

import importlib
from typing import TYPE_CHECKING, Any

from zimage.errors import ZImageError
from zimage.version import __version__

if TYPE_CHECKING:
    from zimage.pipeline import Event, Job, Result, ZImage, load_component
    from zimage.settings import Request

__all__ = ["Event", "Job", "Request", "Result", "ZImage", "ZImageError", "__version__", "load_component"]

_HOMES = dict.fromkeys(("Event", "Job", "Result", "ZImage", "load_component"), "zimage.pipeline")
_HOMES["Request"] = "zimage.settings"
_ROOMS = {"dit", "flow", "pictures", "pipeline", "settings", "text", "vae"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"zimage.{name}")
    raise AttributeError(f"module 'zimage' has no attribute {name!r}")
