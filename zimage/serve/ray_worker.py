"""The server's side of a worker on another machine: `python -m zimage.serve.ray_worker`, a process of the server's own.

    server ─ messages ─→ this process ─ Ray ─→ an actor there: `relay.Relay` ─ messages ─→ zimage.serve.worker

To the server it is a worker like any other: it speaks the same messages over its standard input and output, and where
the machine, the actor or Ray itself goes, this process ends. Files that messages name go there before them; pictures,
captions and the states of running jobs come back, and lie in the server's folder before it hears of them.
"""

import logging
import os
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from zimage import cluster
from zimage.errors import OutputError, RequestError, ZImageError, one_line
from zimage.serve import parcels
from zimage.serve.channel import Message, Outlet, read
from zimage.serve.leftovers import PICTURES, STATES
from zimage.serve.parcels import Parcel
from zimage.serve.relay import Relay
from zimage.serve.worker import fault as as_plain
from zimage.version import __version__

log = logging.getLogger("zimage.serve")

UPLOADS = "uploads"
PIECE = 8 << 20  # bytes of a file that travel at once
KEPT = 64  # files that stay there, in case that the next jobs have them too
PATIENCE = 10.0  # seconds after which it is said what a worker waits for
ENDING = 10.0  # seconds that the other side may take to end
TASKS = ("run", "compute", "cancel")  # in their order; questions go beside them
THREADS = 8  # of the actor: each call of ours takes one, of which there are at most five at once


class Call(Protocol):
    """Calls a method of the relay, and waits for what it returns."""

    def __call__(self, method: str, *values: Any) -> Any: ...


class Bridge:
    """Messages and files both ways. Of the server's files only those in its uploads and on its `shelves` go there."""

    def __init__(self, outlet: Outlet, data: Path, shelves: Sequence[Path]):
        self._send, self._data, self._shelves = outlet.send, data, (data / UPLOADS, *shelves)
        self._tasks, self._questions = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._bringing = threading.Lock()
        self._there: OrderedDict[Path, tuple[int, int]] = OrderedDict()  # files that are there, by size and time
        self._faults: dict[str, OutputError] = {}  # of jobs whose pictures could not be written here
        self._call: Call | None = None
        self._root = self._node = ""

    def listen(self) -> None:
        """Take in what the server says, until it has gone."""
        while (message := read(sys.stdin.buffer)) is not None:
            lane = self._tasks if message["op"] in TASKS else self._questions
            lane.submit(_ending_at_errors, self._forward, message)
        if self._call is None:
            os._exit(0)
        threading.Timer(ENDING, os._exit, (1,)).start()
        self._call("close")

    def work(self, call: Call, start: Message) -> None:
        """Start the worker there and pass on what it says, until it ends. Raises RequestError for another version."""
        about = call("about")
        if about["version"] != __version__:
            told = f"zimage {about['version']} is installed on {about['node']}, and {__version__} here"
            raise RequestError(f"{told}; install the same on both", fields=("address",))
        self._root, self._node = about["root"], about["node"]
        call("start", {**start, "data": f"{self._root}{self._data}"})
        self._call, here = call, True
        while here:
            for parcel in call("hear"):
                self._deliver(parcel)
                here = parcel.message is not None

    # ------------------------------------------------------------------ there

    def _forward(self, message: Message) -> None:
        assert self._call is not None, "nothing is asked before the worker is ready"
        named: list[Path] = []

        def there(path: str) -> str:
            if not _lies_in(path, (self._data, *self._shelves)):
                return path
            named.append(Path(path))
            return self._root + path

        moved = parcels.with_paths(message, there)
        for path in named:
            if _lies_in(path, self._shelves):
                for part in parcels.parts(path):
                    self._bring(part)
        self._call("tell", Parcel(moved, dict(self._begun(message))))

    def _begun(self, message: Message) -> Iterator[tuple[str, bytes]]:
        """What is known of a job that has begun elsewhere: its state, and of its pictures that they are drawn."""
        state = self._data / STATES / f"{message.get('id')}.safetensors"
        if message["op"] == "run" and state.exists():
            yield f"{self._root}{state}", state.read_bytes()
            for picture in (self._data / PICTURES).glob(f"{message['id']}-*.png"):
                yield f"{self._root}{picture}", b""

    def _bring(self, path: Path) -> None:
        """Bring a file there, unless it is."""
        assert self._call is not None
        with self._bringing, path.open("rb") as file:
            about = os.fstat(file.fileno())
            stamp = (about.st_size, about.st_mtime_ns)
            if self._there.get(path) != stamp:
                for offset in range(0, max(stamp[0], 1), PIECE):
                    whole = offset + PIECE >= stamp[0]
                    self._call("put", f"{self._root}{path}", offset, file.read(PIECE), whole)
            self._there[path] = stamp
            self._there.move_to_end(path)
            if len(self._there) > KEPT:
                self._call("drop", f"{self._root}{self._there.popitem(last=False)[0]}")

    # ------------------------------------------------------------------ back

    def _deliver(self, parcel: Parcel) -> None:
        """Keep what came with a message, then pass it on. The server asks for room where a picture cannot be kept."""
        message = parcels.without(parcel.message or {"on": "over"}, self._root)
        fault = self._kept(parcel, message)
        match message:
            case {"on": "over"}:
                return
            case {"on": "ready", "about": about}:
                about["device"] = f"{about['device']} on {self._node}"
            case {"on": "image", "id": id} if fault:
                self._faults[id] = fault
                self._tasks.submit(_ending_at_errors, self._forward, {"op": "cancel", "id": id})
                return
            case {"on": "ended", "id": id} if error := self._faults.pop(id, fault):
                message = {"on": "ended", "id": id, "state": "failed", "error": as_plain(error)}
        self._send(message)

    def _kept(self, parcel: Parcel, message: Message) -> OutputError | None:
        """Write what came along; returns the fault that kept it from that."""
        fault = None
        for there, content in parcel.files.items():
            path = Path(there.removeprefix(self._root))
            if content is None and message.get("id") in self._faults:
                continue  # the job goes on from the state that is known here
            try:
                parcels.put(path, content)
            except OSError as error:
                kind = "picture" if path.parent.name == PICTURES else "file"
                fault = OutputError(f"the {kind} cannot be written: {error.strerror or error}")
                log.warning("%s", fault)
        return fault


