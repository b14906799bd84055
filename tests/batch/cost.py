"""What a batch costs: `python tests/batch/cost.py --workers 2 --side 256`.

Processor time per picture of every kind of process, from a picture in the middle of the run to a later one, and of the
pipeline alone: other programs on the machine do not count. The last line is JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
import processes

ROOT = Path(__file__).parents[2]
TICK = os.sysconf("SC_CLK_TCK")
PROMPT = "a cat face on a blue background, number {}"


class Batch:
    """A batch of the demo model that runs."""

    def __init__(self, folder: Path, count: int, side: int, workers: int, encoders: int):
        rows, self.pictures = folder / "rows.jsonl", folder / "out"
        rows.write_text("".join(json.dumps({"prompt": PROMPT.format(i), "seed": i}) + "\n" for i in range(count)))
        size = {"width": side, "height": side, "workers": workers, "encoders": encoders}
        options = [f"--{name}={value}" for name, value in size.items()]
        command = [sys.executable, ROOT / "cli.py", "batch", rows, "-o", self.pictures, "--device", "cpu", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    @property
    def drawn(self) -> int:
        return len(list(self.pictures.glob("*.png")))

    def reach(self, count: int) -> tuple[Counter[str], float, int]:
        """Wait for so many pictures; processor time by kind, seconds of the clock, and how many they are now."""
        while self.drawn < count and self.process.poll() is None:
            time.sleep(0.02)
        spent = Counter({"the command": _seconds(self.process.pid)})
        for pid, name in processes.below(self.process.pid).items():
            spent["workers" if name.startswith(processes.WORKER) else "Ray"] += _seconds(pid)
        return spent, time.monotonic(), self.drawn


def alone(side: int, count: int = 12) -> float:
    """Processor time of a picture in the pipeline without anything round it, in seconds; the first two warm up."""
    import zimage

    pipe, spent = zimage.ZImage.load(device="cpu"), []
    for i in range(count):
        begun = time.process_time()
        pipe.generate(PROMPT.format(i), seed=i, width=side, height=side)
        spent.append(time.process_time() - begun)
    return sum(spent[2:]) / (count - 2)


def _seconds(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return (int(words[11]) + int(words[12])) / TICK


@click.command()
@click.option("--workers", default=1)
@click.option("--encoders", default=0)
@click.option("--side", default=256, help="Pixels.")
@click.option("--count", default=30, help="Pictures.")
def main(workers: int, encoders: int, side: int, count: int) -> None:
    """Measure a batch of the demo model, each process on one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        batch = Batch(Path(folder), count, side, workers, encoders)
        (before, begun, first), (after, ended, last) = batch.reach(3 * workers), batch.reach(count - 2)
        batch.process.wait()
    pictures = last - first
    found = {kind: round((after[kind] - before[kind]) / pictures * 1000, 1) for kind in after}
    found |= {"alone": round(alone(side) * 1000, 1), "pictures a second": round(pictures / (ended - begun), 2)}
    click.echo("\n".join(f"{kind:>18} {value:8}" for kind, value in found.items()))
    click.echo(json.dumps({"workers": workers, "encoders": encoders, "side": side, "ms per picture": found}))


if __name__ == "__main__":
    main()
