"""A batch whose workers, machines and own process are killed: every picture once, each with `gen`'s bits."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image

from zimage.batch.index import NAME, read_index
from zimage.pictures.files import read_metadata

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0  # seconds in which a command has to go on
REQUEST = {"steps": 2, "width": 64, "height": 64}

pytestmark = pytest.mark.full


class Command:
    """`batch` in a process of its own, on rows that lie in a folder."""

    def __init__(self, folder: Path, model: Path, *options: str, environment: Mapping[str, str] | None = None):
        self.folder = folder
        words = ["batch", folder / "rows.jsonl", "-o", folder / "out", "--model", model, "--device", "cpu"]
        words += ["--dtype", "fp32", "--workers", "2", *options]
        self.log = folder / "log.txt"
        with self.log.open("ab") as log:
            command = [sys.executable, ROOT / "cli.py", *words]
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **(environment or {})}
            )

    @property
    def drawn(self) -> int:
        return len(list((self.folder / "out").glob("*.png")))

    def reach(self, count: int) -> bool:
        """Wait for so many pictures; False where the command has ended before."""
        end = time.monotonic() + PATIENCE
        while self.drawn < count and self.process.poll() is None:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        return self.process.poll() is None

    def kill(self) -> None:
        """With whatever it started, which has to end by itself."""
        below = processes.below(self.process.pid)
        self.process.kill()
        self.process.wait()
        check_gone(below)


def check_gone(below: Mapping[int, str]) -> None:
    """All processes end, but Ray's agents, which first look for the killed ones for a minute or two."""
    below = {pid: name for pid, name in below.items() if "Agent" not in name}
    end = time.monotonic() + 60
    while alive := [pid for pid in below if Path(f"/proc/{pid}/exe").exists()]:
        assert time.monotonic() < end, [below[pid] for pid in alive]
        time.sleep(0.1)


def write_rows(folder, count):
    rows = [{"id": f"r{i:04}", "prompt": f"a cat and {i} dogs", "seed": i, **REQUEST} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def check(folder, rows, pipe):
    """Every row has one line and one picture, with the bits that it has when it is drawn alone."""
    lines = [json.loads(line) for line in (folder / "out" / NAME).read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert [line["error"] for line in lines] == [None] * len(rows)
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted([NAME, *(line["path"] for line in lines)])
    for row, line in zip(rows, lines, strict=True):
        path = folder / "out" / line["path"]
        assert read_metadata(path)["request"] == line["request"]
        alone = pipe.generate(**{name: value for name, value in row.items() if name != "id"})
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(alone.images[0])), row["id"]


@pytest.mark.parametrize(("count", "kills"), [(60, 4), (500, 10)])
def test_kills_at_random_moments_lose_nothing_and_double_nothing(count, kills, tmp_path, tiny_folder, pipe):
    rows, chance = write_rows(tmp_path, count), random.Random(count)
    moments = sorted(chance.sample(range(2, count - 4), kills + 2))
    of_command = {moments[len(moments) // 3], moments[2 * len(moments) // 3]}
    command, killed = Command(tmp_path, tiny_folder), 0
    for moment in moments:
        assert command.reach(moment), command.log.read_text()
        time.sleep(chance.random())
        if moment in of_command:
            command.kill()
            before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
            command = Command(tmp_path, tiny_folder)
            assert command.reach(len(before) + 1), command.log.read_text()
            after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
            assert before.items() <= after.items()  # what was drawn is not drawn again
        elif alive := processes.workers(command.process.pid):
            processes.kill(chance.choice(alive))
            killed += 1
    assert killed >= kills - 2  # one may be starting anew when its turn comes
    assert command.process.wait(PATIENCE) == 0, command.log.read_text()
    check(tmp_path, rows, pipe)


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)])
def test_an_interrupt_is_one_line_and_the_same_command_goes_on(number, status, tmp_path, tiny_folder, pipe):
    rows = write_rows(tmp_path, 40)
    command = Command(tmp_path, tiny_folder)
    assert command.reach(5), command.log.read_text()
    below = processes.below(command.process.pid)
    command.process.send_signal(number)
    assert command.process.wait(60) == status
    said = command.log.read_text()
    assert said == "error: interrupted; what is drawn is kept, and the same command goes on\n"
    assert len(read_index(tmp_path / "out" / NAME)) == command.drawn < len(rows)
    check_gone(below)
    again = Command(tmp_path, tiny_folder)
    assert again.process.wait(PATIENCE) == 0, again.log.read_text()
    check(tmp_path, rows, pipe)


def test_a_cluster_elsewhere_that_loses_a_machine(tmp_path, tiny_folder, pipe):
    """Its workers' pictures that were on their way are drawn on another one."""
    from serve.ray_cluster import Cluster

    rows, cluster = write_rows(tmp_path, 40), Cluster(cores=1, others=1)
    try:
        elsewhere = ["--address", cluster.address]
        command = Command(tmp_path, tiny_folder, *elsewhere, environment=cluster.environment)
        assert command.reach(8), command.log.read_text()
        cluster.lose()
        assert command.process.wait(PATIENCE) == 0, command.log.read_text()
    finally:
        cluster.shutdown()
    check(tmp_path, rows, pipe)
