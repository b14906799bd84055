"""Mutated configs of every component, and the scheduler's and tokenizer's files, each in the whole model."""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny

import zimage
from zimage.dit import ZImageDiT
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL, AutoencoderKLWan

Call = Callable[[], None]
ROUNDS = 40  # of each mutation of each file
ODD = (
    None, True, False, 0, -1, 1, 3, 7.5, 2**31, 2**63, 10**9, 1e308, -1e308, float("nan"), float("inf"), "", "8", "x",
    "\ud800", "\x1b]0;owned\x07", "y" * 100_000, [], [8], [[8]], ["8"], [None] * 3, [1] * 10_000, [10**9] * 3, {},
    {"a": {"b": []}}, {"rope_type": []}, {"type": "yarn"}, ["full_attention"] * 4, ["sliding_attention"],
)  # fmt: skip
STEPS = (
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": "x"},
    {"type": "Prepend", "prepend": "x" * 10**6},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}]},
    {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": 5}]},
    {"type": "Metaspace", "replacement": "xx"},
    {"pattern": {"String": ""}, "content": "x"},
)
MODELS = (
    {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7},
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "b", "max_input_chars_per_word": 2**63},
    {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []},
    {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]], "dropout": 1.0},
    {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c", 5]},
)


def cases(chance: random.Random, folder: Path) -> Iterator[tuple[str, Call]]:
    """Each mutation's name, and a call that opens the model with the mutated file: it ends, or raises a ZImageError."""
    model = _model(folder / "model")
    files = [*sorted(model.glob("*/*config.json")), model / "tokenizer" / "tokenizer.json"]
    for _ in range(ROUNDS):
        for file in files:
            sound = file.read_bytes()
            mutate = chance.choice(TOKENIZER if file.name == "tokenizer.json" else CONFIG)
            file.write_bytes(mutated(sound, mutate, chance))
            yield f"{file.parent.name}: {mutate.__name__}", lambda: _open(model)
            file.write_bytes(sound)
    wan = json.dumps(tiny.WAN).encode()
    for _ in range(ROUNDS):
        mutate = chance.choice(CONFIG)
        content = mutated(wan, mutate, chance)
        yield f"Wan VAE: {mutate.__name__}", lambda content=content: _build(content, folder / "wan")


def _model(folder: Path) -> Path:
    parts = (Qwen3.from_config(tiny.QWEN), ZImageDiT.from_config(tiny.DIT), AutoencoderKL.from_config(tiny.KL))
    states = [tiny.randomised(part, seed).state_dict() for seed, part in enumerate(parts)]
    shutil.rmtree(folder, ignore_errors=True)
    return tiny.write_model(folder, *states, tiny.KL)


def _open(model: Path) -> None:
    pipe = zimage.ZImage.load(model, device="cpu", dtype="fp32")
    pipe.prepare(zimage.Request(prompt="a cat <|im_end|> 12", seed=1, steps=1))


def _build(content: bytes, folder: Path) -> None:
    import torch

    from zimage.formats.json_text import read_json

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    with torch.device("meta"):
        AutoencoderKLWan.from_config(read_json(folder / "config.json"))


def mutated(sound: bytes, mutate: Callable[[dict, random.Random], Any], chance: random.Random) -> bytes:
    content = copy.deepcopy(json.loads(sound))
    made = mutate(content, chance)
    return made if isinstance(made, bytes) else json.dumps(content if made is None else made).encode()


def another_value(content: dict, chance: random.Random) -> None:
    content[chance.choice(list(content))] = chance.choice(ODD)


def another_item(content: dict, chance: random.Random) -> None:
    lists = [key for key, value in content.items() if isinstance(value, list) and value]
    key = chance.choice(lists) if lists else chance.choice(list(content))
    items = list(content[key]) if lists else []
    content[key] = [*items[: chance.randrange(len(items) + 1)], chance.choice(ODD), *items[2:]]


def another_number(content: dict, chance: random.Random) -> None:
    numbers = [key for key, value in content.items() if type(value) in (int, float)]
    key = chance.choice(numbers)
    content[key] = content[key] * chance.choice([0, -1, 0.5, 2, 3, 1000, 10**9, 10**15])


def lost_key(content: dict, chance: random.Random) -> None:
    del content[chance.choice(list(content))]


def new_key(content: dict, chance: random.Random) -> None:
    names = (
        "rope_parameters",
        "rope_scaling",
        "layer_types",
        "sample_size",
        "out_channels",
        "use_quant_conv",
        "dropout",
    )
    content[chance.choice(names)] = chance.choice(ODD)


def key_twice(content: dict, chance: random.Random) -> bytes:
    key = chance.choice(list(content))
    return (json.dumps(content)[:-1] + f", {json.dumps(key)}: {json.dumps(chance.choice(ODD))}}}").encode()


def digits(content: dict, chance: random.Random) -> bytes:
    content[chance.choice(list(content))] = "DIGITS"
    return json.dumps(content).replace('"DIGITS"', "9" * chance.choice([30, 5000])).encode()


def nested(content: dict, chance: random.Random) -> bytes:
    content[chance.choice(list(content))] = "NESTED"
    depth = chance.choice([10, 100, 10_000])
    return json.dumps(content).replace('"NESTED"', "[" * depth + "]" * depth).encode()


def cut_or_flipped(content: dict, chance: random.Random) -> bytes:
    text = bytearray(json.dumps(content).encode())
    if chance.random() < 0.5:
        return bytes(text[: chance.randrange(len(text))])
    text[chance.randrange(len(text))] ^= 1 << chance.randrange(8)
    return bytes(text)


def another_kind(content: dict, chance: random.Random) -> bytes:
    return json.dumps(chance.choice(ODD)).encode()


def another_step(content: dict, chance: random.Random) -> None:
    step = chance.choice(STEPS)
    for _ in range(chance.choice([0, 0, 1, 3])):
        step = {"type": "Sequence", chance.choice(["normalizers", "pretokenizers", "decoders"]): [step]}
    content[chance.choice(["normalizer", "pre_tokenizer", "decoder"])] = step


def another_model(content: dict, chance: random.Random) -> None:
    content["model"] = chance.choice(MODELS)


def another_word(content: dict, chance: random.Random) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary[chance.choice(list(vocabulary))] = chance.choice(ODD)


def another_token(content: dict, chance: random.Random) -> None:
    token = chance.choice(content["added_tokens"])
    token[chance.choice(list(token))] = chance.choice(ODD)


def sorted_keys(content: dict, chance: random.Random) -> bytes:
    another_step(content, chance)
    return json.dumps(content, sort_keys=True).encode()


ANY = (another_value, lost_key, key_twice, digits, nested, cut_or_flipped, another_kind)
CONFIG = (*ANY, another_value, another_item, another_number, new_key)
TOKENIZER = (*ANY, another_step, another_step, another_model, another_word, another_token, sorted_keys)