def _lies_in(path: str | Path, folders: Iterable[Path]) -> bool:
    """Whether a path is an absolute one in one of these folders."""
    return os.path.isabs(path) and any(Path(os.path.normpath(path)).is_relative_to(folder) for folder in folders)


def _ending_at_errors(do: Callable[[Message], None], message: Message) -> None:
    """In a thread: what keeps a message from its way ends the process, and the server starts another one."""
    try:
        do(message)
    except Exception as error:
        _end(error)


def _end(error: Exception) -> None:
    log.error("a worker on Ray is lost: %s", one_line(str(error), 300))
    os._exit(1)


def hired(ray: Any, device: str) -> Call:
    """A relay on a machine of the cluster that has room for a worker; waits until there is one. Raises RequestError."""
    share = _share(ray, device)
    relay = ray.remote(Relay).options(max_concurrency=THREADS, **share).remote()
    if not ray.wait([relay.about.remote()], timeout=PATIENCE)[0]:
        (resource,) = share
        log.warning("Ray has no free %s for a worker yet", resource.removeprefix("num_")[:-1].upper())

    def call(method: str, *values: Any) -> Any:
        return ray.get(getattr(relay, method).remote(*values))

    return call


def _share(ray: Any, device: str) -> dict[str, int]:
    """What a worker takes of the cluster: a GPU, or a core where it has no GPUs or should not use them."""
    if device.startswith("cuda:"):
        raise RequestError(f"device {device}: Ray gives each worker a GPU of its own; pass cuda", fields=("device",))
    on_gpu = device == "cuda" or (device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1)
    return {"num_gpus": 1} if on_gpu else {"num_cpus": 1}


def main() -> None:
    outlet = Outlet.of_standard_output()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what stops a service tells all of its processes at once
    start = read(sys.stdin.buffer)
    if start is None:
        return
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    address, shelves = start.pop("address"), start.pop("shelves")
    bridge = Bridge(outlet, Path(start["data"]), [Path(shelf) for shelf in shelves])
    threading.Thread(target=bridge.listen, name="zimage-listen", daemon=True).start()
    try:
        with cluster.connected(address) as ray:
            try:
                bridge.work(hired(ray, start["loading"].get("device", "")), start)
            except ray.exceptions.RayError as error:
                _end(error)  # at once: the server should miss it before it sends anything more
            os._exit(0)  # Ray then ends the actor
    except ZImageError as error:
        outlet.send({"on": "refused", "error": as_plain(error)})


if __name__ == "__main__":
    main()
