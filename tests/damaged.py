"""Mutations of bytes: headers of safetensors and GGUF files, cut, flipped, renamed or made enormous."""

import json
import random

Chance = random.Random
HUGE = (2**31, 2**40, 2**62, 2**63, 2**64 - 1)


def header_of(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def truncated(content: bytes, chance: Chance) -> bytes:
    return content[: chance.choice([chance.randrange(200), chance.randrange(len(content))])]


def flipped(content: bytes, chance: Chance) -> bytes:
    """One to four bits of the header, its length included."""
    out, end = bytearray(content), 8 + int.from_bytes(content[:8], "little")
    for _ in range(chance.randint(1, 4)):
        out[chance.randrange(min(end, len(out)))] ^= 1 << chance.randrange(8)
    return bytes(out)


def other_dtype(content: bytes, chance: Chance) -> bytes:
    header, data = header_of(content)
    chance.choice(list(header.values()))["dtype"] = chance.choice(["I64", "BOOL", "F8_E5M2", "F16", "Q4", 7, None])
    return with_header(header, data)


def huge(content: bytes, chance: Chance) -> bytes:
    header, data = header_of(content)
    about = chance.choice(list(header.values()))
    kind = chance.randrange(4)
    if kind == 0:
        return chance.choice(HUGE).to_bytes(8, "little") + content[8:]
    if kind == 1:
        about["shape"] = [chance.choice(HUGE)] * chance.randint(1, 4)
    if kind == 2:
        about["data_offsets"][1] = chance.choice(HUGE)
    if kind == 3:
        about["shape"], about["data_offsets"] = [chance.choice(HUGE), 0], [0, 0]
    return with_header(header, data)


def renamed(content: bytes, chance: Chance) -> bytes:
    header, data = header_of(content)
    key = chance.choice(list(header))
    new = chance.choice(["", key[1:], key + ".weight", "layers.999999999.w", "\n" * 3, "a" * 10_000, key.upper()])
    return with_header({(new if k == key else k): v for k, v in header.items()}, data)


HEADERS = (truncated, flipped, other_dtype, huge, renamed)


def gguf_damaged(content: bytes, chance: Chance) -> bytes:
    """Cut, bits of the header flipped, or a count made enormous."""
    kind, out = chance.randrange(3), bytearray(content)
    if kind == 0:
        return content[: chance.randrange(len(content))]
    if kind == 1:
        for _ in range(chance.randint(1, 4)):
            out[chance.randrange(4, 1500)] ^= 1 << chance.randrange(8)
        return bytes(out)
    at = chance.choice([8, 16, chance.randrange(24, 1000)])
    out[at : at + 8] = chance.choice(HUGE).to_bytes(8, "little")
    return bytes(out)
