"""AVIF: saved with its settings where Pillow has it, refused in one line where it has not."""

import io

import numpy
import pytest
from PIL import Image, features

from zimage.cli import main
from zimage.errors import RequestError
from zimage.pictures import files
from zimage.pictures.files import encoded, file_format, read_metadata
from zimage.serve.forms.openai_request import translated

pytestmark = pytest.mark.skipif(
    "avif" not in features.modules or not features.check("avif"), reason="this Pillow has no AVIF"
)


@pytest.fixture
def lacking(monkeypatch):
    """A Pillow of before 11.3."""
    monkeypatch.delitem(features.modules, "avif")


def drawn(model, *arguments):
    usual = ["--steps", "1", "--size", "48x32", "--model", str(model), "--device", "cpu", "--dtype", "fp32"]
    return main(["gen", *arguments, *usual])


def test_settings_come_back(tiny_folder, tmp_path):
    for name in ("x.avif", "x.png"):
        assert drawn(tiny_folder, "ein Kätzchen 猫", "--seed", "3", "-o", str(tmp_path / name)) == 0
    assert read_metadata(tmp_path / "x.avif") == read_metadata(tmp_path / "x.png")
    usual = ["--model", str(tiny_folder), "--device", "cpu", "--dtype", "fp32"]
    assert main(["gen", "--from", str(tmp_path / "x.avif"), "-o", str(tmp_path / "y.png"), *usual]) == 0
    assert (tmp_path / "y.png").read_bytes() == (tmp_path / "x.png").read_bytes()


def test_the_picture_is_nearly_the_same():
    """Fine colours of a random picture too, which halved colours would lose."""
    chance = numpy.random.default_rng(1)
    sharp = Image.fromarray(chance.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)).resize(
        (64, 64), Image.Resampling.NEAREST
    )
    with Image.open(io.BytesIO(encoded(sharp, "AVIF", None))) as image:
        assert image.format == "AVIF"
        difference = numpy.asarray(image.convert("RGB"), float) - numpy.asarray(sharp, float)
    assert (difference**2).mean() ** 0.5 < 6  # of 256 levels; 22 with halved colours


def test_where_pillow_lacks_it_a_name_is_refused_before_anything_is_loaded(lacking, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["gen", "a", "--model", "nowhere", "-o", "x.avif"]) == 2
    err = capsys.readouterr().err
    assert "output 'x.avif': the installed Pillow cannot write AVIF" in err
    assert err.count("\n") == 1
    with pytest.raises(RequestError, match="cannot write AVIF"):
        file_format(tmp_path / "x.AVIF")
    with pytest.raises(RequestError, match="cannot write AVIF"):
        encoded(Image.new("RGB", (16, 16)), "AVIF", None)
    assert files.FORMATS.keys() >= {".png", ".avif"}


def test_a_server_is_asked_for_it(monkeypatch):
    wanted = {"prompt": "a", "output_format": "avif"}
    assert translated(wanted, 8)[0].output_format == "avif"
    monkeypatch.delitem(features.modules, "avif")
    with pytest.raises(RequestError, match="output_format: the installed Pillow cannot write AVIF") as caught:
        translated(wanted, 8)
    assert caught.value.fields == ("output_format",)
