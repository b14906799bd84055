"""How the ranks of a command find one another: in the store that torchrun's agent keeps for them.

The first rank reads the options, and says there how the model is loaded, or that there is nothing to draw together;
only then do the others know on which device they compute.
"""

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from zimage.parallel.ranks import Ranks, joined

KEY = "zimage/plan"
POLL = 0.05  # seconds
# A rank that is gone is noticed at once, by the connection or by torchrun; one that waits for another's work, or for a
# picture that somebody looks at, does right.
PATIENCE = timedelta(days=30)


def announce(plan: Mapping[str, Any] | None) -> None:
    """Tell the other ranks, once, as plain values, what they need to know; None: that they may end."""
    _store().compare_set(KEY, "", json.dumps(plan))  # "": what is not there yet


def announced() -> Any:
    """What the first rank has told, once it has."""
    store = _store()
    while not store.check([KEY]):  # `wait` would not see a signal
        time.sleep(POLL)
    return json.loads(store.get(KEY))


def met(device: torch.device) -> AbstractContextManager[Ranks]:
    """All ranks of the command, each on its device."""
    return joined(device, PATIENCE.total_seconds())


def _store() -> dist.Store:
    store: dist.Store = next(iter(dist.rendezvous("env://")))[0]
    return store
