"""What the rules of `safety` know of a server and of a request."""

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Scope

from zimage.serve.door import Brake, Door
from zimage.serve.hosts import Hosts
from zimage.settings.serving import ServeSettings

HEALTH, SESSION = "/health", "/api/session"
FREE = ("/", HEALTH, SESSION)  # and the page's files: whoever has no token yet needs these
MOST_REQUESTS = 400  # at once; streams of events last long
Observe = Callable[[str, int, float], None]


@dataclass
class Guard:
    """`observe(method, status, seconds)` hears of every answer; status 0: the client went before it.

    Raises RequestError for settings that cannot be used.
    """

    settings: ServeSettings
    door: Door = field(default_factory=Door)
    brake: Brake = field(default_factory=Brake)
    observe: Observe = lambda method, status, seconds: None
    most_requests: int = MOST_REQUESTS

    def __post_init__(self) -> None:
        self.hosts = Hosts(self.settings.host, self.settings.allow_host or ())


Rule = Callable[[ASGIApp, Guard], ASGIApp]


def client_of(scope: Scope) -> str:
    """The address that a request came from; proxies are not believed, and so it may be theirs."""
    return scope["client"][0] if scope.get("client") else "-"
