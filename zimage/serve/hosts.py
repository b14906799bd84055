"""Under which names a server is reached, and which pages may ask it.

A page of anybody's can let its own name point to this computer (DNS rebinding); the browser then takes the server for
part of that page. It still says in `Host` which name it looked up, so only known ones are answered. A name can be
pointed anywhere, an address cannot: a server that listens on all addresses answers to all of them.
"""

import ipaddress
import re
from collections.abc import Sequence
from typing import NamedTuple

from zimage.errors import RequestError, quoted

AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9_-][a-z0-9._-]{0,252}))(?::([0-9]{1,5}))?", re.IGNORECASE)
ORIGIN = re.compile(r"(https?)://([^/?#]+)")
USUAL = {"http": 80, "https": 443}
THIS_COMPUTER = ("localhost", "127.0.0.1", "::1")


class Place(NamedTuple):
    """A host, an address or a name in small letters, and a port where one was named."""

    host: str
    port: int | None = None


class Hosts:
    """What a server that listens on `host` is called, beside the names that `allowed` adds (NAME or NAME:PORT).

    Raises RequestError for a name that is not one.
    """

    def __init__(self, host: str, allowed: Sequence[str] = ()):
        self._own = {*THIS_COMPUTER, _written(host)}
        self._on_all = is_unspecified(host)
        self._allowed = {_allowed(name) for name in allowed}

    def includes(self, host: str, server: Place) -> bool:
        """Whether a `Host` header names the server; `server`: the address that the connection was made to."""
        place = place_of(host)
        if place is None:
            return False
        if place in self._allowed or Place(place.host) in self._allowed:
            return True
        if self._on_all and is_address(place.host):
            return True  # perhaps at another port: containers and routers map them
        return place.host in {*self._own, server.host} and place.port in (server.port, None)

    def is_own(self, origin: str, host: str) -> bool:
        """Whether a page at `origin` came from here: from the host that it asks, or from one that was allowed."""
        parts = ORIGIN.fullmatch(origin.lower())
        place = place_of(parts[2]) if parts else None
        asked = place_of(host)
        if parts is None or place is None or asked is None:
            return False
        place, asked = _without(place, USUAL[parts[1]]), _without(asked, USUAL[parts[1]])
        return place == asked or place in self._allowed


def place_of(text: str) -> Place | None:
    """Host and port as `Host`, `Origin` and `allow_host` write them, None for anything else."""
    parts = AUTHORITY.fullmatch(text)
    if parts is None:
        return None
    if parts[1] and not is_address(parts[1]):
        return None
    return Place(_written(parts[1] or parts[2].rstrip(".")), int(parts[3]) if parts[3] else None)


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_unspecified(host: str) -> bool:
    """Whether it stands for all addresses of a computer."""
    return is_address(host) and ipaddress.ip_address(host).is_unspecified


def is_loopback(host: str) -> bool:
    """Whether only this computer reaches an address."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def _written(host: str) -> str:
    """An address in its usual form, a name in small letters."""
    return str(ipaddress.ip_address(host)) if is_address(host) else host.lower()


def _allowed(name: str) -> Place:
    place = place_of(name)
    if place is None:
        text = f"allow_host {quoted(name)} should be a name or an address, with a port or without, such as example.org"
        raise RequestError(text, fields=("allow_host",))
    return place


def _without(place: Place, port: int) -> Place:
    return Place(place.host) if place.port == port else place
