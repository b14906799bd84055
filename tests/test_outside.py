"""What comes from outside enters in few places: files, JSON and texts for the terminal, each within limits."""

import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from zimage.errors import CheckpointError, RequestError, one_line, printable
from zimage.formats.files import read_file, require_file
from zimage.formats.json_text import json_object, json_value, read_json
from zimage.formats.stored import TensorFile

JSON = {
    "nested": ("[" * 10_000 + "]" * 10_000, "nested more than 64 deep"),
    "nested a little too deep": ("[" * 65 + "1" + "]" * 65, "nested more than 64 deep"),
    "nested objects": ('{"a":' * 5000 + "1" + "}" * 5000, "nested more than 64 deep"),
    "a number of 5,000 digits": ("9" * 5000, "thousands of digits"),
    "a number of 400 digits": ("[1, " + "9" * 400 + "]", "more than 64 bits"),
    "a negative one": ('{"a": -' + "9" * 30 + "}", "more than 64 bits"),
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "a key appears twice in one object: 'c'"),
    "nothing": ("", "is not JSON"),
    "half": ('{"a": ', "is not JSON"),
    "another encoding": (b"\xff\xfe\x00", "is not JSON"),
}


@pytest.mark.parametrize("kind", JSON)
def test_json_within_limits(kind):
    text, words = JSON[kind]
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        json_value("x.json", text)
    assert str(error.value).startswith("x.json ")
    assert len(str(error.value)) < 200


def test_json_that_is_sound():
    deep = json.loads("[" * 63 + "1" + "]" * 63)
    value = {"a": [1, -1.5, None, True, "é"], "big": (1 << 64) - 1, "deep": deep, "empty": {}}
    assert json_object("x", json.dumps(value)) == value
    with pytest.raises(CheckpointError, match="should hold a JSON object, not list"):
        json_object("x", "[1]")


def test_a_sparse_file_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    os.truncate(path, 400 << 20)
    with pytest.raises(CheckpointError, match=f"{path} has 419,430,400 bytes; such a file has at most 16,777,216"):
        read_json(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is a named pipe; it should be a regular file"),
        (os.mkdir, "is a folder"),
        (lambda path: os.symlink("/dev/zero", path), "is a device"),
        (lambda path: os.symlink(path, path), "cannot be read"),
        (lambda path: None, "is missing"),
    ],
)
def test_only_regular_files_are_read(tmp_path, make, words):
    path = tmp_path / "x"
    make(path)
    for read in (require_file, lambda p: read_file(p, 10), read_json, TensorFile):
        with pytest.raises(CheckpointError, match=words):
            read(path)


def test_a_tensor_file_outlives_its_name(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(6.0).view(2, 3)}, path)
    with TensorFile(path) as file:
        save_file({"x": torch.zeros(9)}, tmp_path / "b.safetensors")
        os.replace(tmp_path / "b.safetensors", path)
        assert file.read("x").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_tensor_file_that_is_cut_short_meanwhile(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(1e5)}, path)
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match="was cut short"):
            file.read("x")


def test_text_for_a_terminal():
    assert printable("a cat, 猫, 👨‍👩‍👧") == "a cat, 猫, 👨‍👩‍👧"
    assert printable("\x1b]0;owned\x07\u202ex\ud800") == "\\x1b]0;owned\\x07\\u202ex\\ud800"
    assert printable("a\nb\u3000c") == "a b c"
    assert one_line("a\n  b\x00") == "a b\\x00"
    assert one_line("two  spaces of a name") == "two  spaces of a name"
    assert str(RequestError("a\x1b[2Jb\nc")) == "a\\x1b[2Jb c"


def test_an_error_is_bounded_and_keeps_both_ends():
    said = str(RequestError("prompt " + "x" * 100_000 + " is too long; cut it"))
    assert len(said) <= 2000
    assert said.startswith("prompt xxx")
    assert said.endswith("is too long; cut it")


def test_a_tensor_file_that_changes_while_it_is_opened_is_one_of_its_versions(tmp_path):
    """Replaced, removed, emptied and cut by others, eight readers: a version as it was, or a CheckpointError."""
    path, values, end = tmp_path / "x.safetensors", {}, time.monotonic() + 0.7
    for i in range(4):
        save_file({"x": torch.full((3 + 700 * i,), float(i))}, tmp_path / f"{i}")
        values[3 + 700 * i] = float(i)

    def change(seed):
        pick = random.Random(seed)
        while time.monotonic() < end:
            mine, kind = tmp_path / f"mine-{seed}", pick.randrange(8)
            content = (tmp_path / f"{pick.randrange(4)}").read_bytes()
            mine.write_bytes(content[: pick.randrange(len(content))] if kind == 1 else b"" if kind == 2 else content)
            os.replace(mine, path)
            if kind == 0:
                path.unlink(missing_ok=True)

    def read(_):
        found = {"read": 0, "missed": 0}
        while time.monotonic() < end:
            try:
                with TensorFile(path) as file:
                    tensor = file.read("x")
            except CheckpointError:
                found["missed"] += 1
                continue
            assert tensor.unique().tolist() == [values[len(tensor)]]
            found["read"] += 1
        return found

    with ThreadPoolExecutor(10) as pool:
        changes = [pool.submit(change, seed) for seed in range(2)]
        counts = list(pool.map(read, range(8)))
        assert all(change.result() is None for change in changes)
    assert sum(count["read"] for count in counts) > 0
    assert sum(count["missed"] for count in counts) > 0
