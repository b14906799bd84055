"""One job on several devices: ranks of torch.distributed that compute each picture together.

Names are imported when they are first used: the command line asks `environment.py` for its rank before it needs torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zimage.parallel.follower import follow
    from zimage.parallel.leader import Leader
    from zimage.parallel.ranks import joined

__all__ = ["Leader", "follow", "joined"]

_HOMES = {"Leader": "leader", "follow": "follower", "joined": "ranks"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"zimage.parallel.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'zimage.parallel' has no attribute {name!r}")
