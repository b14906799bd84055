"""What happens to jobs, as server-sent events that a client can take up again where it lost them.

Each job has a log of its latest events, and so has the server as a whole. A reader has a place in a log and takes what
stands after it: a slow one misses previews, and gets the whole job once more where it fell out of the log. Places are
`LIFE-NUMBER`: those of an earlier life of the server are unknown to it, and such a reader starts with the whole job.
"""

import asyncio
import contextlib
import json
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from zimage.serve.jobs import ENDED

JOB, END, POSITION = "job", "end", "position"
PREVIEW, QUEUE = "preview", "queue"
LATEST = (POSITION, PREVIEW, QUEUE)  # of these only the last one counts
LENGTH = 512  # events of a log
SILENCE = 15.0  # seconds after which a comment keeps the connection open


@dataclass(frozen=True)
class Message:
    """One event: its place, its kind, its data (plain values)."""

    number: int
    id: str
    event: str
    data: dict[str, Any]

    def text(self) -> str:
        """As it stands in a stream; JSON has no line ends."""
        return f"id: {self.id}\nevent: {self.event}\ndata: {json.dumps(self.data, ensure_ascii=False)}\n\n"


class Log:
    """The latest events of one job, or of all."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque(maxlen=LENGTH)
        self.latest: dict[str, Message] = {}
        self._news: set[asyncio.Event] = set()
        self.forgotten = -1  # the last number that fell out

    def add(self, message: Message) -> None:
        if message.event in LATEST:
            self.latest[message.event] = message
        else:
            if len(self._messages) == LENGTH:
                self.forgotten = self._messages[0].number
            self._messages.append(message)
        self.wake()

    def after(self, number: int) -> list[Message]:
        """In order; from the end, where the new ones stand."""
        found = []
        for message in reversed(self._messages):
            if message.number <= number:
                break
            found.append(message)
        found += [message for message in self.latest.values() if message.number > number]
        return sorted(found, key=lambda message: message.number)

    @contextlib.contextmanager
    def heard(self) -> Iterator[asyncio.Event]:
        """An event that is set when something new is there."""
        news = asyncio.Event()
        self._news.add(news)
        try:
            yield news
        finally:
            self._news.discard(news)

    def wake(self) -> None:
        for news in self._news:
            news.set()


class Streams:
    """The logs of a server. It is used in the event loop only."""

    def __init__(self) -> None:
        self._life, self._number = secrets.token_hex(4), 0
        self._logs: dict[str, Log] = {}
        self._all = Log()
        self._closed = asyncio.Event()

    def tell(self, job: str, event: str, data: dict[str, Any]) -> None:
        """Add an event to a job's log ("" for none) and, unless it concerns nobody else, to that of all."""
        self._number += 1
        message = Message(self._number, f"{self._life}-{self._number}", event, data)
        if event != POSITION:
            self._all.add(message)
        if job:
            log = self._logs.setdefault(job, Log())
            log.add(message)
            if event == END:  # who reads it has it in hand; all others are told of the end alone
                del self._logs[job]

    def latest(self, job: str, event: str) -> dict[str, Any] | None:
        """The data of the last event of a kind of which only the last one counts, if there was any."""
        log = self._logs.get(job)
        message = log and log.latest.get(event)
        return message.data if message else None

    def close(self) -> None:
        """End all streams: the server stops."""
        self._closed.set()
        for log in (*self._logs.values(), self._all):
            log.wake()

    async def of_job(self, job: str, after: str, whole: Callable[[], dict[str, Any]]) -> AsyncIterator[Message]:
        """The events of a job that is not over, until it is; `whole` gives the job as it is now."""
        async for message in self._follow(self._logs.setdefault(job, Log()), after, lambda: [whole()]):
            over = message.event == JOB and message.data["state"] in ENDED  # it ended before this place
            yield self.snapshot(message.data, END) if over else message
            if over or message.event == END:
                return

    async def of_all(self, after: str, whole: Callable[[], Iterable[dict[str, Any]]]) -> AsyncIterator[Message]:
        """The events of all jobs, for ever; `whole` gives those that are not over."""
        async for message in self._follow(self._all, after, whole):
            yield message

    def snapshot(self, data: dict[str, Any], event: str = JOB) -> Message:
        """A job as it is now, at the place of what comes next."""
        return Message(self._number, f"{self._life}-{self._number}", event, data)

    async def _follow(
        self, log: Log, after: str, whole: Callable[[], Iterable[dict[str, Any]]]
    ) -> AsyncIterator[Message]:
        place = self._place(after)
        with log.heard() as news:
            while not self._closed.is_set():
                if place is None or place < log.forgotten:
                    place = self._number
                    for data in whole():
                        yield self.snapshot(data)
                for message in log.after(place):
                    yield message
                    place = message.number
                await news.wait()
                news.clear()

    def _place(self, after: str) -> int | None:
        """The number of a place in this life; None for any other text."""
        life, _, number = after.partition("-")
        known = life == self._life and number.isascii() and number.isdigit() and len(number) < 16
        return min(int(number), self._number) if known else None


async def as_text(messages: AsyncIterator[Message]) -> AsyncIterator[str]:
    """A stream's text, with a comment now and then where nothing happens."""
    source = aiter(messages)
    waiting: asyncio.Task[Message] | None = None
    try:
        yield ": zimage\n\n"
        while True:
            waiting = waiting or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait([waiting], timeout=SILENCE)
            if not done:
                yield ": still here\n\n"
                continue
            try:
                message = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield message.text()
    finally:
        if waiting:
            waiting.cancel()
