"""Damaged and hostile files: one clear line each, no crash, no hang, no memory for what a file only claims to hold."""

import json
import random
import resource
import signal
from pathlib import Path

import loose
import pytest
from safetensors.torch import load_file

import zimage
from zimage.dit import ZImageDiT
from zimage.errors import ZImageError

CASES = 100  # of each kind and file
SECONDS = 10
HUGE = (2**31, 2**40, 2**62, 2**63, 2**64 - 1)


def header_of(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def truncated(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.choice([chance.randrange(200), chance.randrange(len(content))])]


def flipped(content: bytes, chance: random.Random) -> bytes:
    """One to four bits of the header, its length included."""
    out, end = bytearray(content), 8 + int.from_bytes(content[:8], "little")
    for _ in range(chance.randint(1, 4)):
        out[chance.randrange(min(end, len(out)))] ^= 1 << chance.randrange(8)
    return bytes(out)


def other_dtype(content: bytes, chance: random.Random) -> bytes:
    header, data = header_of(content)
    chance.choice(list(header.values()))["dtype"] = chance.choice(["I64", "BOOL", "F8_E5M2", "F16", "Q4", 7, None])
    return with_header(header, data)


def huge(content: bytes, chance: random.Random) -> bytes:
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


def renamed(content: bytes, chance: random.Random) -> bytes:
    header, data = header_of(content)
    key = chance.choice(list(header))
    new = chance.choice(["", key[1:], key + ".weight", "layers.999999999.w", "\n" * 3, "a" * 10_000, key.upper()])
    return with_header({(new if k == key else k): v for k, v in header.items()}, data)


KINDS = [truncated, flipped, other_dtype, huge, renamed]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A plain and a quantised DiT, small enough that a hundred of them load in a second."""
    folder = tmp_path_factory.mktemp("damage")
    config = {**loose.DIT, "dim": 128, "n_heads": 1, "n_kv_heads": 1, "n_layers": 1}
    state = {key: value.bfloat16() for key, value in ZImageDiT.from_config(config).state_dict().items()}
    fp8, _ = loose.quantised(loose.renamed("dit", "native", state), loose.old_comfy_fp8)
    return [loose.save(state, folder / "plain.safetensors"), loose.save(fp8, folder / "fp8.safetensors")]


@pytest.fixture
def bounded():
    """No case may take long, and all together no memory to speak of."""

    def late(*_):
        raise AssertionError(f"it took more than {SECONDS} s")

    before, handler = peak_bytes(), signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert peak_bytes() - before < 500e6


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def complaint(file: Path) -> str | None:
    """What opening and loading the file says, or None where it loads."""
    signal.alarm(SECONDS)
    try:
        zimage.load_component(file, "dit", dtype="fp32")
    except ZImageError as error:
        return str(error)
    finally:
        signal.alarm(0)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors(files, tmp_path, bounded, kind):
    chance = random.Random(kind.__name__)
    for source in files:
        content, said = source.read_bytes(), []
        damaged = tmp_path / "damaged.safetensors"
        for _ in range(CASES):
            damaged.write_bytes(kind(content, chance))
            said.append(complaint(damaged))
            assert said[-1] is None or 20 < len(said[-1].splitlines()[0]) == len(said[-1]) < 2000, said[-1][:300]
        loaded = said.count(None)
        assert loaded <= (CASES // 10 if kind is flipped else CASES // 4 if kind is other_dtype else 0), kind.__name__


def gguf_damaged(content: bytes, chance: random.Random) -> bytes:
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


def test_gguf(files, tmp_path, bounded):
    chance, file = random.Random(0), tmp_path / "dit.gguf"
    native = loose.renamed("dit", "native", load_file(files[0]))
    loose.write_gguf(
        file, "lumina2", native, "Q8_0", lambda key: loose.is_matrix(key) and native[key].shape[1] % 32 == 0
    )
    assert complaint(file) is None
    content, said = file.read_bytes(), []
    for _ in range(2 * CASES):
        file.write_bytes(gguf_damaged(content, chance))
        said.append(complaint(file))
        assert said[-1] is None or 20 < len(said[-1].splitlines()[0]) == len(said[-1]) < 2000, said[-1][:300]
    assert said.count(None) <= CASES // 4  # flipped bits of what nobody reads
