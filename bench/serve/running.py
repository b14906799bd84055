"""A server with the demo model, as a process of its own, on a folder that goes with it."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import httpx

START, STOP = 120.0, 60.0  # seconds that it may take


class Server:
    """Inside the block it can be asked at `url`; `threads` are those that PyTorch may use, 0 for its own choice."""

    def __init__(self, *options: str, threads: int = 0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url, self.options, self.threads = f"http://127.0.0.1:{self.port}", options, threads
        self.folder = tempfile.TemporaryDirectory(prefix="zimage-bench-")
        self.data = Path(self.folder.name, "data")
        self.log = Path(self.folder.name, "log")

    def __enter__(self) -> "Server":
        command = [sys.executable, "-m", "zimage", "serve", "--port", str(self.port), "--data", str(self.data), "-q"]
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        environment = {**os.environ, **threads, "ZIMAGE_CONFIG": os.devnull}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, *self.options], stdout=log, stderr=log, env=environment)
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self.folder.cleanup()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def processes(self) -> dict[str, int]:
        """The process numbers of the server and its worker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return {"server": self.process.pid, "worker": int(children[0])}
