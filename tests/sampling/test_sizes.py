"""Sizes in the ways that people write them: both sides in one word, or proportions."""

import json

import pytest
from PIL import Image

import zimage
from zimage.cli import main
from zimage.errors import RequestError
from zimage.render.defaults import _sized, usual_side
from zimage.serve.asking import named_as
from zimage.settings.declared import MAX_ASPECT, SIZE_MULTIPLE, split_aspect
from zimage.settings.profiles import read_config, resolve


def sides(pipe, **settings):
    """Width and height that a request comes to."""
    request = pipe.prepare(zimage.Request(prompt="a cat", **settings)).request
    return request.width, request.height


def planned(arguments, capsys):
    """The size in the first line of the plan that `info` makes with these options."""
    assert main(["info", "--plan", *arguments]) == 0
    return capsys.readouterr().out.partition("\n")[0]


def drawn(folder, model, *arguments):
    """The size of what `gen` draws, and the settings that it carries."""
    path = folder / "x.png"
    usual = ["--steps", "1", "--seed", "1", "--device", "cpu", "--dtype", "fp32", "--model", str(model)]
    assert main(["gen", "a cat", *usual, "-o", str(path), *arguments]) == 0
    with Image.open(path) as image:
        return image.size, json.loads(image.info["zimage"])["request"]


@pytest.mark.parametrize("text", ["48x32", "48X32", "48×32", "48*32", " 48 x 32 "])
def test_size_is_width_and_height(tiny_folder, tmp_path, text):
    size, request = drawn(tmp_path, tiny_folder, "--size", text)
    assert size == (48, 32) == (request["width"], request["height"])


@pytest.mark.parametrize("text", ["48", "x32", "48x", "48:32", "48x32x3", "4.8x32", "-48x32", "", "٤x32", "9999999x32"])
def test_a_size_that_cannot_be_read_is_one_line(text, capsys):
    assert main(["gen", "a cat", f"--size={text}"]) == 2
    assert capsys.readouterr().err.startswith("error: size ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "48x32", "--width", "48"], "size: width is set too"),
        (["--height", "32", "--size", "48x32"], "size: height is set too"),
        (["--size", "48x32", "--size", "64x32"], ""),  # of one option the last counts, as everywhere
        (["--size", "48x32", "--aspect", "3:2"], "aspect: width and height are set too"),
        (["--aspect", "3:2", "-W", "48"], "aspect: width is set too"),
        (["--size", "40x32"], "width 40 is not a multiple of 16; nearest 32 or 48"),
    ],
)
def test_what_says_the_size_twice_is_one_line(tiny_folder, tmp_path, arguments, said, capsys):
    status = main(
        ["gen", "a cat", "--steps", "1", "--model", str(tiny_folder), "-o", str(tmp_path / "x.png"), *arguments]
    )
    assert status == (2 if said else 0)
    assert said in capsys.readouterr().err


def test_proportions_keep_the_area_of_the_usual_square(pipe):
    side = usual_side(pipe.model)
    ratios = ["1:1", "3:2", "2:3", "16:9", "9:16", "21:9", "2.39:1", "16:1", "1:16"]
    for text in ratios:
        width, height = sides(pipe, aspect=text)
        assert width % SIZE_MULTIPLE == height % SIZE_MULTIPLE == 0
        exact = side * split_aspect(text) ** 0.5, side / split_aspect(text) ** 0.5
        assert abs(width - exact[0]) <= SIZE_MULTIPLE / 2
        assert abs(height - exact[1]) <= SIZE_MULTIPLE / 2


def test_no_other_sides_are_nearer():
    """At the published size: each side is the multiple of 16 that is nearest to the exact one."""
    exact = {"1:1": (1024, 1024), "3:2": (1254.1, 836.1), "16:9": (1365.3, 768), "2:3": (836.1, 1254.1)}
    for text, (width, height) in exact.items():
        request = _sized(zimage.Request(prompt="x", aspect=text), 1024)
        nearest = [
            min(range(16, 4096, 16), key=lambda side, wanted=wanted: abs(side - wanted)) for wanted in (width, height)
        ]
        assert [request.width, request.height] == nearest


