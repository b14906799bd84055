"""LoRA in the settings, on the command line and in a picture's metadata."""

import os
import re
import shutil
from pathlib import Path

import lora_files as files
import pytest
from PIL import Image

import zimage
from zimage.cli import main
from zimage.cli.origin import with_loras
from zimage.errors import CheckpointError, RequestError
from zimage.formats.lora import content_hash
from zimage.loading import loras
from zimage.loading.loras import find_by_hash
from zimage.settings.fields import list_fields
from zimage.settings.loading import LoadSettings, split_lora
from zimage.settings.profiles import Resolved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.write_kinds(tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", None),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:1e-1", "a.safetensors", 0.1),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", None),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", 0.5),
        ("od:d/na:me.safetensors", "od:d/na:me.safetensors", None),
        ("od:d/1:2.safetensors:3", "od:d/1:2.safetensors", 3.0),
        ("a:", "a:", None),
        (":0.5", ":0.5", None),
        ("", "", None),
    ],
)
def test_a_scale_is_what_follows_the_last_colon_if_it_is_a_number(text, path, scale):
    assert split_lora(text) == (path, scale)


@pytest.mark.parametrize("lora", ["a.safetensors", [3], [None], ("a",), ["a:nan"], ["a:inf"], ["a:1000"]])
def test_settings_that_cannot_be_meant_are_refused(lora):
    with pytest.raises(RequestError, match="lora"):
        LoadSettings(lora=lora)


def test_given_when_loading(tiny_folder, folder):
    pipe = zimage.ZImage.load(
        tiny_folder, device="cpu", dtype="fp32", lora=[f"{folder}/style.safetensors:0.8", f"{folder}/all.safetensors"]
    )
    assert [(a.name, a.scale) for a in pipe.lora.list()] == [("style.safetensors", 0.8), ("all.safetensors", 1.0)]
    with pytest.raises(CheckpointError, match="is missing"):
        zimage.ZImage.load(tiny_folder, device="cpu", lora=["absent.safetensors:2"])


