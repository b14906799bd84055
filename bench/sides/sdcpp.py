"""The side of stable-diffusion.cpp: its binary on the same weights in single files, timed by its log."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from bench.sides.clock import Clock, serve

LOGGED = {
    "load": r"loading tensors completed, taking ([\d.]+)s",
    "encode": r"get_learned_condition completed, taking ([\d.]+)\s*(ms|s)",
    "sampling": r"sampling completed, taking ([\d.]+)s",
    "decode": r"decode_first_stage completed, taking ([\d.]+)s",
}


def render(
    clock: Clock, folder: str, size: int, steps: int, dtype: str, prompt: str, binary: str, files: dict[str, str]
) -> None:
    """Render from `files`, the folder's components as single files, in the dtype in which they are stored."""
    with tempfile.TemporaryDirectory() as out:
        command = [binary, "-p", prompt, "-o", f"{out}/picture.png", "-W", size, "-H", size, "--steps", steps]
        command += ["--cfg-scale", 1.0, "--seed", 0, "-v", "--diffusion-model", files["dit"]]
        command += ["--llm", files["text_encoder"], "--vae", files["vae"]]
        log, clock.figures["peak_gb"] = run(list(map(str, command)))
        clock.lap("total")
        assert Path(out, "picture.png").is_file(), log[-2000:]
    found = {name: seconds(pattern, log) for name, pattern in LOGGED.items()}
    clock.figures |= {"step": found.pop("sampling") / steps, **found}


def seconds(pattern: str, log: str) -> float:
    """The seconds in the last line of the log that matches. Raises ValueError where there is none."""
    matches = list(re.finditer(pattern, log))
    if not matches:
        raise ValueError(f"stable-diffusion.cpp logged nothing like {pattern!r}; its messages may have changed")
    value, unit = float(matches[-1][1]), (*matches[-1].groups(), "s")[1]
    return value / 1000 if unit == "ms" else value


def run(command: list[str]) -> tuple[str, float]:
    """Run a command; returns its log and its peak of resident memory in GB."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with status {process.returncode}: {text[-2000:]}")
    return text, usage.ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    serve({"render": render})
