"""The books of a server: what is to be kept is written in order, off the event loop, and tried again until it is.

A full disk, or another program that keeps the index locked, delays what is written and loses nothing of it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from zimage.errors import ZImageError
from zimage.serve.refusals import NoRoom, Unavailable

log = logging.getLogger("zimage.serve")
T = TypeVar("T")
Entry = Callable[[], Coroutine[Any, Any, None]]

RETRY = 1.0  # seconds between two tries to write
INDEX = "index"


class Books:
    """`go_on` is called when there is room again; `lacking` names what waits for it: jobs by their ids, the index."""

    def __init__(self, go_on: Callable[[], None]):
        self.lacking: set[str] = set()
        self._go_on = go_on
        self._entries: asyncio.Queue[Entry] = asyncio.Queue()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def full(self) -> bool:
        """Whether the disk does not take what is to be kept."""
        return bool(self.lacking)

    def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep(), name="bookkeeper")

    def put(self, entry: Entry) -> None:
        """Do this after all that was put before."""
        self._entries.put_nowait(entry)

    async def written(self) -> None:
        """Wait until all that was put is done."""
        await self._entries.join()

    async def stop(self) -> None:
        """Write what can be written now: what a full disk does not take, the next start finds out again."""
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * RETRY):
                await self.written()
        if self._keeper:
            self._keeper.cancel()

    async def kept(self, write: Callable[[], T]) -> T:
        """The result of writing, tried until the disk takes it and nobody else keeps it locked."""
        told = False
        while True:
            try:
                result = await asyncio.to_thread(write)
            except (NoRoom, Unavailable) as error:
                if not told:
                    log.warning("%s", error)
                told = True
                if isinstance(error, NoRoom):
                    self.lacking.add(INDEX)
                await asyncio.sleep(RETRY)
            else:
                self.has_room(INDEX)
                return result

    def has_room(self, name: str) -> None:
        """What was lacking room has it now."""
        if name in self.lacking:
            self.lacking.discard(name)
            self._go_on()

    async def _keep(self) -> None:
        while True:
            entry = await self._entries.get()
            try:
                await entry()
            except ZImageError as error:
                log.error("%s", error)
            except Exception:  # whatever it is, what comes after it is still to be kept
                log.exception("what became of a job could not be kept")
            finally:
                self._entries.task_done()
