"""Messages between the server and a worker: JSON, each after its length in four bytes, over the worker's two pipes."""

import asyncio
import json
import os
import struct
import sys
import threading
from typing import BinaryIO, TypeAlias

from zimage import interrupts
from zimage.settings.fields import Plain

Message: TypeAlias = dict[str, Plain]
LENGTH = struct.Struct(">I")
LONGEST = 1 << 28  # bytes; a job with its token ids has some kilobytes, and many prompts may stand in one


def packed(message: Message) -> bytes:
    text = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return LENGTH.pack(len(text)) + text


def read(stream: BinaryIO) -> Message | None:
    """The next message, or None where the other side has ended."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    text = stream.read(_length(head))
    return _message(text) if len(text) == _length(head) else None


async def read_async(stream: asyncio.StreamReader) -> Message | None:
    """The same in an event loop."""
    try:
        head = await stream.readexactly(LENGTH.size)
        return _message(await stream.readexactly(_length(head)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class Outlet:
    """The worker's way out; several threads may send."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._lock = stream, threading.Lock()

    @classmethod
    def of_standard_output(cls) -> "Outlet":
        """Standard output becomes the channel, and whatever prints there from now on goes to standard error."""
        sys.stdout.flush()
        channel = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        return cls(channel)

    def send(self, message: Message) -> None:
        """Whole, whatever interrupts it. Where the server has gone, there is nobody to work for: the process ends."""
        try:
            with interrupts.held(), self._lock:
                self._stream.write(packed(message))
                self._stream.flush()
        except OSError:
            os._exit(0)


def _length(head: bytes) -> int:
    (length,) = LENGTH.unpack(head)
    if length > LONGEST:
        raise ValueError(f"a message of {length} bytes: what prints to the channel besides the worker?")
    return int(length)


def _message(text: bytes) -> Message:
    message: Message = json.loads(text.decode("utf-8", "surrogatepass"))
    return message
