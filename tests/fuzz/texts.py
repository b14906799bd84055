"""Mutated texts that people write: settings files, templates, prompts, patterns of names."""

import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import zimage
from zimage.cli.target import Target
from zimage.settings.captions import LONGEST_TEXT
from zimage.settings.declared import Request
from zimage.settings.merging import FIELDS
from zimage.settings.profiles import EXAMPLE, read_config, resolve
from zimage.templates import FOLDER
from zimage.text.templates import Templates, read_template

Call = Callable[[], None]
ROUNDS = 1000
PIECES = (
    '"', "'", '"""', "'''", '\\"', "\\", "[", "]", "{", "}", "{{", "=", ".", ",", ":", "#", "-", "- - a", "? ", "&a ",
    "*a", "|", ">", "%", "---", "...", "\n", "\r\n", "\t", "\0", "\x1b[2J", "\u2028", "\ufeff", "\ud800", "é", "猫",
    "inherit", "default", "1e400", "nan", "0x" + "f" * 5000, "9" * 5000, "a" * 20_000, "<|im_end|>", "!!set {a}",
)  # fmt: skip
PATTERNS = (
    "{seed:>1000000000}.png", "{seed:{width}}.png", "{prompt.__class__}.png", "{seed!r:>99999}.png", "{index:03}.png",
    "{prompt[0]}.png", "{0}.png", "{}.png", "{seed:.999999999f}.png", "{steps:08d}.png", "{prompt:.20}.png", "{", "}",
    "{seed:,}.png", "{seed:\0>9}.png", "{width:%}.png", "{seed:=+#0_b}.png", "{prompt:s}.jpg", "x" * 300 + ".png",
)  # fmt: skip


def cases(chance: random.Random, folder: Path) -> Iterator[tuple[str, Call]]:
    """Each mutation's name, and a call that reads what it made: it ends, or raises a ZImageError."""
    shipped = sorted(FOLDER.glob("*-*.md"))
    example = EXAMPLE.read_text(encoding="utf-8")
    for number in range(ROUNDS):
        settings, template = folder / "zimage.toml", folder / f"t{number}.md"
        settings.write_bytes(_mutated(example, chance))
        yield "settings file", lambda path=settings: _settings(path)
        settings.write_bytes(_profiles(chance))
        yield "profiles", lambda path=settings: _settings(path)
        template.write_bytes(_mutated(chance.choice(shipped).read_text(encoding="utf-8"), chance))
        yield "template", lambda path=template: _template(path)
        template.unlink()
        prompt = _prompt(chance)
        yield "prompt", lambda prompt=prompt: _prompted(prompt)
        pattern = _pattern(chance)
        yield "pattern", lambda pattern=pattern: _named(pattern, folder)


def _settings(path: Path) -> None:
    config = read_config(path)
    for profile in [*config.profiles][:3]:
        resolve({}, None, config, profile, {})


def _template(path: Path) -> None:
    templates = Templates.open(path.parent)
    templates.search(["a"])
    read_template(path)


@cache
def _pipe() -> zimage.ZImage:
    return zimage.ZImage.load(device="cpu", dtype="fp32")


def _prompted(prompt: str) -> None:
    _pipe().tokenize(prompt)
    _pipe().prepare(Request(prompt=prompt, seed=1, steps=1))


def _named(pattern: str, folder: Path) -> None:
    target = Target(str(folder / pattern) if _fits_a_path(pattern) else pattern, 1)
    request = Request.from_mapping({"prompt": "a cat", "seed": 2**63 - 1, "steps": 8, "width": 64, "height": 64})
    target._name(request.to_mapping(), 0)


def _fits_a_path(pattern: str) -> bool:
    """Whether it can be part of a path."""
    try:
        pattern.encode(sys.getfilesystemencoding())
    except UnicodeEncodeError:
        return False
    return "\0" not in pattern


def _mutated(text: str, chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 3)):
        at, piece = chance.randrange(len(text) + 1), chance.choice(PIECES) * chance.choice([1, 1, 1, 2, 50, 3000])
        text = text[:at] + piece[:90_000] + text[at + chance.choice([0, 0, 1, 20]) :]
    if chance.random() < 0.1:
        text = text[: chance.randrange(len(text) + 1)]
    return text.encode(chance.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"]), "surrogatepass")


def _profiles(chance: random.Random) -> bytes:
    count, lines = chance.choice([2, 5, 40, 2000]), []
    for i in range(count):
        lines.append(f"[p{i}]")
        parent = chance.choice([f"p{i + 1}", f"p{(i + 1) % count}", f"p{chance.randrange(count)}", "", "default"])
        lines.append(f'inherit = "{parent}"' if chance.random() < 0.9 else f"{chance.choice(list(FIELDS))} = 1")
    return "\n".join(lines).encode()


def _prompt(chance: random.Random) -> str:
    if chance.random() < 0.3:
        piece = chance.choice(PIECES)
        return piece * max(1, chance.choice([1, LONGEST_TEXT, 10**6]) // len(piece))
    ranges = [(0, 0x7F), (0, 0xFFFF), (0, 0x10FFFF), (0x300, 0x36F), (0xD700, 0xE100), (0x1F300, 0x1FAFF)]
    low, high = chance.choice(ranges)
    return "".join(chr(chance.randint(low, high)) for _ in range(chance.choice([1, 10, 1000])))


def _pattern(chance: random.Random) -> str:
    if chance.random() < 0.5:
        return chance.choice(PATTERNS)
    spec = "".join(chance.choice("{}<>^=+-# 0123456789,_.bcdeEfFgGnosxX%!rsa:\0é") for _ in range(chance.randrange(9)))
    name = chance.choice(["seed", "prompt", "index", "", "0", "prompt.upper", "seed[0]", "x"])
    return "{" + name + chance.choice([":", "!", ""]) + spec + "}.png"
