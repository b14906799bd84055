"""Mutated pictures and mutated texts in them, for whatever reads pictures: `--image`, `--mask`, `--from`."""

import contextlib
import copy
import io
import json
import random
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from zimage.cli import main
from zimage.pictures.comfyui import parse_graph
from zimage.pictures.files import read_metadata, read_settings
from zimage.pictures.image import open_image, open_mask
from zimage.pictures.inpaint import open_alpha
from zimage.pictures.parameters import parse_parameters
from zimage.pictures.texts import UNICODE, comment_bytes

Call = Callable[[], object]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
ROUNDS = 8  # of each mutation of each file
READERS: dict[str, Callable[[Path], object]] = {
    "image": open_image,
    "mask": open_mask,
    "alpha": open_alpha,
    "metadata": read_metadata,
    "settings": read_settings,
}
TINY = ["--steps", "1", "--width", "64", "--height", "64", "--device", "cpu", "-q"]
OURS = {
    "version": "0.1.0",
    "request": {
        "prompt": "a cat",
        "negative": None,
        "width": 64,
        "height": 64,
        "steps": 1,
        "seed": 7,
        "guidance": 0.0,
        "shift": 3.0,
        "images": 1,
        "layer_weights": {"-2": 1.0},
        "image": None,
        "tile_mode": "off",
    },
    "model": {"name": "demo", "fingerprint": "abcdef0123456789"},
    "lora": [{"name": "style.safetensors", "scale": 0.8, "hash": "0123456789abcdef"}],
}
PARAMETERS = (
    "a cat <lora:style:0.8>\nNegative prompt: dogs\nSteps: 8, Sampler: Euler, CFG scale: 2.5, Seed: 7, Size: 64x64, "
    'Model: "a, b", Denoising strength: 0.6, Hires upscale: 2, Hires resize: 99x99, Lora hashes: "style: 01", Shift: 3'
)
GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 7,
            "steps": 8,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "model": ["11", 0],
            "positive": ["6", 0],
            "negative": ["33", 0],
            "latent_image": ["13", 0],
        },
    },
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["18", 0]}},
    "33": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}},
    "11": {"class_type": "ModelSamplingAuraFlow", "inputs": {"shift": 3.0, "model": ["28", 0]}},
    "28": {"class_type": "LoraLoader", "inputs": {"lora_name": "a", "strength_model": 1.0, "model": ["16", 0]}},
    "13": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64}},
}
ODD = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    float("inf"),
    2**63,
    10**400,
    "",
    "x",
    "\x1b]0;owned\x07",
    "\ud800",
    "\0",
    "9" * 5000,
    "y" * 300_000,
    [],
    [[]],
    ["3", 0],
    ["6", 0],
    {},
    {"name": 5},
    {"on": True, "lora": [1]},
]


def cases(chance: random.Random, folder: Path) -> Iterator[tuple[str, Call]]:
    """Each mutation's name, and a call that reads what it made, in random order: it ends, or raises a ZImageError."""
    made = [*_mutants(chance), *_texts(chance)]
    chance.shuffle(made)
    for number, (name, content) in enumerate(made, 1):
        if isinstance(content, str):
            yield f"{name}: parameters", partial(parse_parameters, content)
            yield f"{name}: graph", partial(parse_graph, content)
            continue
        path = folder / f"{number}.png"
        path.write_bytes(content)
        reader = chance.choice(list(READERS))
        yield f"{name}: {reader}", lambda read=READERS[reader], path=path: _ignored(read(path))
        if number % 50 == 0:
            yield f"{name}: gen", lambda path=path: _render(path, folder)
        path.unlink()


def _ignored(result: object) -> None:
    """A call's result does not matter here."""


