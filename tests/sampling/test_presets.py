"""Presets: what they say for each kind of checkpoint, what ranks above and below them, those of a settings file."""

import json
from pathlib import Path

import pytest
from PIL import Image

import zimage
from zimage.batch.rows import rows_of
from zimage.batch.sources import Source
from zimage.cli import main
from zimage.errors import ConfigFileError, RequestError
from zimage.settings.merging import laid_over
from zimage.settings.presets import BASE, PRESETS, TURBO
from zimage.settings.profiles import Config, resolve
from zimage.settings.toml_file import TomlFile

KINDS = [(name, kind) for name in PRESETS for kind in PRESETS[name]]
FILE = """
[default]
steps = 20
shift = 2.0
guidance = 1.5

[mine]
preset = "quick"
cfg_normalization = 1.0

[presets.quick]
steps = 3
schedule = "beta"

[presets.serve]
sigmas = "1,0.5,0"
"""


def config(text=FILE):
    return Config(TomlFile(Path("folder/zimage.toml"), text))


def resolved(text=FILE, profile=None, origin=None, **given):
    return resolve(given, origin, config(text), profile, {})


def values(*arguments, **given):
    return {name: entry.value for name, entry in resolved(*arguments, **given).entries.items()}


@pytest.fixture
def of_kind(pipe, monkeypatch):
    def call(kind):
        monkeypatch.setattr(pipe.model, "shift", {TURBO: 3.0, BASE: 6.0}[kind])
        return pipe

    return call


# ------------------------------------------------------------------ what they say


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_preset_fills_in_what_is_open(of_kind, name, kind):
    request = of_kind(kind).prepare(zimage.Request("a cat", preset=name)).request
    plain = of_kind(kind).prepare(zimage.Request("a cat")).request
    expected = {n: getattr(plain, n) for n in ("steps", "guidance", "shift", "sampler", "schedule")}
    assert {n: getattr(request, n) for n in expected} == {**expected, **PRESETS[name][kind]}
    assert request.preset == name


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_what_the_request_says_ranks_above(of_kind, name, kind):
    own = {"steps": 5, "guidance": 0.5, "shift": 1.5, "sampler": "heun", "schedule": "karras"}
    request = of_kind(kind).prepare(zimage.Request("a cat", preset=name, **own)).request
    assert {n: getattr(request, n) for n in own} == own
    job = of_kind(kind).prepare(zimage.Request("a cat", preset=name, sigmas="1,0.5,0"))
    assert job.sigmas == (1.0, 0.5, 0.0)
    assert job.request.sampler == PRESETS[name][kind].get("sampler", "euler")


def test_a_preset_for_turbo_alone_is_refused_on_base(of_kind):
    with pytest.raises(RequestError, match="turbo-4 is for Turbo checkpoints, and this one is Base") as caught:
        of_kind(BASE).prepare(zimage.Request("a cat", preset="turbo-4"))
    assert caught.value.fields == ("preset",)
    drawn = of_kind(TURBO).prepare(zimage.Request("a cat", preset="turbo-4")).request
    assert of_kind(BASE).prepare(drawn).request.steps == 4  # a picture's settings hold what it said


def test_an_unknown_preset_is_one_line():
    with pytest.raises(RequestError, match="there is no preset 'confyui'; did you mean 'comfyui'") as caught:
        zimage.Request("a cat", preset="confyui")
    assert caught.value.fields == ("preset",)
    with pytest.raises(RequestError, match="there is no preset 'quik'; did you mean 'quick'"):
        values(preset="quik")


def test_metadata_hold_all_values_and_give_the_picture_again(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_folder), "--device", "cpu", "--dtype", "fp32", "--width", "64", "--height", "48"]
    assert main(["gen", "a cat", "--preset", "forge", "--steps", "2", "--seed", "1", "-o", "one.png", *model]) == 0
    with Image.open("one.png") as picture:
        request = json.loads(picture.info["zimage"])["request"]
        pixels = picture.tobytes()
    expected = {"preset": "forge", "steps": 2, "schedule": "beta_shifted", "shift": 9.0}
    assert expected.items() <= request.items()
    assert main(["gen", "--from", "one.png", "-o", "two.png", *model]) == 0
    with Image.open("two.png") as picture:
        assert picture.tobytes() == pixels


def test_the_plan_of_info_counts_with_it(tiny_folder, capsys):
    command = ["info", str(tiny_folder), "--plan", "--json", "--device", "cpu", "--width", "64", "--height", "48"]
    counts = []
    for more in ([], ["--preset", "turbo-4"], ["--preset", "forge", "--sampler", "heun"]):
        assert main([*command, *more]) == 0
        counts.append(json.loads(capsys.readouterr().out)["plan"]["evaluations"])
    assert counts == [8, 4, 17]


# ------------------------------------------------------------------ where they rank


def test_a_preset_beats_what_a_lower_source_says_of_the_same():
    found = resolved(preset="forge")
    assert {n: e.value for n, e in found.entries.items()} == {"preset": "forge"}
    assert list(found.left_out) == ["guidance", "shift", "steps"]
    assert "steps from zimage.toml [default] line 3 is left out" in found.note
    assert values(preset="turbo-4") == {"preset": "turbo-4", "shift": 2.0, "guidance": 1.5}


def test_what_stands_beside_a_preset_or_above_beats_it():
    assert values(preset="forge", steps=6) == {"preset": "forge", "steps": 6}
    above = '[default]\npreset = "forge"\nsteps = 4\n\n[more]\nshift = 1.0'
    assert values(above, "more", guidance=2.0) == {"preset": "forge", "steps": 4, "shift": 1.0, "guidance": 2.0}


