"""The server's document: every block of curl lines and of Python runs as it stands, against a real server."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

README = Path(__file__).parents[2] / "zimage" / "serve" / "README.md"
ADDRESS = "http://127.0.0.1:7860"
BLOCKS = re.findall(r"^```(bash|py)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
# As they stand, the lines go on after an answer that is an error.
STRICT = 'set -euo pipefail; curl() { command curl --fail-with-body --max-time 100 "$@"; }\n'


def title(block):
    return block[1].strip().splitlines()[0][:60]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("block", BLOCKS, ids=title)
def test_a_block_runs(server, tmp_path, block):
    kind, text = block
    Image.new("RGB", (128, 128), "teal").save(tmp_path / "cat.png")
    Image.new("L", (128, 128), 255).save(tmp_path / "mask.png")
    command = ["bash", "-c", STRICT] if kind == "bash" else [sys.executable, "-c", ""]
    command[-1] += text.replace(ADDRESS, server.url)
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            picture.verify()


def test_every_operation_is_shown(server):
    """By its path, as far as that is fixed, or the end of one of AUTOMATIC1111's: a new one needs a line."""
    paths = server.http.get("/openapi.json").json()["paths"]
    text = README.read_text(encoding="utf-8")
    pieces = {piece.rstrip("/") for path in paths for piece in re.split(r"\{.*?\}", path)}
    assert not [piece for piece in pieces if piece.removeprefix("/sdapi/v1/") not in text]
