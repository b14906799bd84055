"""Sockets to listen on: bound before anything is loaded, and never open to other computers without a token."""

import contextlib
import errno
import socket
from collections.abc import Sequence

from zimage.errors import RequestError, quoted
from zimage.serve.hosts import is_loopback, is_unspecified
from zimage.settings.serving import TOKEN, ServeSettings

Address = tuple[socket.AddressFamily, str]
REASONS = {
    errno.EADDRINUSE: "port {port} is in use; pass another one with --port, or 0 for any that is free",
    errno.EACCES: "port {port} may not be used by this user; pass one above 1023 with --port",
    errno.EADDRNOTAVAIL: "host {host} is not an address of this computer",
}


def bind(settings: ServeSettings, token: str | None) -> list[socket.socket]:
    """A socket for each address of the host, all at one port. Raises RequestError."""
    addresses = _addresses(settings.host)
    if token is None and not all(is_loopback(address) for _, address in addresses):
        raise RequestError(
            f"host {settings.host} can be reached from other computers, so clients need a token: write one into a "
            f"file and pass it with --token-file, or set {TOKEN}",
            fields=("host", "token_file"),
        )
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as opened:
        for family, address in addresses:
            port = sockets[0].getsockname()[1] if sockets else settings.port
            sockets.append(opened.enter_context(_bound(family, address, port, settings)))
        opened.pop_all()
    return sockets


def url_of(settings: ServeSettings, sockets: Sequence[socket.socket]) -> str:
    """Where this computer's browsers find the server."""
    host = "127.0.0.1" if is_unspecified(settings.host) else settings.host
    return f"http://{f'[{host}]' if ':' in host else host}:{sockets[0].getsockname()[1]}"


def _addresses(host: str) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise RequestError(f"host {quoted(host)} is not a known name or address", fields=("host",)) from None
    addresses = [(family, str(place[0])) for family, *_, place in found]
    return [(family, a) for family, a in dict.fromkeys(addresses) if family in (socket.AF_INET, socket.AF_INET6)]


def _bound(family: socket.AddressFamily, address: str, port: int, settings: ServeSettings) -> socket.socket:
    # asyncio sends small pieces at once where it knows the protocol; else the body of an answer waits for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # `::` by itself stands for the addresses of IPv4 as well
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, settings.host != "::")
        listener.bind((address, port))
        listener.listen(0)  # another server's port may still be bound, and is refused only here
    except OSError as error:
        listener.close()
        text = REASONS.get(error.errno or 0, f"host {{host}}, port {{port}}: {error.strerror or error}")
        field = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
        raise RequestError(text.format(host=settings.host, port=port), fields=(field,)) from None
    return listener
