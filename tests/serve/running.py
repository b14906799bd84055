"""A real server as a process of its own, with the demo model, and what tests do with one."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from PIL import Image

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds; the machines that run tests may be busy with others


class Server:
    """`start` it, ask it by `http`, and `stop` or `kill` it; it can be started again on the same folder and port."""

    def __init__(self, folder: Path, *options: str, environment: dict[str, str] | None = None):
        self.folder, self.options, self.port = folder, options, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # One thread each: several on cores that others use wait for one another most of the time.
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.environment.pop("ZIMAGE_TOKEN", None) if not environment else None
        self.log = folder.with_name(folder.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def start(self) -> "Server":
        command = [sys.executable, ROOT / "cli.py", "serve", "--port", str(self.port), "--data", self.folder]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *self.options], stdout=log, stderr=log, env=self.environment)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.said()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def workers(self) -> list[int]:
        """The process numbers of its workers."""
        assert self.process is not None
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout
        return [int(number) for number in found.split()]

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    # ------------------------------------------------------------------ jobs

    def submit(self, **asked: object) -> dict:
        answer = self.http.post("/api/jobs", json=asked)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def wait(self, id: str, seconds: float = PATIENCE) -> dict:
        """A job when it has ended."""
        end = time.monotonic() + seconds
        while (job := self.http.get(f"/api/jobs/{id}").json())["state"] in ("queued", "running"):
            assert time.monotonic() < end, job
            time.sleep(0.02)
        return job

    def draw(self, **asked: object) -> dict:
        """A job that is done."""
        job = self.wait(self.submit(**asked)["id"])
        assert job["state"] == "done", job
        return job

    def pixels(self, job: dict) -> list[bytes]:
        """Of each picture of a job."""
        return [Image.open(io.BytesIO(self.http.get(image["url"]).content)).tobytes() for image in job["images"]]

    def events(self, path: str, after: str = "") -> Iterator[tuple[str, str, dict]]:
        """(id, event, data) of a stream."""
        headers = {"Last-Event-ID": after} if after else {}
        with self.http.stream("GET", path, headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if line:
                    fields[name] = value
                elif "event" in fields:
                    yield fields["id"], fields["event"], json.loads(fields["data"])
                    fields = {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
