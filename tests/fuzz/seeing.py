"""Mutated vision models, their configs and the pictures that they are shown, each through a whole pipeline."""

import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tiny
from damaged import HEADERS
from PIL import Image

import zimage
from fuzz.configs import CONFIG, another_number, mutated
from fuzz.weights import TENSORS, State, bytes_of
from zimage.dit import ZImageDiT
from zimage.text import Qwen3, Qwen3VL
from zimage.vae import AutoencoderKL

Chance = random.Random
Case = tuple[str, Callable[[], None]]
Files = dict[str, bytes]  # by name
MODES = ("RGB", "L", "RGBA", "P", "1", "I;16", "F")
PIXELS = {**tiny.PIXELS, "size": {"shortest_edge": 1024, "longest_edge": 1 << 16}}  # more would only take longer
SIDES = (1, 2, 15, 16, 17, 31, 64, 199, 200, 201, 640, 3000)


def cases(chance: Chance, folder: Path) -> Iterator[Case]:
    """Endless mutations; each call sees a picture with what it wrote, in one of the two modes."""
    model = model_in(folder / "model")
    while True:
        kind = chance.random()
        yield (_of_config if kind < 0.45 else _of_file if kind < 0.8 else _of_picture)(chance, model, folder / "vision")


def model_in(folder: Path) -> Path:
    parts = (Qwen3.from_config(tiny.SEEING_QWEN), ZImageDiT.from_config(tiny.DIT), AutoencoderKL.from_config(tiny.KL))
    states = [tiny.randomised(part, seed).state_dict() for seed, part in enumerate(parts)]
    shutil.rmtree(folder, ignore_errors=True)
    return tiny.write_model(folder, *states, tiny.KL, text_config=tiny.SEEING_QWEN)


@functools.cache
def _state() -> State:
    return dict(tiny.randomised(Qwen3VL.from_config(tiny.SEEING), 3).state_dict())


def _of_config(chance: Chance, model: Path, vision: Path) -> Case:
    """A value of one of its two files, in a random one of the objects within."""
    change, name = chance.choice(CONFIG), chance.choice(["config.json", "config.json", "preprocessor_config.json"])
    sound = json.dumps(tiny.SEEING if name == "config.json" else PIXELS).encode()
    content = mutated(sound, partial(_within, change), chance)
    return f"{name}: {change.__name__}", partial(see, model, vision, {name: content}, chance.random())


def _within(change: Callable[[dict, Chance], Any], content: dict, chance: Chance) -> bytes | None:
    inner = [value for value in content.values() if isinstance(value, dict)]
    inner += [value for each in inner for value in each.values() if isinstance(value, dict)]
    numbered = [each for each in (content, *inner) if any(type(value) is int for value in each.values())]
    within = chance.choice(numbered if change is another_number else [content, *inner])
    made = change(within, chance)
    if within is content or not isinstance(made, bytes):
        return made
    return json.dumps(content).encode().replace(json.dumps(within).encode(), made)


def _of_file(chance: Chance, model: Path, vision: Path) -> Case:
    change, state = chance.choice((*HEADERS, *TENSORS)), dict(_state())
    content = change(bytes_of(state), chance) if change in HEADERS else bytes_of(change(state, chance))
    mode = chance.random()
    return f"weights: {change.__name__}", partial(see, model, vision, {"model.safetensors": content}, mode)


def _of_picture(chance: Chance, model: Path, vision: Path) -> Case:
    size, kind = (
        (chance.choice(SIDES), chance.choice(SIDES)),
        chance.choice(MODES),
    )
    picture, text = Image.new(kind, size), chance.choice(["", "a cat", "<|image_pad|>", "<|vision_end|>", "x" * 5000])
    look = {"text": text, "layer": chance.choice([-2, -1, 0, -99]), "tokens": chance.choice(["image", "all"])}
    return f"{kind} picture of {size}, {look}", partial(see, model, vision, {}, chance.random(), picture, **look)


def see(
    model: Path,
    vision: Path,
    files: Files,
    mode: float = 0.0,
    picture: Image.Image | None = None,
    **look: Any,
) -> None:
    """A picture, by a vision model with these files in place of its own; `mode` from 0 to 1 chooses one of three."""
    shutil.rmtree(vision, ignore_errors=True)
    tiny.write_vision(vision, _state(), pixels=PIXELS)
    for name, content in files.items():
        (vision / name).write_bytes(content)
    settings = {"vision_mode": (None, "full", "tower")[int(3 * mode)], "device": "cpu", "dtype": "fp32"}
    pipe = zimage.ZImage.load(model, vision_model=vision, **settings)
    pipe.see(picture or Image.new("RGB", (48, 40)), **look)
