"""Damaged and hostile files: one clear line each, no crash, no hang, no memory for what a file only claims to hold."""

import random
import resource
import signal
from pathlib import Path

import loose
import pytest
from damaged import HEADERS, flipped, gguf_damaged, other_dtype
from safetensors.torch import load_file

import zimage
from zimage.dit import ZImageDiT
from zimage.errors import ZImageError

CASES = 100  # of each kind and file
SECONDS = 10


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


@pytest.mark.parametrize("kind", HEADERS)
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
