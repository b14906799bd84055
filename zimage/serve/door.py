"""Who may come in: whoever sends the token, as Bearer, as the password of HTTP Basic, or by the page's cookie.

The cookie is not the token. It holds when it ends and a code over that, which only the token's holder can make:
`ENDS.HMAC-SHA256(token, ENDS)`. A new token makes all of them void; nothing is kept on the server.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

COOKIE = "zimage_session"
LASTS = 30 * 24 * 3600  # seconds
TRIES, WINDOW = 10, 60.0  # wrong tokens from an address in so many seconds
ADDRESSES = 10_000  # that are remembered
Clock = Callable[[], float]


class Door:
    """A token to compare with; None: everybody may come in."""

    def __init__(self, token: str | None = None, clock: Clock = time.time):
        self._token, self._clock = token, clock

    @property
    def is_locked(self) -> bool:
        return self._token is not None

    def knows(self, token: str) -> bool:
        """Whether it is the token; takes as long for any that is wrong."""
        return self._token is None or hmac.compare_digest(_digest(token), _digest(self._token))

    def opens(self, authorization: str | None, cookies: str | None) -> bool:
        """Whether the headers of a request, `Authorization` and `Cookie`, hold the token or a valid cookie."""
        given = credential(authorization)
        return not self.is_locked or self._is_session(cookies) or (given is not None and self.knows(given))

    def cookie(self, secure: bool) -> str:
        """A `Set-Cookie` for who knows the token; `secure`: browsers may send it over https only."""
        ends = str(int(self._clock()) + LASTS)
        return _cookie(f"{ends}.{self._code(ends)}", LASTS, secure)

    def _is_session(self, cookies: str | None) -> bool:
        ends, _, code = _named(cookies).partition(".")
        if not (ends.isascii() and ends.isdigit() and len(ends) < 16 and int(ends) > self._clock()):
            return False
        return hmac.compare_digest(_digest(code), _digest(self._code(ends)))

    def _code(self, ends: str) -> str:
        return hmac.new((self._token or "").encode(), f"{COOKIE} {ends}".encode(), hashlib.sha256).hexdigest()


class Brake:
    """Counts wrong tokens by address, so that nobody can try them by the thousand."""

    def __init__(self, clock: Clock = time.monotonic):
        self._clock = clock
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds until an address may try again; 0: now."""
        times = self._wrong.get(_network(address), deque())
        return max(0.0, times[0] + WINDOW - self._clock()) if len(times) == TRIES else 0.0

    def count(self, address: str) -> None:
        """A wrong token came from an address."""
        network = _network(address)
        self._wrong.setdefault(network, deque(maxlen=TRIES)).append(self._clock())
        self._wrong.move_to_end(network)
        if len(self._wrong) > ADDRESSES:
            self._wrong.popitem(last=False)


def no_cookie() -> str:
    """A `Set-Cookie` that ends a session."""
    return _cookie("", 0, secure=False)


def credential(authorization: str | None) -> str | None:
    """The token in an `Authorization` header: Bearer's, or the password of Basic."""
    scheme, _, rest = (authorization or "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _cookie(value: str, lasts: int, secure: bool) -> str:
    end = "; Secure" if secure else ""
    return f"{COOKIE}={value}; Path=/; Max-Age={lasts}; HttpOnly; SameSite=Strict{end}"


def _named(cookies: str | None) -> str:
    try:
        found = SimpleCookie(cookies or "").get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _digest(text: str) -> bytes:
    """As long for every text, so that comparing tells nothing of its length."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _network(address: str) -> str:
    """Who has one address of IPv6 has a whole /64 of them."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address) or ip.ipv4_mapped:
        return str(ip)
    return str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