def test_a_preset_beats_exact_levels_below_it_and_gives_way_to_those_above():
    text = '[default]\nsigmas = "1,0.5,0"'
    assert values(text, preset="turbo-4") == {"preset": "turbo-4"}
    assert values('[default]\npreset = "turbo-4"', sigmas="1,0.5,0") == {"preset": "turbo-4", "sigmas": "1,0.5,0"}


def test_a_preset_beats_the_settings_of_a_picture():
    origin = {"preset": "diffusers", "steps": 8, "shift": 3.0, "schedule": "simple", "negative": "x", "guidance": 2.0}
    rest = {name: value for name, value in origin.items() if name != "steps"}
    assert values(origin=origin, preset="turbo-4") == {**rest, "preset": "turbo-4"}
    assert values(origin=origin, steps=4) == {**origin, "steps": 4}


# ------------------------------------------------------------------ those of a settings file


def test_a_preset_of_the_file_stands_for_its_settings():
    found = resolved(preset="quick")
    usual = {"guidance": 1.5, "shift": 2.0}
    assert {n: e.value for n, e in found.entries.items()} == {**usual, "steps": 3, "schedule": "beta"}
    assert list(found.left_out) == ["steps"]
    assert found.source("steps") == "zimage.toml [presets.quick] line 12"
    assert values(profile="mine") == {**usual, "steps": 3, "schedule": "beta", "cfg_normalization": 1.0}
    assert values(preset="quick", steps=7)["steps"] == 7


def test_one_that_says_nothing_decides_nothing():
    assert values("[default]\nsteps = 4\n[presets.empty]", preset="empty") == {"steps": 4}
    assert laid_over({"steps": 4}, {"preset": "empty"}, {"empty": {}}) == {"steps": 4}


def test_its_levels_and_what_makes_levels_give_way_to_one_another():
    assert values(preset="serve") == {"guidance": 1.5, "sigmas": "1,0.5,0"}
    found = resolved(preset="quick", sigmas="1,0")
    assert {n: e.value for n, e in found.entries.items()} == {"guidance": 1.5, "sigmas": "1,0"}
    found = resolved(preset="serve", steps=7)
    assert {n: e.value for n, e in found.entries.items()} == {"guidance": 1.5, "shift": 2.0, "steps": 7}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[presets]\nquick = 3", "line 2: presets: quick should be a table, [presets.NAME]"),
        ("presets = 3", "line 1: presets: it should be a table, [presets.NAME]"),
        ("[presets.forge]\nsteps = 3", "line 1: presets: forge is a preset of zimage's own; choose another name"),
        ("[presets.a]\nstep = 3", "line 2: presets: 'step' is not a setting of sampling; did you mean 'steps'?"),
        ("[presets.a]\nseed = 3", "line 2: presets: 'seed' is not a setting of sampling"),
        ("[presets.a]\nprompt = 'x'", "line 2: presets: 'prompt' is not a setting of sampling"),
        ("[presets.a]\npreset = 'forge'", "line 2: presets: 'preset' is not a setting of sampling"),
        ("[presets.a]\nsteps = 0", "line 2: steps 0 is too small"),
        ("[presets.a]\nshift = 2.0\nsigmas = '1,0'", "line 3: sigmas: they are the noise levels themselves"),
        ("[default]\npreset = 'b'\n[presets.a]\nsteps = 2", "line 2: there is no preset 'b'"),
        ("[a]\ninherit = 'presets'\n[presets.b]\nsteps = 2", "line 2: inherit: there is no profile 'presets'"),
    ],
)
def test_a_fault_in_a_files_presets_names_its_line(text, told):
    with pytest.raises(ConfigFileError) as caught:
        config(text)
    assert told in str(caught.value)


def test_config_shows_what_a_preset_stands_for(tmp_path, monkeypatch, capsys):
    (tmp_path / "zimage.toml").write_text(FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZIMAGE_CONFIG", raising=False)
    assert main(["config", "show", "--json", "--preset", "quick"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["schedule"] == {"value": "beta", "source": "zimage.toml [presets.quick] line 13"}
    assert shown["left_out"]["steps"]["reason"] == "preset quick decides it"
    assert main(["config", "profiles"]) == 0
    assert "presets" not in capsys.readouterr().out


# ------------------------------------------------------------------ requests over defaults: servers, rows


def test_a_request_names_a_preset_over_a_servers_defaults():
    defaults, presets = {"steps": 20, "guidance": 1.0}, config().presets
    assert laid_over(defaults, {"preset": "turbo-4"}) == {"guidance": 1.0, "preset": "turbo-4"}
    assert laid_over(defaults, {"preset": "quick"}, presets) == {"guidance": 1.0, "steps": 3, "schedule": "beta"}
    assert laid_over({"preset": "forge"}, {"steps": 3}) == {"preset": "forge", "steps": 3}
    with pytest.raises(RequestError, match="there is no preset 'quick'"):
        laid_over(defaults, {"preset": "quick"})


def test_rows_name_presets(tmp_path):
    sources = [Source("line 1", {"prompt": "a", "preset": "quick"}), Source("line 2", {"prompt": "a", "steps": 2})]
    one, two = rows_of(sources, {"steps": 20}, tmp_path, config().presets)
    assert (one.request["steps"], one.request["schedule"]) == (3, "beta")
    assert two.request["steps"] == 2
