"""Mutated ControlNets: loose files in every form, naming and kind of number, and folders with their configs."""

import functools
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import control_nets
import loose
import tiny
import torch
from control_nets import FORMS, PUBLISHED
from damaged import HEADERS, gguf_damaged

import zimage
from fuzz.configs import CONFIG, mutated
from fuzz.weights import QUANTISED, TENSORS, State, bytes_of, gguf_of
from zimage.dit import ControlNet, ZImageDiT

Chance = random.Random
Case = tuple[str, Callable[[], None]]
WIDEST = 1024  # of a net that is run as well: a mutated config may describe a larger one that its file does not hold


def cases(chance: Chance, folder: Path) -> Iterator[Case]:
    """Endless mutations; each call loads what it wrote, asks whether a DiT fits, and runs it."""
    while True:
        kind = chance.random()
        yield (_of_config if kind < 0.3 else _of_gguf if kind < 0.4 else _of_file)(chance, folder)


@functools.cache
def _state(form: str) -> State:
    config = {**FORMS[form], "control_layers_places": PUBLISHED[form]["control_layers_places"]}
    return {k: v.bfloat16() for k, v in tiny.randomised(ControlNet.from_config(config), 7).state_dict().items()}


@functools.cache
def _sources() -> list[tuple[str, State]]:
    lite = _state("lite")
    return [
        *((form, _state(form)) for form in FORMS),
        ("native", loose.renamed("control", "native", lite, "model.diffusion_model.")),
        ("2.0 as published", _state("2.1") | _untrained()),
        *((name, loose.quantised(lite, writer)[0]) for name, writer in QUANTISED.items()),
    ]


def _untrained() -> State:
    return {k: torch.zeros_like(v) for k, v in _state("2.1").items() if re.match(r"control_noise_\w+\.\d\.\w+_proj", k)}


def _of_file(chance: Chance, folder: Path) -> Case:
    name, state = chance.choice(_sources())
    change = chance.choice((*HEADERS, *TENSORS, *OWN))
    content = change(bytes_of(state), chance) if change in HEADERS else bytes_of(change(dict(state), chance))
    return f"{name}: {change.__name__}", functools.partial(_load, folder / "mutated.safetensors", content)


def _of_gguf(chance: Chance, folder: Path) -> Case:
    return "GGUF", functools.partial(_load, folder / "mutated.gguf", gguf_damaged(_gguf_file(), chance))


@functools.cache
def _gguf_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return gguf_of(loose.renamed("control", "native", _state("lite")), Path(folder) / "x")


def _of_config(chance: Chance, folder: Path) -> Case:
    form, change = chance.choice(list(FORMS)), chance.choice((*CONFIG, other_places))
    content = mutated(json.dumps(FORMS[form]).encode(), change, chance)

    def call() -> None:
        place = folder / "controlnet"
        place.mkdir(exist_ok=True)
        (place / "config.json").write_bytes(content)
        file = place / "diffusion_pytorch_model.safetensors"
        _load(file, bytes_of(dict(control_nets.net(form).state_dict())), place)

    return f"config of {form}: {change.__name__}", call


def _load(file: Path, content: bytes, path: Path | None = None) -> None:
    file.write_bytes(content)
    net = zimage.load_component(path or file, "control", dtype="fp32")
    assert isinstance(net, ControlNet)
    if net.config.dim <= WIDEST:
        control_nets.hints(net)
    net.config.check_beside(_dit())


@functools.cache
def _dit():
    return ZImageDiT.from_config({**control_nets.DIT, "n_layers": 30}).config


# ------------------------------------------------------------------ what only these files have


def other_places(content: dict, chance: Chance) -> None:
    """Other places, counts and forms, each of a right kind."""
    content["control_layers_places"] = sorted({0, *(chance.randrange(300) for _ in range(chance.randrange(4)))})
    content["control_refiner_layers_places"] = chance.choice([[], [0], [0, 1], [1], [0, 5], [0, 1, 2], None])
    content["add_control_noise_refiner"] = chance.choice([None, "control_layers", "control_noise_refiner"])
    content["n_refiner_layers"] = chance.choice([1, 2, 3])


def renumbered(state: State, chance: Chance) -> State:
    """Blocks under other numbers."""
    old, new = (f".{chance.randrange(6)}." for _ in range(2))
    return {key.replace(old, new, 1): value for key, value in state.items()}


def fewer_blocks(state: State, chance: Chance) -> State:
    group, last = chance.choice(["control_layers.", "control_noise_refiner."]), chance.randrange(1, 16)
    return {
        key: value
        for key, value in state.items()
        if not (match := re.search(rf"{re.escape(group)}(\d+)\.", key)) or int(match[1]) < last
    }


def other_projections(state: State, chance: Chance) -> State:
    """Zeros, other kinds and other shapes where 2.0 is told from 2.1."""
    made = chance.choice([(64, 64), (64,), (0, 64), (1, 1), (), (64, 64, 1)])
    kinds = (torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64)
    value = (torch.zeros if chance.random() < 0.7 else torch.ones)(made).to(chance.choice(kinds))
    return {**state, f"control_noise_refiner.{chance.randrange(2)}.before_proj.weight": value}


def other_input(state: State, chance: Chance) -> State:
    """Another number of control channels, or one that is not whole."""
    key = next((key for key in state if key.endswith("control_all_x_embedder.2-1.weight")), None)
    return {**state, key: torch.ones(64, chance.choice([4, 64, 131, 132, 0, 1, 4096]))} if key else state


OWN = (renumbered, fewer_blocks, other_projections, other_input)