def test_fields_that_take_lists_say_whether_one_value_may_stand_alone():
    assert list_fields(LoadSettings) == {"lora": False}
    assert list_fields(zimage.Request) == {"prompt": True, "seed": True, "reference": False, "control": False}


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--steps", "1", "--width", "64", "--height", "48", "--dtype", "fp32", "--device", "cpu"]

    def call(*arguments):
        status = main(["gen", *quick, "--model", str(tiny_folder), *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_command_line_and_metadata(run, folder, tmp_path):
    """Recorded are name, scale and content, no path; rendering the picture again says what is missing."""
    shutil.copy(folder / "style.safetensors", tmp_path / "od:d.safetensors")
    both = ("--lora", "od:d.safetensors:0.8", "--lora", folder / "all.safetensors")
    assert run("a", "--seed", 1, "-o", "one.png", *both)[0] == 0
    assert run("a", "--seed", 1, "-o", "none.png")[0] == 0
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "none.png") as none:
        assert one.tobytes() != none.tobytes()
        text = one.info["zimage"]
    assert re.search(r'"lora": \[\{"name": "od:d.safetensors", "scale": 0.8, "hash": "[0-9a-f]{12}"\}, \{', text)
    assert str(tmp_path) not in text
    assert str(folder) not in text

    status, _, err = run("--from", "one.png", "-o", "two.png", *both)
    assert status == 0
    assert "warning" not in err
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.tobytes() == two.tobytes()
    _, _, err = run("--from", "one.png", "-o", "three.png", *both[2:])
    assert re.search(r"warning: lora was od:d.safetensors 0.8 \w+, all.safetensors 1.0 \w+, now all.saf", err)
    _, _, err = run("--from", "none.png", "-o", "four.png", *both[:2])
    assert "warning: lora was none, now od:d.safetensors 0.8" in err


def made(run, folder, tmp_path) -> bytes:
    """one.png, made with two LoRAs; its pixels."""
    both = ("--lora", f"{folder}/style.safetensors:0.8", "--lora", folder / "all.safetensors")
    assert run("a", "--seed", 1, "-o", "one.png", *both)[0] == 0
    with Image.open(tmp_path / "one.png") as one:
        return one.tobytes()


def same(tmp_path, name: str, pixels: bytes) -> bool:
    with Image.open(tmp_path / name) as image:
        return image.tobytes() == pixels


def test_a_pictures_loras_are_demanded_and_found_by_their_content(run, folder, tmp_path):
    """Under other names, in folders below, beside files that are none; without a warning, since nothing differs."""
    pixels = made(run, folder, tmp_path)
    status, out, err = run("--from", "one.png", "-o", "two.png")
    assert (status, out) == (2, "")
    told = r"error: one.png was made with lora style.safetensors \(hash \w{12}\), all.safetensors \(hash \w{12}\): "
    assert re.match(told + r"pass it with --lora, or name a folder of LoRAs with --lora-folder\n$", err)

    loras = tmp_path / "loras"
    (loras / "below").mkdir(parents=True)
    shutil.copy(folder / "style.safetensors", loras / "below" / "of:5 another name.safetensors")
    shutil.copy(folder / "style.safetensors", loras / "all.safetensors")  # the right name, another content
    (loras / "damaged.safetensors").write_bytes(b"")
    os.mkfifo(loras / "pipe.safetensors")
    (loras / "loop.safetensors").symlink_to("loop.safetensors")
    status, _, err = run("--from", "one.png", "-o", "two.png", "--lora-folder", loras)
    assert status == 2
    assert re.match(r"error: one.png was made with lora all.safetensors \(hash .*; it is not in the folder '", err)

    shutil.copy(folder / "all.safetensors", loras / "below" / "third.safetensors")
    status, _, err = run("--from", "one.png", "-o", "two.png", "--lora-folder", loras)
    assert (status, "warning" in err) == (0, False), err
    assert same(tmp_path, "two.png", pixels)


def test_a_settings_file_names_the_folder_or_the_files(run, folder, tmp_path):
    pixels = made(run, folder, tmp_path)
    (tmp_path / "folder.toml").write_text(f"[default]\nlora_folder = '{folder}'\n", encoding="utf-8")
    names = f"['{folder}/all.safetensors:2', '{folder}/dora.safetensors', '{folder}/style.safetensors']"
    (tmp_path / "files.toml").write_text(f"[default]\nlora = {names}\n", encoding="utf-8")
    (tmp_path / "peft").mkdir()
    shutil.copy(folder / "style.safetensors", tmp_path / "peft" / "adapter_model.safetensors")
    names = f"['{folder}/all.safetensors', '{tmp_path}/peft']"
    (tmp_path / "peft.toml").write_text(f"[default]\nlora = {names}\n", encoding="utf-8")
    for name in ("folder", "files", "peft"):
        status, _, err = run("--from", "one.png", "-o", f"{name}.png", "--config", f"{name}.toml")
        assert (status, "warning" in err) == (0, False), err
        assert same(tmp_path, f"{name}.png", pixels)
    (tmp_path / "folder.toml").write_text("[default]\nlora_folder = 'absent'\n", encoding="utf-8")
    status, _, err = run("--from", "one.png", "-o", "two.png", "--config", "folder.toml")
    assert status == 2
    assert re.search(r"lora_folder '.*absent' is not a folder; name one .*\(from folder.toml \[default\] line 2\)", err)


def test_each_candidate_is_hashed_once_and_those_of_the_right_name_first(folder, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(loras, "content_hash", lambda path: hashed.append(path.name) or content_hash(path))
    for name in ("z", "a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * (10 if name == "a" else 5))
    wanted = {content_hash(tmp_path / f"{name}.safetensors"): f"{name}.safetensors" for name in ("z", "b")}
    found = find_by_hash(wanted, [str(tmp_path / "z.safetensors")], str(tmp_path))
    assert [Path(path).name for path in found.values()] == hashed == ["z.safetensors", "b.safetensors"]
    hashed.clear()
    find_by_hash({"0" * 12: "b.safetensors"}, [str(tmp_path / "z.safetensors")], str(tmp_path))
    assert hashed == ["b.safetensors", "z.safetensors", "a.safetensors"]


@pytest.mark.parametrize("lora", ["x", 3, [3], [{"name": "a"}], [{"name": 1, "hash": "a", "scale": 1}]])
def test_loras_of_a_picture_that_cannot_be_are_told(tmp_path, lora):
    with pytest.raises(RequestError, match=r"one.png: its lora should be a list of names, scales and hashes"):
        with_loras(Path("one.png"), {"lora": lora}, {}, Resolved({}, {}))


def test_a_folder_stands_for_its_file(run, folder, tmp_path):
    (tmp_path / "style").mkdir()
    shutil.copy(folder / "style.safetensors", tmp_path / "style" / "pytorch_lora_weights.safetensors")
    assert run("a", "--seed", 1, "-o", "one.png", "--lora", "style:0.5")[0] == 0
    assert run("a", "--seed", 1, "-o", "two.png", "--lora", f"{folder}/style.safetensors:0.5")[0] == 0
    with Image.open(tmp_path / "two.png") as two:
        assert same(tmp_path, "one.png", two.tobytes())
    shutil.copy(folder / "style.safetensors", tmp_path / "style" / "other.safetensors")
    (tmp_path / "style" / "pytorch_lora_weights.safetensors").rename(tmp_path / "style" / "third.safetensors")
    status, _, err = run("a", "-o", "one.png", "--lora", "style")
    assert (status, err.count("\n")) == (1, 1)
    assert "it holds other.safetensors, third.safetensors: name one of them" in err


def test_the_name_of_an_existing_file_has_no_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_lora("style:2") == ("style", 2.0)
    (tmp_path / "style:2").write_bytes(b"")
    assert split_lora("style:2") == ("style:2", None)
    assert split_lora("style:2:0.5") == ("style:2", 0.5)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert split_lora("~/style:2") == ("~/style:2", None)
    assert split_lora("a\0:2") == ("a\0", 2.0)


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        ("absent.safetensors", 1, "LoRA absent.safetensors is missing"),
        ("absent.ckpt:0.5", 1, "is missing"),
        ("absent.safetensors:nan", 2, "lora scale nan should lie between -100 and 100"),
        ("", 2, "lora: the path is empty"),
        ("x" * 5000, 1, "cannot be read: File name too long"),
        ("x" * 5000 + ":2", 1, "cannot be read: File name too long"),
    ],
)
def test_bad_input_is_one_line_and_a_status(run, tmp_path, value, status, words):
    found, out, err = run("a", "--lora", value, "-o", "one.png")
    assert (found, out) == (status, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
