"""Caption embeddings in files: back to the bit, whole or not at all, and one clear line for each fault."""

import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage.errors import CheckpointError, OutputError, RequestError
from zimage.text.embeddings import caption_hash, load_embeddings, save_embeddings

REQUEST = {"prompt": "a cat – ein “Kätzchen” \ud800\n猫", "layers": [-2], "nested": {"n": 1.5, "none": None}}
WIDTH = 12


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def caption(dtype=torch.float32, length: int = 5):
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_saved_comes_back(path, dtype):
    save_embeddings(path, caption(dtype), REQUEST, "0123abcd")
    loaded = load_embeddings(str(path), WIDTH)
    assert loaded.caption.dtype == dtype
    assert torch.equal(loaded.caption, caption(dtype))
    assert (loaded.request, loaded.encoder) == (REQUEST, "0123abcd")
    assert loaded.hash == caption_hash(caption(dtype))
    assert list(load_file(path)) == ["embeddings"]


def test_views_of_larger_tensors_are_saved_alone(path):
    large = torch.randn(WIDTH, 4000).T
    save_embeddings(path, large[:3], {}, "")
    assert torch.equal(load_embeddings(path, WIDTH).caption, large[:3])
    assert path.stat().st_size < 1000


def test_hashes_tell_values_shapes_and_dtypes_apart():
    x = caption()
    changed = x.clone()
    changed[0, 0] += 1
    assert len({caption_hash(t) for t in (x, changed, x.reshape(10, 6), x.bfloat16(), x[:4])}) == 5
    assert caption_hash(x) == caption_hash(x.T.contiguous().T)


def test_a_file_outlives_its_replacement(path):
    save_embeddings(path, caption(), {}, "")
    loaded = load_embeddings(path, WIDTH)
    save_embeddings(path, caption(length=9), {}, "")
    path.write_bytes(b"")
    assert torch.equal(loaded.caption, caption())


def test_files_of_other_programs_need_no_metadata(path):
    for metadata in (None, {"format": "pt", "request": "no JSON", "prompt": "a cat"}):
        save_file({"embeddings": caption()}, path, metadata)
        loaded = load_embeddings(path, WIDTH)
        assert torch.equal(loaded.caption, caption())
        assert (loaded.request, loaded.encoder) == ({}, "")


# ------------------------------------------------------------------ faults


def refused(path, expected: str, kind=CheckpointError) -> None:
    with pytest.raises(kind, match=re.escape(expected)) as error:
        load_embeddings(path, WIDTH)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


TENSORS = {
    "one tensor 'embeddings'; it holds hidden, mask": {"hidden": caption(), "mask": torch.ones(3)},
    "it holds a0, a1, a2, a3, a4 and 4 more": {f"a{i}": torch.ones(1) for i in range(9)},
    "it holds attention_mask, embeddings": {"embeddings": caption(), "attention_mask": torch.ones(5)},
    "it holds none": {},
    "it holds '\\n\\x1b[31m'": {"\n\x1b[31m": torch.ones(1)},
    "are [1, 5, 12]; they should be [tokens, width]": {"embeddings": caption()[None]},
    "are [12]; they should be": {"embeddings": caption()[0]},
    "are [0, 12]; they should be": {"embeddings": caption()[:0]},
    "are 8 wide; this model takes 12": {"embeddings": caption()[:, :8]},
    "embeddings cannot be I64; use F64, F32, F16, BF16": {"embeddings": torch.ones(5, WIDTH, dtype=torch.int64)},
    "embeddings cannot be F8_E4M3": {"embeddings": caption().to(torch.float8_e4m3fn)},
    "1 of 5 tokens contain NaN or infinity": {"embeddings": caption().index_fill(0, torch.tensor(2), torch.nan)},
    "2 of 5 tokens contain": {"embeddings": caption().index_fill(0, torch.tensor([0, 4]), -torch.inf)},
}


@pytest.mark.parametrize("expected", TENSORS)
def test_tensors_that_are_no_caption(path, expected):
    save_file({name: tensor.contiguous() for name, tensor in TENSORS[expected].items()}, path)
    refused(path, expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"request": "{"}, "is not JSON"),
        ({"request": ""}, "is not JSON"),
        ({"request": "[" * 100_000}, "is JSON nested more than 64 deep"),
        ({"request": "[1]"}, "should hold a JSON object, not list"),
        ({"version": "2"}, "has format version '2'; supported is '1'"),
    ],
)
def test_metadata_that_cannot_be_read(path, changes, expected):
    metadata = {"format": "zimage-embeddings", "version": "1", "request": "{}", "encoder": "e", **changes}
    save_file({"embeddings": caption()}, path, metadata)
    refused(path, expected)


def test_missing_files_and_folders(tmp_path):
    refused(tmp_path / "no.safetensors", "is missing", RequestError)
    refused(tmp_path, "is not a file", RequestError)


def test_pickles_are_never_opened(path):
    torch.save(caption(), path)
    refused(path, "is a pickle")
    path.write_bytes(pickle.dumps({"embeddings": 1}))
    refused(path, "is a pickle")


def test_damaged_files(path):
    save_embeddings(path, caption(), REQUEST, "e")
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[:7], whole[:40], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        refused(path, "is not a whole safetensors file")


def test_flipped_bytes_give_embeddings_or_one_line(path):
    save_embeddings(path, caption(), {"prompt": "a cat"}, "e")
    whole, random = path.read_bytes(), np.random.default_rng(2)
    for _ in range(300):
        data = np.frombuffer(whole, np.uint8).copy()
        data[random.integers(0, len(data) if random.random() < 0.3 else 200)] = random.integers(0, 256)
        path.write_bytes(data.tobytes())
        try:
            outcome = list(load_embeddings(path, WIDTH).caption.shape)
        except CheckpointError as error:
            outcome = str(error)
        assert outcome == [5, WIDTH] or (str(path) in outcome and "\n" not in outcome)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (caption()[None], "are [1, 5, 12]"),
        (caption()[:0], "are [0, 12]"),
        (caption() / 0, "NaN or infinity"),
        (torch.ones(5, WIDTH, dtype=torch.int32), "embeddings cannot be torch.int32"),
    ],
)
def test_no_fault_is_saved(path, tensor, expected):
    with pytest.raises(RequestError, match=re.escape(expected)):
        save_embeddings(path, tensor, {}, "")
    assert not path.exists()


def test_what_cannot_be_written_leaves_nothing(tmp_path, path, monkeypatch):
    with pytest.raises(RequestError, match=r"should end in \.safetensors"):
        save_embeddings(tmp_path / "a.pt", caption(), {}, "")
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        save_embeddings(tmp_path / "no" / "a.safetensors", caption(), {}, "")
    save_embeddings(path, caption(), REQUEST, "e")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        save_embeddings(path, caption(length=9), {}, "")
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert load_embeddings(path, WIDTH).request == json.loads(json.dumps(REQUEST))