def _render(path: Path, folder: Path) -> None:
    """The command line says everything itself: one line on a failure, and nothing that steers a terminal."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        status = main(["gen", "--from", str(path), *TINY, "-o", str(folder / "out.png")])
    lines = said.getvalue().splitlines()
    failed = [line for line in lines if line.startswith("error: ")]
    assert status in (0, 1, 2), (status, lines)
    assert len(failed) == (status != 0), lines
    assert all(line.isprintable() and len(line) <= 2100 for line in lines), lines


def _mutants(chance: random.Random) -> Iterator[tuple[str, bytes]]:
    for kind in FORMATS:
        for title, whole in _sound(chance, kind).items():
            for _ in range(ROUNDS):
                for mutate in (_flipped, _cut, _swapped, _filled, _grown, _of_huge_numbers):
                    yield f"{kind}, {title}, {mutate.__name__.strip('_')}", mutate(chance, whole)
    for kind in ("PNG", "JPEG", "WEBP"):
        for name, text in _texts(chance):
            with contextlib.suppress(ValueError, UnicodeError):  # what such a file cannot hold
                yield f"{kind} with {name}", _with_text(chance, kind, text)
    for width, height in ((2**31 - 1, 2**31 - 1), (30_000, 30_000), (16_384, 16_384), (20_000, 1), (0, 1)):
        yield f"PNG of {width} × {height}", _header(width, height)


def _sound(chance: random.Random, kind: str) -> dict[str, bytes]:
    """Sound files of a kind, of several modes."""
    picture = Image.frombytes("RGB", (24, 16), chance.randbytes(24 * 16 * 3))
    modes = {"JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA"), "BMP": ("RGB", "P", "1"), "GIF": ("P", "L")}
    found = {}
    for mode in modes.get(kind, ("RGB", "RGBA", "P", "LA", "I;16", "1")):
        stream = io.BytesIO()
        made = Image.frombytes(mode, (24, 16), chance.randbytes(768)) if mode == "I;16" else picture.convert(mode)
        made.save(stream, kind, **_extras(kind))
        found[mode] = stream.getvalue()
    return found


def _extras(kind: str) -> dict[str, Any]:
    """What real files carry besides pixels."""
    if kind in ("BMP", "GIF"):
        return {}
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "TIFF":
        return {"compression": "tiff_lzw"}
    exif[0x8769] = {0x9286: comment_bytes(PARAMETERS)}
    exif[0x010E] = json.dumps(OURS)
    return {"exif": exif, "icc_profile": b"profile" * 30}


def _flipped(chance: random.Random, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(chance.choice((1, 3, 20))):
        # the beginning tells most
        data[chance.randrange(chance.choice((len(data), min(64, len(data)))))] = chance.randrange(256)
    return bytes(data)


def _cut(chance: random.Random, whole: bytes) -> bytes:
    return whole[: chance.randrange(len(whole))]


def _swapped(chance: random.Random, whole: bytes) -> bytes:
    a, b, c = sorted(chance.sample(range(len(whole)), 3))
    return whole[:a] + whole[b:c] + whole[a:b] + whole[c:]


def _filled(chance: random.Random, whole: bytes) -> bytes:
    start = chance.randrange(len(whole))
    end = start + chance.randrange(1, 200)
    return whole[:start] + bytes([chance.choice((0, 255))]) * (end - start) + whole[end:]


def _grown(chance: random.Random, whole: bytes) -> bytes:
    start = chance.randrange(len(whole))
    return whole[:start] + chance.randbytes(chance.choice((1, 100, 10_000))) + whole[start:]


def _of_huge_numbers(chance: random.Random, whole: bytes) -> bytes:
    """Sizes, counts and offsets that promise everything; PNG's chunks get their checksums again."""
    start = chance.randrange(min(len(whole), 200))
    number = chance.choice((2**32 - 1, 2**31 - 1, 2**31, 0, 1, 65_535, 10**9))
    data = whole[:start] + number.to_bytes(4, chance.choice(("big", "little"))) + whole[start + 4 :]
    if whole.startswith(b"\x89PNG") and chance.random() < 0.7:
        data = data[:29] + zlib.crc32(data[12:29]).to_bytes(4, "big") + data[33:]
    return data


