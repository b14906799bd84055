"""What a server tells of a job while it runs: server-sent events, read within limits, taken up where a stream broke."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from zimage.errors import CheckpointError, RemoteError
from zimage.formats.json_text import json_object
from zimage.settings.fields import Plain

LONGEST = 8 << 20  # bytes of an event
ANSWERS = 300.0  # seconds for a question, its uploads included, and its whole answer
PATIENCE = 120.0  # seconds that a server may be away in the middle of a job: it may be loading its model anew
PAUSE = 1.0  # seconds between two tries
END = "end"

Pieces = Iterable[bytes]


class Refused(RemoteError):
    """An answer that would be the same at the next try."""


@dataclass(frozen=True)
class Message:
    """One event as the stream holds it: its place, its kind, its data."""

    id: str
    event: str
    data: str


class Patience:
    """Bears a server that is away, for PATIENCE seconds from when it was last heard."""

    def __init__(self) -> None:
        self.heard()

    def heard(self) -> None:
        self._since = time.monotonic()

    def bear(self, error: RemoteError) -> None:
        """Wait a moment. Raises the error where it would be the same again, or where the time is over."""
        if isinstance(error, Refused) or time.monotonic() - self._since > PATIENCE:
            raise error
        time.sleep(PAUSE)


def followed(open_stream: Callable[[str], Pieces]) -> Iterator[tuple[str, dict[str, Plain]]]:
    """The events of a job, (kind, data), until its end.

    `open_stream` returns the pieces of the stream after the place that it is given ("" for the beginning). It is called
    again where a stream ends early. Raises RemoteError.
    """
    place, patience = "", Patience()
    while True:
        broken = RemoteError("the server ended the stream of a job's events before the job")
        try:
            for message in messages(lines(open_stream(place))):
                patience.heard()
                place = message.id
                yield message.event, _data(message)
                if message.event == END:
                    return
        except RemoteError as error:
            broken = error
        patience.bear(broken)


def messages(found: Iterable[str]) -> Iterator[Message]:
    """The events that lines make. Raises RemoteError for one that is too long."""
    fields: dict[str, str] = {}
    place = ""
    for line in found:
        if not line:
            if "data" in fields:
                yield Message(place, fields.get("event", "message"), fields["data"])
            fields = {}
            continue
        name, _, value = line.partition(":")  # a comment has no name
        value = value.removeprefix(" ")
        if name == "id":
            place = value
        elif name == "data" and "data" in fields:
            fields["data"] += "\n" + value
            _check_length(len(fields["data"]))
        elif name in ("data", "event"):
            fields[name] = value


def lines(pieces: Pieces) -> Iterator[str]:
    """The lines of a text that comes in pieces; the last one only if it is ended."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line.removesuffix(b"\r").decode(errors="replace") for line in whole)
        _check_length(len(rest))


def _check_length(length: int) -> None:
    if length > LONGEST:
        raise Refused(f"the server sent an event of more than {LONGEST / 1e6:g} MB")


def _data(message: Message) -> dict[str, Plain]:
    try:
        return json_object("an event of the server", message.data)
    except CheckpointError as error:
        raise Refused(str(error)) from None
