"""Ray, which spreads work over processes and machines (Moritz et al. 2018); an optional package that enters here."""

import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zimage.errors import ZImageError, install_hint, one_line, quoted

OBJECT_STORE = 256 << 20  # bytes for what travels between the processes of a cluster of our own
PATIENCE = 10.0  # seconds that the port of a cluster may take to answer


def ray_module() -> Any:
    """The package `ray`. Raises ZImageError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported; nobody asked to be counted
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what its C++ says to the terminal is for its developers
    has_token = os.environ.get("RAY_AUTH_TOKEN") or os.path.exists(os.path.expanduser("~/.ray/auth_token"))
    if has_token and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # a cluster by `ray start` asks for what that wrote there
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
    if address:
        _check_reachable(address)
    own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE, "num_cpus": cpus}
    given = {"address": address} if address else {"address": "local", **own}
    try:
        with _handlers_kept(), _unsaid():
            ray.init(**given, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        ray.shutdown()
        where = f"no Ray cluster answers at {quoted(address)}" if address else "Ray does not start here"
        raise ZImageError(f"{where} ({one_line(str(error), 200)})") from error
    # What raylets tell of workers that died would go to standard output; callers tell it in their own words.
    setattr(importlib.import_module("ray._private.worker"), "_worker_logs_enabled", False)  # noqa: B010 - untyped
    try:
        yield ray
    finally:
        ray.shutdown()


def gpus(address: str) -> int:
    """How many workers a cluster has room for: one on each GPU; one where it has none. Raises ZImageError."""
    with connected(address) as ray:
        return max(1, int(ray.cluster_resources().get("GPU", 0)))


def get(reference: Any) -> Any:
    """What a reference stands for, waited for. Raises the ZImageError of a task, or one on what became of it."""
    ray = ray_module()
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ZImageError) else _lost(error) from error
    except ray.exceptions.RayError as error:
        raise _lost(error) from error


@contextmanager
def in_cluster() -> Iterator[None]:
    """Errors of Ray inside are ZImageErrors."""
    try:
        yield
    except ray_module().exceptions.RayError as error:
        raise _lost(error) from error


def _lost(error: Exception) -> ZImageError:
    """An error of Ray, whose first line says what happened and whose last one why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
    return ZImageError(f"the cluster failed ({type(error).__name__}: {one_line(told, 400)})")


def _check_reachable(address: str) -> None:
    """Raise ZImageError where nobody listens at a HOST:PORT, which Ray takes minutes to find out."""
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        told = f"no Ray cluster answers at {quoted(address)} ({error.strerror or error})"
        raise ZImageError(told) from None


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and ends without tidying up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _unsaid() -> Iterator[None]:
    """Ray's C++ greets on the terminal, past Python."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
