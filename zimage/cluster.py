"""Ray, which spreads work over processes and machines (Moritz et al. 2018); an optional package that enters here."""

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zimage.errors import ZImageError, install_hint, one_line, quoted

OBJECT_STORE = 256 << 20  # bytes for what travels between the processes of a cluster of our own


def ray_module() -> Any:
    """The package `ray`. Raises ZImageError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported; nobody asked to be counted
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ZImageError(f"several machines need ray, of the extra `ray`; run: {install_hint('ray')}") from None


@contextmanager
def connected(address: str | None = None, cpus: int | None = None, **options: Any) -> Iterator[Any]:
    """The package, connected to a cluster: the one at an address, else one of our own that ends with this.

    `cpus` are those of our own cluster. Raises ZImageError where there is no cluster at the address.
    """
    ray = ray_module()
    own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE, "num_cpus": cpus}
    given = {"address": address} if address else {"address": "local", **own}
    try:
        ray.init(**given, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"no Ray cluster answers at {quoted(address)}" if address else "Ray does not start here"
        raise ZImageError(f"{where} ({one_line(str(error), 200)})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def gpus(address: str) -> int:
    """How many workers a cluster has room for: one on each GPU; one where it has none. Raises ZImageError."""
    with connected(address) as ray:
        return max(1, int(ray.cluster_resources().get("GPU", 0)))
