"""The published model as it would lie in files of several kinds: configs, shapes and sizes, and no weight."""

import math
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from bench.weights import TEXT_ENCODER, TRANSFORMER, VAE
from zimage.formats.checkpoint import Checkpoint
from zimage.formats.stored import Stored
from zimage.loading.devices import Place
from zimage.loading.files import Component
from zimage.loading.planner import Planner
from zimage.nn import ggml
from zimage.settings.loading import LoadSettings

CONFIGS = {"text_encoder": TEXT_ENCODER, "dit": TRANSFORMER, "vae": VAE}
CARD = torch.device("cuda", 0)


@cache
def component(name: str, kind: str = "BF16") -> Component:
    """A component of the published size whose matrices are stored as `kind`; the rest is bf16."""
    blank = Component.__new__(Component)
    blank.name, blank.config, blank._described_by = name, CONFIGS[name], Path("config.json")
    entries = {key: _stored(tuple(w.shape), kind) for key, w in blank._build().state_dict().items()}
    return Component(name, CONFIGS[name], Checkpoint(Path("published"), [], entries, None))


def _stored(shape: tuple[int, ...], kind: str) -> Stored:
    count = math.prod(shape)
    if kind == "BF16" or len(shape) != 2 or shape[0] == 1 or shape[1] % ggml.NUMBERS[kind]:
        return Stored(shape, "BF16", 2 * count, None)
    size = ggml.BYTES[kind]
    return Stored(shape, f"GGUF {kind}", count // ggml.NUMBERS[kind] * size, None, packed=True)


@contextmanager
def planner(free: float, kind: str = "BF16", host: float = 64e9, elsewhere: tuple[str, ...] = (), **settings):
    """A Planner on a card with `free` bytes; only the DiT is stored as `kind`, and some components are on the CPU."""
    model = SimpleNamespace(components={name: component(name, kind if name == "dit" else "BF16") for name in CONFIGS})
    places = dict.fromkeys(CONFIGS, Place(CARD, torch.bfloat16))
    places |= dict.fromkeys(elsewhere, Place(torch.device("cpu"), torch.float32))
    memory = {"cuda": int(free), "cpu": int(host)}
    with mock.patch("zimage.loading.planner.available_memory", lambda device: memory[device.type]):
        yield Planner(model, places, LoadSettings(**settings))
