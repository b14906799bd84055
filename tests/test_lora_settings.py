"""LoRA in the settings, on the command line and in a picture's metadata."""

import re
import shutil

import lora_files as files
import pytest
from PIL import Image

import zimage
from zimage.cli import main
from zimage.errors import CheckpointError, RequestError
from zimage.settings.declared import LoadSettings, split_lora
from zimage.settings.fields import list_fields


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.write_kinds(tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:1e-1", "a.safetensors", 0.1),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", 0.5),
        ("od:d/na:me.safetensors", "od:d/na:me.safetensors", 1.0),
        ("od:d/1:2.safetensors:3", "od:d/1:2.safetensors", 3.0),
        ("a:", "a:", 1.0),
        (":0.5", ":0.5", 1.0),
        ("", "", 1.0),
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
    assert list_fields(zimage.Request) == {"prompt": True, "seed": True}


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
    _, _, err = run("--from", "one.png", "-o", "three.png")
    assert re.search(r"warning: lora was od:d.safetensors 0.8 \w+, all.safetensors 1.0 \w+, now none: pixels may", err)
    _, _, err = run("--from", "none.png", "-o", "four.png", *both[:2])
    assert "warning: lora was none, now od:d.safetensors 0.8" in err


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        ("absent.safetensors", 1, "LoRA absent.safetensors is missing"),
        ("absent.ckpt:0.5", 1, "is missing"),
        ("absent.safetensors:nan", 2, "lora scale nan should lie between -100 and 100"),
        ("", 1, "LoRA"),
    ],
)
def test_bad_input_is_one_line_and_a_status(run, tmp_path, value, status, words):
    found, out, err = run("a", "--lora", value, "-o", "one.png")
    assert (found, out) == (status, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