def test_a_picture_carries_the_sides_alone(tiny_folder, tmp_path):
    size, request = drawn(tmp_path, tiny_folder, "--aspect", "3:2")
    assert size == (80, 48) == (request["width"], request["height"])
    assert request["aspect"] is None
    again = tmp_path / "again"
    again.mkdir()
    assert drawn(again, tiny_folder, "--from", str(tmp_path / "x.png"))[0] == size
    assert drawn(again, tiny_folder, "--from", str(tmp_path / "x.png"), "--aspect", "1:1")[0] == (64, 64)


@pytest.mark.parametrize(
    "text", ["3", "3:2:1", "0:1", "1:0", "-3:-2", "nan:1", "inf:inf", "1e400:1", "17:1", "1:17", ":", ""]
)
def test_proportions_that_cannot_be_drawn_are_refused(text):
    with pytest.raises(RequestError, match="aspect") as caught:
        zimage.Request(prompt="x", aspect=text)
    assert caught.value.fields == ("aspect",)
    assert f"{MAX_ASPECT}:1" in str(caught.value)


def test_proportions_of_a_higher_rank_leave_sides_out_and_the_other_way_round(tmp_path):
    file = tmp_path / "zimage.toml"
    file.write_text("[default]\nwidth = 64\nheight = 32\n[wide]\ninherit = ''\naspect = '16:9'\n")
    config = read_config(file)
    resolved = resolve({"prompt": "x", "aspect": "3:2"}, config=config)
    assert resolved.left_out.keys() == {"width", "height"}
    assert "width from zimage.toml [default] line 2 is left out" in resolved.note
    resolved = resolve({"prompt": "x", "width": 64}, config=config, profile="wide")
    assert resolved.left_out.keys() == {"aspect"}


def test_a_file_may_not_hold_both(tmp_path):
    file = tmp_path / "zimage.toml"
    file.write_text("[default]\nwidth = 64\naspect = '3:2'\n")
    with pytest.raises(RequestError, match="line 3: aspect: width is set too"):
        read_config(file)


def test_a_plan_is_made_for_either(tiny_folder, capsys):
    said = {}
    for arguments in (["--size", "512x64"], ["--width", "512", "--height", "64"], ["--aspect", "8:1"]):
        assert main(["info", str(tiny_folder), "--json", *arguments]) == 0
        plan = json.loads(capsys.readouterr().out)["plan"]
        said[arguments[0]] = plan["width"], plan["height"]
    assert said == {"--size": (512, 64), "--width": (512, 64), "--aspect": (176, 16)}


def test_proportions_of_a_render_from_a_picture(pipe):
    start = Image.linear_gradient("L").resize((96, 48)).convert("RGB")
    assert sides(pipe, image=start) == (96, 48)
    assert sides(pipe, image=start, aspect="1:1") == (64, 64)
    assert sides(pipe, aspect="1:1", hires=2.0) == (64, 64)


def test_a_filled_request_stays_as_it_is(pipe):
    job = pipe.prepare(zimage.Request(prompt="a cat", aspect="3:2", seed=1))
    again = pipe.prepare(job.request)
    assert (again.request.width, again.request.height, again.request.aspect) == (80, 48, None)
    assert not job.differs(again)


def test_a_server_s_client_is_told_once():
    """Its own name for the sides stands among the fields; the sentence has one beginning."""
    with pytest.raises(RequestError) as caught, named_as({"width": "size", "height": "size"}, {"size"}):
        zimage.Request(prompt="x", aspect="3:2", width=64, height=64)
    assert caught.value.fields == ("aspect", "size")
    assert str(caught.value).startswith("aspect: width and height are set too")
