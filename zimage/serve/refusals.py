"""Why a server does not do what it is asked, beside faults of the request itself: the status that HTTP has for it."""

from collections.abc import Iterable
from typing import Self

from zimage.errors import RemoteError, RequestError, RewriteError, ZImageError


class Refusal(ZImageError):
    """An answer other than success. `retry_after`: seconds after which the same may succeed."""

    status = 500
    retry_after: float | None = None

    def __init__(self, text: str = "", *, fields: Iterable[str] = (), retry_after: float | None = None):
        super().__init__(text, fields=fields)
        self.retry_after = retry_after

    def with_text(self, text: str) -> Self:
        return type(self)(text, fields=self.fields, retry_after=self.retry_after)


class Malformed(Refusal):
    """A body that is not what its media type says."""

    status = 400


class NotFound(Refusal):
    """There is nothing of this name."""

    status = 404


class Conflict(Refusal):
    """It cannot be done in the present state, such as cancelling what has ended."""

    status = 409


class TooLarge(Refusal):
    """More bytes or pixels than are accepted."""

    status = 413


class WrongMedia(Refusal):
    """A body of another media type than those that are read."""

    status = 415


class TooMany(Refusal):
    """The queue is full."""

    status = 429


class Failed(Refusal):
    """A job that failed for a reason that does not lie in its request."""


class Unavailable(Refusal):
    """The server is stopping, or no worker is ready."""

    status = 503


class NoRoom(Refusal):
    """The disk is full."""

    status = 507


def status_of(error: ZImageError) -> int:
    """The status of an error; a form may turn 422 into what its clients know."""
    if isinstance(error, Refusal):
        return error.status
    if isinstance(error, RemoteError):
        return 502
    return 422 if isinstance(error, RequestError | RewriteError) else 500