def _header(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    stream.write(b"\x89PNG\r\n\x1a\n")
    sides = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    PngImagePlugin.putchunk(stream, b"IHDR", sides + bytes([8, 6, 0, 0, 0]))
    PngImagePlugin.putchunk(stream, b"IDAT", zlib.compress(bytes(1000)))
    return stream.getvalue()


def _with_text(chance: random.Random, kind: str, text: str) -> bytes:
    """A picture with a text wherever some program would look for it."""
    stream, chunks, exif = io.BytesIO(), PngImagePlugin.PngInfo(), Image.Exif()
    if kind == "PNG":
        for key in chance.sample(("zimage", "parameters", "prompt"), chance.choice((1, 3))):
            chunks.add_text(key, text, zip=chance.random() < 0.2)
        Image.new("RGB", (64, 64)).save(stream, kind, pnginfo=chunks)
        return stream.getvalue()
    order = chance.choice(("utf-16-be", "utf-16-le", "utf-16"))
    comment = chance.choice((UNICODE + text.encode(order), b"ASCII\0\0\0" + text.encode(), text.encode()))
    exif[chance.choice((0x010E, 0x010F, 0x0110))] = chance.choice(("", "prompt:")) + text
    exif[0x8769] = {0x9286: comment}
    Image.new("RGB", (64, 64)).save(stream, kind, exif=exif)
    return stream.getvalue()


def _texts(chance: random.Random) -> Iterator[tuple[str, str]]:
    """Settings, graphs and parameters, each with something changed."""
    yield from _changed_records(chance, "our settings", OURS)
    yield from _changed_records(chance, "a graph", GRAPH)
    links = {str(i): {"model": [str(i + 1), 0], "text": [str(i + 1), 0]} for i in range(5000)}
    chain = {key: {"class_type": "X", "inputs": inputs} for key, inputs in links.items()}
    yield "a graph of a long chain", json.dumps({**chain, **GRAPH})
    yield from _changed_parameters(chance)


def _changed_records(chance: random.Random, name: str, record: dict) -> Iterator[tuple[str, str]]:
    whole = json.dumps(record)
    for path in _paths(record):
        for value in chance.sample(ODD, 4):
            changed = json.dumps(_with(record, path, value))
            yield f"{name}, {'.'.join(map(str, path))} = {str(value)[:20]!r}", changed
    yield f"{name}, cut", whole[: chance.randrange(200)]
    yield f"{name}, deep", '{"request":' * 20_000
    yield f"{name}, deep within", whole[:-1] + ', "x": ' + "[" * 500 + "]" * 500 + "}"
    yield f"{name}, twice", whole[:-1] + ', "request": 1, "request": 2}'


def _changed_parameters(chance: random.Random) -> Iterator[tuple[str, str]]:
    for _ in range(60):
        words = chance.sample(PARAMETERS.split(", "), chance.randrange(1, 8))
        item = f"{chance.choice(('Steps', 'Seed', 'Size'))}: {chance.choice(ODD)}"
        yield f"parameters, shuffled, {item[:20]!r}", ", ".join([*words, item])
        flipped = [c if chance.random() > 0.05 else chr(chance.randrange(1, 0x300)) for c in PARAMETERS]
        yield "parameters, flipped", "".join(flipped)
    for sign in ',":\\<\n\0 ':
        yield f"parameters, {sign!r} without end", PARAMETERS + sign * 200_000
        yield f"parameters, {sign!r} before", sign * 200_000 + PARAMETERS
    yield "parameters, names without end", PARAMETERS + ", a b" * 50_000
    yield "parameters, loras without end", "<lora:" * 50_000 + PARAMETERS


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to each value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _paths(inner, (*path, key))


def _with(record: dict, path: tuple, value: Any) -> dict:
    changed = copy.deepcopy(record)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed
