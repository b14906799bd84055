"""The README is part of the interface: its commands work, its help blocks are current, its code runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tables import filled

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = 'pip install -c constraints.txt -e . && python cli.py gen "a cat face on a blue background"'
TEST = 'pip install -c constraints.txt -e ".[test]" && pytest'


def python(*arguments, **options):
    environment = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, **options
    )


def test_the_two_commands_stand_near_the_top():
    top = README.splitlines()[:25]
    assert INSTALL in top
    assert TEST in top


def test_the_first_command_draws_a_picture(tmp_path):
    arguments = shlex.split(INSTALL.split("&& python cli.py ")[1])
    done = python(ROOT / "cli.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bundled demo" in done.stderr
    assert "--model PATH" in done.stderr
    (picture,) = tmp_path.iterdir()
    assert picture.name == done.stdout.strip()


@pytest.mark.parametrize("command", re.findall(r"<!-- help: ([\w ]+) -->", README))
def test_help_blocks_are_current(command):
    block = re.search(rf"<!-- help: {command} -->\n```text\n(.*?)```\n<!-- end -->", README, re.DOTALL)[1]
    assert block == python(ROOT / "cli.py", *command.split(), "--help").stdout, (
        f"run: zimage {command} --help at 100 columns"
    )


def test_result_tables_are_current():
    assert filled(README) == README, "run: python -m bench tables"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_runs(code, tmp_path):
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_file_in_the_map_exists():
    for path in re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE):
        assert (ROOT / path).exists(), path
