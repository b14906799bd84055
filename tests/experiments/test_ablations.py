"""The ablations in bench/README.md: each line runs as it stands on a tiny model, and each value does something."""

import re
import shlex
from pathlib import Path

import pytest
import tiny
from PIL import Image

from zimage.cli import main
from zimage.dit import ZImageDiT
from zimage.experiments.record import read_records
from zimage.text import Qwen3, Qwen3VL
from zimage.vae import AutoencoderKL

README = (Path(__file__).parent.parent.parent / "bench" / "README.md").read_text(encoding="utf-8")
LINES = re.findall(r"^python -m bench (sweep -o sweeps/.*)$", README, re.MULTILINE)
LAYERS = 36  # of the published text encoder
CELLS = {"shift-steps": 12, "think-block": 5, "layers-complexity": 8}
CELLS |= {"layers-guidance": 35, "layers-guidance-shift": 27}
SMALL = ["--width", "32", "--height", "32", "--device", "cpu", "--dtype", "fp32", "-q"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the lines name, and a model whose text encoder is as deep as the published one."""
    folder = tmp_path_factory.mktemp("ablations")
    text, vision = {**tiny.SEEING_QWEN, "num_hidden_layers": LAYERS}, dict(tiny.SEEING)
    vision["text_config"] = {**vision["text_config"], "num_hidden_layers": LAYERS}
    parts = (Qwen3.from_config(text), ZImageDiT.from_config(tiny.DIT), AutoencoderKL.from_config(tiny.KL))
    states = [tiny.randomised(part, seed).state_dict() for seed, part in enumerate(parts)]
    tiny.write_model(folder / "model", *states, tiny.KL, text_config=text)
    seeing = tiny.randomised(Qwen3VL.from_config(vision), 3).state_dict()
    tiny.write_vision(folder / "Qwen3-VL-4B-Instruct", seeing, vision)
    Image.radial_gradient("L").resize((160, 128)).convert("RGB").save(folder / "photo.png")
    (folder / "prompts.txt").write_text("a cat\n")
    (folder / "simple-and-detailed.txt").write_text("a cat\na grey cat on a red mat by the window\n")
    (folder / "long.txt").write_text("a cat on a mat " * 20)
    return folder


def test_the_16_of_the_reference_platform_and_more_are_there():
    assert len(LINES) == len({shlex.split(line)[2] for line in LINES}) == 24


@pytest.mark.parametrize("line", LINES, ids=lambda line: shlex.split(line)[2].removeprefix("sweeps/"))
def test_a_line_draws_as_many_pictures_as_it_has_cells(place, line, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = shlex.split(line)
    few = ["--steps", "2" if "shift=" in line else "1"] if "--steps" in words else []  # one step has no shift
    assert main([*words, "--model", "model", *SMALL, *few]) == 0, capsys.readouterr().err
    folder = place / words[2]
    records, name = read_records(folder), folder.name
    listed = words[-1].partition("=")[2]
    expected = CELLS.get(name) or len(re.sub(r'"[^"]*"', "", listed).split(","))
    assert len(records) == expected
    assert len({Image.open(folder / record.path).tobytes() for record in records}) == expected
