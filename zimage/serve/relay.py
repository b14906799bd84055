"""The other machine's side of a worker there: an actor that runs the worker process, and passes on what both sides say.

    server ─ ray_worker ─ put, tell ─→ Relay ─→ python -m zimage.serve.worker ─→ Relay ─ hear ─→ ray_worker ─ server

The files of the worker lie in a folder of their own, which goes when the worker does; what a killed relay has left, the
next one removes. Any thread may call.
"""

import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from zimage.formats.own_folder import OwnFolder
from zimage.serve import parcels
from zimage.serve.channel import Message, packed, read
from zimage.serve.leftovers import PICTURES, STATES
from zimage.serve.parcels import Parcel
from zimage.version import __version__

log = logging.getLogger("zimage.serve")

COMMAND = (sys.executable, "-m", "zimage.serve.worker")
PREFIX = "zimage-relay-"  # of the folder
FOLDERS = (PICTURES, STATES, "captions", "uploads")
MOST_UNREAD = 256  # messages that may wait for the server; then the worker waits
STATE_EVERY = 2.0  # seconds between two states of a running job that are sent


class Relay:
    """A worker process on this machine, for a server on another."""

    def __init__(self) -> None:
        self._folder = OwnFolder(PREFIX)
        self.root = self._folder.path
        self._said: queue.Queue[Parcel] = queue.Queue(MOST_UNREAD)
        self._telling = threading.Lock()
        self._task, self._sent = "", (0.0, 0)  # the job that runs; when which state of it was sent

    def about(self) -> Message:
        """Who this is, and where the files lie."""
        return {"version": __version__, "node": socket.gethostname(), "root": str(self.root)}

    def start(self, message: Message) -> None:
        """Start the worker; `message["data"]` lies in `root`."""
        self._data = Path(message["data"])
        for name in FOLDERS:
            (self._data / name).mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stdin, self._stdout = (cast(BinaryIO, end) for end in (self._process.stdin, self._process.stdout))
        threading.Thread(target=self._listen, name="zimage-relay", daemon=True).start()
        self.tell(Parcel(message, {}))

    def put(self, path: str, offset: int, content: bytes, whole: bool) -> None:
        """A piece of a file; it has its name once it is whole, since the worker may be reading the one before."""
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(content)
        if whole:
            os.replace(part, path)

    def drop(self, path: str) -> None:
        """Remove a file that was put."""
        Path(path).unlink(missing_ok=True)

    def tell(self, parcel: Parcel) -> None:
        """Pass a message on. Where the worker has just ended, it goes nowhere: `hear` tells of the end."""
        for path, content in parcel.files.items():
            parcels.put(Path(path), content)
        assert parcel.message is not None
        if parcel.message["op"] == "run":
            self._task, self._sent = parcel.message["id"], (time.monotonic(), 0)
        try:
            with self._telling:
                self._stdin.write(packed(parcel.message))
                self._stdin.flush()
        except (BrokenPipeError, ValueError):  # the second of a pipe that was closed
            return

    def hear(self) -> list[Parcel]:
        """What the worker has said since the last call, in order; waits until there is something."""
        found = [self._said.get()]
        while not self._said.empty():
            found.append(self._said.get())
        return found

    def close(self) -> None:
        """Let the worker end; `hear` tells when it has."""
        with self._telling:
            self._stdin.close()

    # ------------------------------------------------------------------ what the worker says

    def _listen(self) -> None:
        while (message := self._read()) is not None:
            self._said.put(Parcel(message, dict(self._files(message))))
        self._process.wait()
        last = dict(self._state(0))
        self._folder.remove()
        self._said.put(Parcel(None, last))

    def _read(self) -> Message | None:
        try:
            return read(self._stdout)
        except ValueError as error:
            log.error("the worker is ended: %s", error)
            self._process.kill()
            return None

    def _files(self, message: Message) -> Iterator[tuple[str, bytes | None]]:
        """What has to be there before the server hears of it; here it is not needed any more."""
        match message:
            case {"on": "image", "image": name}:
                yield from _taken(self._data / PICTURES / f"{name}.png")
            case {"on": "ended", "id": self._task}:
                yield str(self._state_path), None
                yield from _taken(self._state_path)
                self._task = ""
            case {"on": "ended", "result": {"path": path}}:
                yield from _taken(Path(path))
            case _:
                yield from self._state(STATE_EVERY)

    @property
    def _state_path(self) -> Path:
        return self._data / STATES / f"{self._task}.safetensors"

    def _state(self, every: float) -> Iterator[tuple[str, bytes]]:
        """The state of the job that runs, where it is another one than was sent, and that was so many seconds ago."""
        now, (last, known) = time.monotonic(), self._sent
        if not self._task or now - last < every or not self._state_path.exists():
            return
        if (stamp := self._state_path.stat().st_mtime_ns) != known:
            self._sent = (now, stamp)
            yield str(self._state_path), self._state_path.read_bytes()


def _taken(path: Path) -> Iterator[tuple[str, bytes]]:
    """A file to be sent, which goes from here. An empty one stands for what the server has already."""
    if path.exists():
        if content := path.read_bytes():
            yield str(path), content
        path.unlink()
