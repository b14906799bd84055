"""Mutated files of a vision model, pictures of any size, and texts with image tokens where none belong."""

import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from damaged import HEADERS
from PIL import Image
from safetensors.torch import save
from torch import Tensor

import zimage
from fuzz.configs import CONFIG, another_number, mutated
from fuzz.weights import TENSORS
from zimage.loading.files import Component
from zimage.text import Qwen3VL
from zimage.text.vision_input import PixelLimits, Pixels, pixels_of

Chance = random.Random
Case = tuple[str, Callable[[], None]]
PREPROCESSOR = {
    **{"size": {"shortest_edge": 4096, "longest_edge": 65_536}, "min_pixels": None, "max_pixels": 8192},
    **{"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "resample": 3, "do_resize": True},
    **{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
}
SIDES = (0, 1, 2, 5, 16, 31, 33, 64, 97, 200, 201, 1000, 4000)
INSIDE = ("vision_config", "text_config", "rope_scaling", "size")


def cases(chance: Chance, folder: Path) -> Iterator[Case]:
    """Endless mutations, each of one file of a sound folder, of a picture or of a text."""
    folder.mkdir(exist_ok=True)
    while True:
        for make in (_config, _config, _limits, _weights, _picture, _text):
            yield make(chance, folder)


@functools.cache
def _model() -> Qwen3VL:
    return tiny.randomised(Qwen3VL.from_config(tiny.VISION), 7).requires_grad_(False)


def _write(folder: Path, **files: bytes) -> None:
    """A sound folder, but for the files that are passed: their names with _ for a dot."""
    state = {key: value.bfloat16().contiguous() for key, value in _model().state_dict().items()}
    sound = {
        "config.json": json.dumps(tiny.VISION).encode(),
        "preprocessor_config.json": json.dumps(PREPROCESSOR).encode(),
    }
    sound["model.safetensors"] = files["model_safetensors"] if "model_safetensors" in files else save(state)
    for name, content in (sound | {key.replace("_json", ".json"): value for key, value in files.items()}).items():
        if name != "model_safetensors":
            (folder / name).write_bytes(content)


def _changed(sound: dict[str, Any], chance: Chance) -> tuple[str, bytes]:
    """A config with a mutation in it, or in an object within it."""
    numbers = any(type(value) in (int, float) for value in sound.values())
    mutate = chance.choice([each for each in CONFIG if numbers or each is not another_number])
    inner = [key for key in INSIDE if key in sound]
    if not inner or chance.random() < 0.4:
        return mutate.__name__, mutated(json.dumps(sound).encode(), mutate, chance)
    key = chance.choice(inner)
    name, content = _changed(sound[key], chance)
    return f"{key}: {name}", json.dumps({**sound, key: "INSIDE"}).encode().replace(b'"INSIDE"', content)


def _config(chance: Chance, folder: Path) -> Case:
    name, content = _changed(tiny.VISION, chance)
    part = chance.choice(["vision", "vision_tower"])

    def call() -> None:
        _write(folder, config_json=content)
        found = Component.open(part, folder).skeleton.config
        assert isinstance(found.pixel_limits(folder), PixelLimits)

    return f"{part} config: {name}", call


def _limits(chance: Chance, folder: Path) -> Case:
    name, content = _changed(PREPROCESSOR, chance)
    size = chance.choice(SIDES), chance.choice(SIDES)

    def call() -> None:
        (folder / "preprocessor_config.json").write_bytes(content)
        limits = _model().config.pixel_limits(folder)
        width, height = limits.size(*size)
        assert width % 32 == height % 32 == 0

    return f"preprocessor, {size}: {name}", call


def _weights(chance: Chance, folder: Path) -> Case:
    state = {key: value.bfloat16().contiguous() for key, value in _model().state_dict().items()}
    change, part = chance.choice((*HEADERS, *TENSORS)), chance.choice(["vision", "vision_tower"])
    content = change(save(state), chance) if change in HEADERS else _saved(change(state, chance))

    def call() -> None:
        _write(folder, model_safetensors=content)
        model = zimage.load_component(folder, part, dtype="fp32")
        assert isinstance(model, Qwen3VL)
        model.look([_noise(64, 64)])

    return f"{part} weights: {change.__name__}", call


def _saved(state: dict[str, Tensor]) -> bytes:
    return save({key: value.contiguous() for key, value in state.items()})


def _picture(chance: Chance, folder: Path) -> Case:
    mode, size = (
        chance.choice(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"]),
        (chance.choice(SIDES), chance.choice(SIDES)),
    )
    limits = PixelLimits(chance.choice([1, 1024, 4096]), chance.choice([4096, 65_536]))
    return f"picture {mode} {size}", lambda: _look(pixels_of(Image.new(mode, size), limits))


def _text(chance: Chance, folder: Path) -> Case:
    pixels = [_noise(*chance.choice([(32, 32), (64, 96), (96, 32)])) for _ in range(chance.randint(1, 3))]
    sight = _model().look(pixels)
    ids = [1]
    for count in sight.counts:
        ids += [sight.pad] * (count + chance.choice([0, 0, 0, 1, -1])) + [2] * chance.choice([0, 1, 1, 3])
    if chance.random() < 0.3:
        chance.shuffle(ids)

    def call() -> None:
        model = _model().text
        assert model is not None
        assert torch.isfinite(model(torch.tensor([ids]), sight=sight)).all()

    return f"text of {len(ids)} with {len(pixels)} pictures", call


def _noise(width: int, height: int) -> Pixels:
    return pixels_of(Image.effect_noise((width, height), 60), PixelLimits(1, 1 << 20))


def _look(pixels: Pixels) -> None:
    assert torch.isfinite(_model().look([pixels]).tokens).all()
