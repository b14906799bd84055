"""A viewer as a process of its own, and what tests ask it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds


class Shown(httpx.Client):
    """A client of a viewer; `url` is that of its page."""

    def __init__(self, address: str, process: "subprocess.Popen[str]"):
        super().__init__(base_url=address, timeout=PATIENCE)
        self.url, self._process = f"{address}/", process

    def processor_time(self) -> float:
        """Seconds that the viewer has computed so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def viewer(folder: Path, *options: str) -> Iterator[Shown]:
    """A viewer that shows the folder; its process ends with the test, and by SIGTERM with status 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("ZIMAGE_TOKEN", None)
    command = [sys.executable, ROOT / "cli.py", "view", folder, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the viewer did not start"
        with Shown(address, process) as client:
            yield client
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
