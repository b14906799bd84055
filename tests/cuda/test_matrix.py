"""Every kind of file × precision × placement × residency × request on pretended cards: by default each value at least
once, with `--full` every pair of values."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import loose
import numpy as np
import pytest
import tiny
import torch
from pretended import needs_pretended, pretend

import zimage
from bench import writers
from zimage.dit import ZImageDiT
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL

pytestmark = [pytest.mark.cuda, needs_pretended]

# Wide enough for a K kind's 256 columns, and for products of quantised matrices.
DIT = {**tiny.DIT, "dim": 768, "n_heads": 6, "n_kv_heads": 6, "axes_dims": [32, 48, 48]}
SCALED = {
    "fp8 without scales": writers.cast_fp8,
    "fp8 of ComfyUI": writers.new_comfy_fp8,
    "fp8 of LightX2V": writers.lightx2v_fp8,
    "int8 by rows": writers.int8_rows,
    "int8 ConvRot": writers.int8_convrot,
    "int4 ConvRot": writers.int4_convrot,
    "nvfp4": writers.nvfp4,
    "mxfp8": writers.mxfp8,
}
GGUF = ("Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q3_K")
ONE = {"device": "cuda:0"}
FACTORS: dict[str, dict[str, dict]] = {
    "kind": {kind: {} for kind in ("plain", *SCALED, *GGUF)},
    "precision": {
        "bf16": {},
        "fp32": {"dtype": "fp32"},
        "fp16": {"dtype": "fp16"},
        "int8": {"precision": "int8"},
        "fp8": {"precision": "fp8"},
    },
    "place": {
        "one card": ONE,
        "the second card": {"device": "cuda:1"},
        "two cards": {"text_encoder_device": "cuda:1", "dit_device": "cuda:0", "vae_device": "cuda:1"},
        "encoder on the CPU": {**ONE, "text_encoder_device": "cpu"},
        "VAE on the CPU": {**ONE, "vae_device": "cpu"},
    },
    "residency": {"kept": {}, "in turn": {"residency": "stage"}, "tight": {}},
    "request": {
        "plain": {},
        "guided": {"guidance": 2.0},
        "guided batch": {"prompt": ["a cat", "a red apple and a dog face"], "batch_size": 2, "guidance": 2.0},
        "strips": {"tile_mode": "exact", "tile_size": 32},
        "two passes": {"hires": 2.0},
    },
}
SLACK = 100_000_000  # bytes by which this process may grow meanwhile
BY_COMFY = {"fp8 of ComfyUI", "int8 ConvRot", "int4 ConvRot", "nvfp4", "mxfp8"}  # written by the tool itself
Case = tuple[str, ...]


def pairs(case: Case) -> set[tuple]:
    return set(itertools.combinations(enumerate(case), 2))


def cases(every_pair: bool) -> Iterator[Case]:
    """Cases that hold each value, or each pair of values, at least once; the same ones every time."""
    values, chance = [list(factor) for factor in FACTORS.values()], random.Random(1)
    if not every_pair:
        for i in range(max(map(len, values))):
            yield tuple(each[(i + n * (i // len(each))) % len(each)] for n, each in enumerate(values))
        return
    left = {p for case in itertools.product(*values) for p in pairs(case)}
    while left:
        drawn = [tuple(map(chance.choice, values)) for _ in range(200)]
        best = max(drawn, key=lambda case: len(pairs(case) & left))
        left -= pairs(best)
        yield best


def parameters(every_pair: bool) -> list:
    """The cases as pytest takes them."""
    return [
        pytest.param(case, id=", ".join(case), marks=loose.COMFY if case[0] in BY_COMFY else ())
        for case in cases(every_pair)
    ]


class Files(dict):
    """A model folder, and a DiT of every kind, written when it is first asked for; what is in them does not matter."""

    def __init__(self, folder: Path, states: list[dict]):
        self.folder, self.dit = folder, states[1]
        self["plain"] = tiny.write_model(folder / "model", *states, tiny.KL, DIT)

    def __missing__(self, kind: str) -> Path:
        if kind in GGUF:
            self[kind] = write_zeros(self.folder / f"{kind}.gguf", writers.renamed("dit", "native", self.dit), kind)
        else:
            matrices = {key: value + 1 for key, value in self.dit.items()}
            tensors = writers.quantised(matrices, SCALED[kind])[0]
            self[kind] = writers.save(tensors, self.folder / f"{kind}.safetensors")
        return self[kind]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("kinds")
    modules = (Qwen3.from_config(tiny.QWEN), ZImageDiT.from_config(DIT), AutoencoderKL.from_config(tiny.KL))
    states = [{key: torch.zeros_like(value).bfloat16() for key, value in m.state_dict().items()} for m in modules]
    return Files(folder, states)


def write_zeros(file: Path, state: dict, kind: str) -> Path:
    """A GGUF file of a kind that its package cannot make: blocks of zero bytes are zeros."""
    import gguf

    target = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[target]
    writer = gguf.GGUFWriter(file, "lumina2")
    for key, value in state.items():
        if writers.is_matrix(key):
            rows, columns = value.shape
            writer.add_tensor(key, np.zeros((rows, columns // numbers * size), np.uint8), raw_dtype=target)
        else:
            writer.add_tensor(key, value.float().numpy())
    writers.finish_gguf(writer)
    return file


def draw(files: Files, case: Case) -> None:
    kind, precision, place, residency, request = case
    load = {**FACTORS["precision"][precision], **FACTORS["place"][place], **FACTORS["residency"][residency]}
    if kind != "plain":
        load["dit"] = files[kind]
    asked = {"prompt": "a cat", "seed": 1, "steps": 1, "width": 32, "height": 32, **FACTORS["request"][request]}
    with pretend(devices=2) as card:
        if residency == "tight":
            tight = zimage.ZImage.load(files["plain"], **load, memory=1e-9)
            plan = tight.prepare(zimage.Request.from_mapping(asked), must_fit=False).plan
            load["memory"] = (plan.tightest.peak + (SLACK if "CPU" in place else 0)) * 1.001 / 1e9
        pipe = zimage.ZImage.load(files["plain"], **load)
        result = pipe.generate(**asked)
    assert len(result.images) == len(result.seeds)
    assert card.total.launches


@pytest.mark.parametrize("case", parameters(every_pair=False))
def test_each_value(files, case):
    draw(files, case)


@pytest.mark.full
@pytest.mark.parametrize("case", parameters(every_pair=True))
def test_each_pair(files, case):
    draw(files, case)
