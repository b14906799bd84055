"""Mutated answers of servers that encode: what is taken for a caption has its shape, dtype and finite numbers."""

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from zimage.text.wire import Wanted, check_caption, hidden_states, packed, to_base64, unpacked

ROUNDS = 1000
LIMIT = 1 << 16
WANTED = Wanted((3,), 4, {-2: 1.0}, torch.bfloat16, "0123456789ab")
VALUES = [None, True, -1, 0, 1e400, 2**70, "", "x" * 9000, "\0", [], [3, 4], [[3, 4]], {}, {"-2": 1.0}, "BF16", "NaN"]
TEXTS = ["", "[3]", "[3,4]", "[[3,4]]", "{}", '{"-2": 1e400}', "[" * 100_000, "9" * 5000, "nan", "\u202e", "0" * 12]


def cases(chance: random.Random, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each mutation's name, and a call that takes the answer for a caption, or refuses it."""
    caption = torch.arange(12.0).view(3, 4).bfloat16()
    body = packed([caption], WANTED.layers, WANTED.encoder)
    states = {"hidden_states": to_base64(caption), "shape": [3, 4], "dtype": "float32", "layer": -2}
    for _ in range(ROUNDS):
        yield "bytes", partial(_captions, _bytes(body, chance))
        yield "metadata", partial(_captions, _metadata(body, chance))
        changed = {**states, chance.choice([*states, "fingerprint"]): chance.choice(VALUES)}
        yield "hidden states", partial(_states, json.dumps(changed).encode())
        yield "JSON", partial(_states, _bytes(json.dumps(states).encode(), chance))


def _captions(body: bytes) -> None:
    (caption,), _ = unpacked(body, WANTED)
    check_caption(caption, 3, WANTED)


def _states(body: bytes) -> None:
    check_caption(hidden_states(body, WANTED, LIMIT), 3, WANTED)


def _bytes(body: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut out, or put in."""
    mutated = bytearray(body)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(mutated))
        match chance.randrange(3):
            case 0:
                mutated[at] = chance.randrange(256)
            case 1:
                del mutated[at : at + chance.randint(1, 20)]
            case _:
                mutated[at:at] = chance.randbytes(chance.randint(1, 20))
        mutated = mutated or bytearray(b"\0")
    return bytes(mutated)


def _metadata(body: bytes, chance: random.Random) -> bytes:
    """One of the texts, or of the tensor's facts, replaced; the header says its own length."""
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    part = header[chance.choice(["__metadata__", "0"])]
    part[chance.choice(list(part))] = chance.choice(VALUES + TEXTS * 2)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body[8 + length :]
