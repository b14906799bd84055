"""The server's side of its worker processes: started, asked, restarted when they die.

A worker that dies takes down what it was doing and nothing else: its owner hears of it, and a new process is started,
each time a little later. One that cannot even open the model says why, and at the start of a server that ends it.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from zimage.errors import CheckpointError, RemoteError, RequestError, RewriteError, ZImageError
from zimage.serve.channel import Message, packed, read_async
from zimage.serve.places import ON_RAY, Place
from zimage.serve.refusals import Unavailable

log = logging.getLogger("zimage.serve")

COMMAND = (sys.executable, "-m")  # and the module of a place
PAUSES = (0.0, 1.0, 3.0, 10.0, 30.0)  # seconds before the first, second … restart in a row
STEADY = 60.0  # seconds after which a process counts as a sound one, as does one that has ended a task
OPENING = 600.0  # seconds that a process may take to open the model
PATIENCE = 30.0  # seconds that a question may wait for its answer
STARTING, READY, BUSY, STOPPED = "starting", "ready", "busy", "stopped"
KINDS: Mapping[str, type[ZImageError]] = {  # of errors, as a worker calls them
    "request": RequestError,
    **{kind.__name__: kind for kind in (CheckpointError, RemoteError, RewriteError)},
}
Hear = Callable[["Worker", Message], None]


class Worker:
    """One worker process after another, all for the same place.

    `hear` gets each message that is not an answer, and {"on": "died"} when a process has ended; `task` is what it does.
    """

    def __init__(self, place: Place, hear: Hear):
        self.device, self.task, self.restarts, self.about = place.name, "", 0, dict[str, Any]()
        self._place, self._hear = place, hear
        self._process: asyncio.subprocess.Process | None = None
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._asked = self._in_a_row = 0
        self._is_ready = asyncio.Event()
        self._ending = asyncio.Event()
        self._was_sound = False
        self._keeper: asyncio.Task[None] | None = None
        self.refusal: ZImageError | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it may go together with others: with their machine, or the way to it."""
        return self._place.module == ON_RAY

    @property
    def device_name(self) -> str:
        """As the process calls it, once it runs."""
        return str(self.about.get("device", self.device))

    @property
    def state(self) -> str:
        if self._ending.is_set() or self.refusal:
            return STOPPED
        return STARTING if not self._is_ready.is_set() else BUSY if self.task else READY

    def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep(), name=f"worker on {self.device}")

    async def ready(self, seconds: float | None = None) -> None:
        """Wait until it can be asked. Raises what made it refuse to start, or Unavailable after some seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._is_ready.wait()
        except TimeoutError:
            raise Unavailable("the model is still loading; try again", retry_after=5) from None
        if self.refusal:
            raise self.refusal
        if self._ending.is_set():
            raise Unavailable("the server is stopping; try again later", retry_after=30)

    def send(self, message: Message) -> None:
        """Where the process has just died, the message goes nowhere, as if the process had died a moment later."""
        if self._process and self._process.stdin and not self._process.stdin.is_closing():
            self._process.stdin.write(packed(message))

    async def ask(self, op: str, **plain: Any) -> Message:
        """A quick question, asked again where the process dies over it. Raises as the pipeline does, or Unavailable."""
        for _ in range(2):
            await self.ready(PATIENCE)
            try:
                return _told(await self._ask({"op": op, **plain}))
            except ConnectionError:
                continue
        raise Unavailable("the worker ended over this question twice; try something else", retry_after=5)

    async def _ask(self, question: Message) -> Message:
        self._asked += 1
        number = self._asked
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self.send({**question, "re": number})
        try:
            async with asyncio.timeout(PATIENCE):
                return await answer
        except TimeoutError:
            raise Unavailable("the worker is too busy to answer; try again", retry_after=5) from None
        finally:
            self._answers.pop(number, None)

    async def stop(self, seconds: float = 0.0) -> None:
        """End the process, after it had some seconds to end its task."""
        self._ending.set()
        self._is_ready.set()  # for those who wait for it
        process = self._process
        if process and process.stdin:
            process.stdin.close()
            try:
                async with asyncio.timeout(max(seconds, 0.5)):
                    await process.wait()
            except TimeoutError:
                process.kill()
        if self._keeper:
            await self._keeper

    def refuse(self, error: ZImageError) -> None:
        """Have nothing more to do with a process that opened what it should not have, nor with others of its place."""
        self.refusal = error
        log.error("the worker on %s cannot be used: %s", self.device, error)
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        if self._process and self._process.returncode is None:
            self._process.kill()

    # ------------------------------------------------------------------ one process after another

    async def _keep(self) -> None:
        while not self._ending.is_set():
            begun, self._was_sound = time.monotonic(), False
            await self._live()
            if self._ending.is_set() or self.refusal:
                return
            sound = self._was_sound or time.monotonic() - begun > STEADY
            self._in_a_row = 1 if sound else self._in_a_row + 1
            self.restarts += 1
            pause = PAUSES[min(self._in_a_row, len(PAUSES)) - 1]
            log.warning("the worker on %s ended unexpectedly; it is started again", self.device)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._ending.wait()

    async def _live(self) -> None:
        """One process, from its start to its end."""
        pipe = asyncio.subprocess.PIPE
        # A session of its own: Ctrl-C in the server's terminal is the server's to deal with.
        process = self._process = await asyncio.create_subprocess_exec(
            *COMMAND, self._place.module, stdin=pipe, stdout=pipe, start_new_session=True, limit=1 << 20
        )
        if self._ending.is_set():  # before there was anything to end
            process.kill()
        self.send(dict(self._place.start))
        patience = asyncio.get_running_loop().call_later(OPENING, self._give_up)
        await self._listen(process)
        patience.cancel()
        await process.wait()
        self._is_ready.clear()
        if self.refusal or self._ending.is_set():
            self._is_ready.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError())
        self._hear(self, {"on": "died", "status": process.returncode})

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while (message := await read_async(process.stdout)) is not None:
                self._take(message)
        except ValueError as error:
            log.error("the worker on %s is ended: %s", self.device, error)
            process.kill()

    def _give_up(self) -> None:
        """End a process that does not get done with opening the model; another one may."""
        if not self._is_ready.is_set():
            log.error("the worker on %s has not opened the model in %g s", self.device, OPENING)
            self.kill()

    def _take(self, message: Message) -> None:
        match message["on"]:
            case "answer":
                answer = self._answers.get(message["re"])
                if answer and not answer.done():
                    answer.set_result(message)
            case "ready":
                self.about = message["about"]
                self._is_ready.set()
                self._hear(self, message)
            case "refused" if self.about:  # it could once, and may again
                log.error("the worker on %s cannot start: %s", self.device, message["error"]["message"])
            case "refused":
                self.refusal = raised(message["error"])
                log.error("the worker on %s cannot start: %s", self.device, self.refusal)
            case _:
                self._was_sound |= message["on"] == "ended"
                self._hear(self, message)


def _told(answer: Message) -> Message:
    if "error" in answer:
        raise raised(answer["error"])
    return {**answer["answer"], "notes": answer["notes"]}


def raised(error: Mapping[str, Any]) -> ZImageError:
    """An error that a worker sent, as the server raises it."""
    return KINDS.get(error["kind"], ZImageError)(error["message"], fields=error["fields"])
