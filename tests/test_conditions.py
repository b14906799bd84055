"""Pictures as conditions: every form in which they may be passed, and what is said of those that cannot be read."""

import json

import pytest
from PIL import Image

from zimage.errors import RequestError
from zimage.pictures.image import InputPicture, open_image
from zimage.render import attached
from zimage.settings.conditions import MOST_CONDITIONS, Control, Reference
from zimage.settings.declared import Request

RED = Image.new("RGB", (8, 8), "red")


@pytest.mark.parametrize(
    ("given", "picture", "alpha"),
    [
        ("a.png", "a.png", 0.3),
        ("a.png:0.5", "a.png", 0.5),
        ("a.png:1", "a.png", 1.0),
        ("C:\\a.png:0", "C:\\a.png", 0.0),
        ("odd:name.png", "odd:name.png", 0.3),
        (("a.png", 0.5), "a.png", 0.5),
        (("a.png",), "a.png", 0.3),
        ({"picture": "a.png", "alpha": 0.5}, "a.png", 0.5),
        ({"picture": "a.png", "picture_name": "a.png", "picture_hash": "0"}, "a.png", 0.3),
        (RED, RED, 0.3),
        (Reference("a.png", 0.1), "a.png", 0.1),
    ],
)
def test_forms_of_a_reference(given, picture, alpha):
    assert Reference.parse(given) == Reference(picture, alpha)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("union.safetensors:pose.png", Control("union.safetensors", "pose.png")),
        ("union.safetensors:pose.png:0.9", Control("union.safetensors", "pose.png", 0.9)),
        ("C:\\union.safetensors:D:\\pose.png:1", Control("C:\\union.safetensors", "D:\\pose.png", 1.0)),
        (("union.safetensors", RED, 0.5), Control("union.safetensors", RED, 0.5)),
        ({"model": "union", "picture": "pose.png"}, Control("union", "pose.png")),
    ],
)
def test_forms_of_a_control(given, expected):
    assert Control.parse(given) == expected


def test_a_name_with_colons_is_that_of_the_file_that_exists(tmp_path):
    (tmp_path / "a:b").write_text("")
    (tmp_path / "pose:1").write_text("")
    assert Reference.parse(f"{tmp_path}/pose:1") == Reference(f"{tmp_path}/pose:1")
    assert Control.parse(f"{tmp_path}/a:b:{tmp_path}/pose") == Control(f"{tmp_path}/a:b", f"{tmp_path}/pose")


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"reference": "a.png"}, "reference", "should be a list of PICTURE"),
        ({"reference": []}, "reference", "0 were passed"),
        ({"reference": ["a.png"] * (MOST_CONDITIONS + 1)}, "reference", "17 were passed; pass 1 to 16"),
        ({"reference": ["a.png:1.5"]}, "reference", "alpha 1.5 should be a number from 0 to 1"),
        ({"reference": ["a.png:nan"]}, "reference", "alpha nan should be"),
        ({"reference": [""]}, "reference", "write PICTURE"),
        ({"reference": [3]}, "reference", "should be the path of a file"),
        ({"reference": [{"alpha": 0.3}]}, "reference", "picture is needed"),
        ({"reference": [{"picture": "a.png", "scale": 1}]}, "reference", "there is no 'scale'; known: picture, alpha"),
        ({"reference": [("a.png", "0.3")]}, "reference", "should be a number"),
        ({"control": ["union.safetensors"]}, "control", "write FILE:PICTURE"),
        ({"control": ["union:pose.png:11"]}, "control", "scale 11.0 should be a number from 0 to 10"),
        ({"control": ["union:"]}, "control", "write FILE:PICTURE"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_field(values, field, words):
    with pytest.raises(RequestError, match=words) as caught:
        Request(**values)
    assert caught.value.fields == (field,)


def test_they_are_described_without_their_folder():
    values = Request(reference=["/secret/a.png:0.5"], control=["/secret/union:/secret/pose.png"]).to_mapping()
    assert values["reference"] == [{"name": "a.png", "alpha": 0.5}]
    assert values["control"] == [{"name": "pose.png", "model_name": "union", "scale": 0.75}]


def test_an_opened_reference_survives_as_plain_values(tmp_path):
    RED.save(tmp_path / "a.png")
    opened = Reference(InputPicture.of(tmp_path / "a.png", open_image), 0.5)
    plain = json.loads(json.dumps(attached.pointed(Request(reference=[opened]))))
    assert not attached.fault(plain)
    assert attached.reopened(plain, {}) == {"reference": [opened]}
    (tmp_path / "a.png").unlink()
    assert attached.reopened(plain, {opened.picture.hash: RED})["reference"][0].picture.hash == opened.picture.hash
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="not the file that the job was prepared with"):
        attached.reopened(plain, {})


@pytest.mark.parametrize(
    "value", ["a.png", [3], [{}], [{"picture": "a", "picture_name": "a", "picture_hash": 3, "alpha": 0.3}]]
)
def test_plain_values_that_are_not_references(value):
    assert attached.fault({"reference": value}).startswith("job.request.reference")
