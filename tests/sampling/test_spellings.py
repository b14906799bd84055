"""Flags under the names that people bring from other programs."""

import json
from pathlib import Path

import click
import pytest

from zimage.cli import cli, main
from zimage.cli.spellings import RENAMED, SPELLINGS
from zimage.settings.profiles import FIELDS

ROOT = Path(__file__).parents[2]
COMMANDS = ("gen", "batch", "sweep", "info")
VALUES = {  # of each setting one, as text, and what it becomes
    "steps": ("3", 3),
    "guidance": ("2.5", 2.5),
    "negative": ("dogs", "dogs"),
    "images": ("2", 2),
    "width": ("48", 48),
    "height": ("32", 32),
    "seed": ("7", 7),
    "strength": ("0.5", 0.5),
    "shift": ("5", 5.0),
    "image": ("x.png", "x.png"),
    "mask": ("y.png", "y.png"),
    "hires": ("2", 2.0),
    "model": ("m", "m"),
    "dit": ("d", "d"),
    "text_encoder": ("t", "t"),
}


def parsed(command, *arguments):
    """The values of the options that a command was given, by their settings."""
    needed = {"gen": ["a cat"], "sweep": ["a cat", "-o", "out"], "batch": ["rows.csv", "-o", "out"], "info": []}
    context = cli.commands[command].make_context(command, [*needed[command], *arguments], parent=click.Context(cli))
    options = {name: value for name, value in context.params.items() if name in FIELDS and name != "prompt"}
    return {name: value for name, value in options.items() if value not in (None, ())}


def offered(command):
    return {flag: option for option in cli.commands[command].params for flag in option.opts}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_name_sets_its_setting_wherever_the_setting_is(command):
    assert VALUES.keys() == RENAMED.keys()
    for name, flags in RENAMED.items():
        own = "--" + name.replace("_", "-")
        assert set(flags) & offered(command).keys() == (set(flags) if own in offered(command) else set())
        for flag in flags if own in offered(command) else ():
            text, value = VALUES[name]
            assert parsed(command, flag, text) == {name: (value,) if name == "seed" else value}


@pytest.mark.parametrize("command", COMMANDS)
def test_names_from_elsewhere_are_not_in_the_help(command, capsys):
    assert main([command, "--help"]) == 0
    words = set(capsys.readouterr().out.replace(",", " ").split())
    hidden = {flag for flags in RENAMED.values() for flag in flags} | {"--prompt", "-p"}
    hidden |= {flag for one in SPELLINGS if not one.help for flag in one.flags}
    assert not words & hidden
    assert {flag for one in SPELLINGS if one.help for flag in one.flags} & words


def test_no_name_means_two_things():
    flags = [flag for names in RENAMED.values() for flag in names]
    flags += [flag for one in SPELLINGS for flag in one.flags]
    assert len(set(flags)) == len(flags)
    assert not set(flags) & {"--" + name.replace("_", "-") for name in FIELDS}
    for command in COMMANDS:
        every = [flag for option in cli.commands[command].params for flag in option.opts]
        assert len(set(every)) == len(every)


def test_names_from_elsewhere_may_have_underscores():
    given = ["--num_inference_steps", "3", "--guidance_scale=2", "--negative_prompt", "dogs"]
    assert parsed("gen", *given) == {"steps": 3, "guidance": 2.0, "negative": "dogs"}
    assert parsed("gen", "--long-prompt", "attention_pool") == {"long_prompt": "attention_pool"}


def test_short_ones_may_be_joined_to_their_values():
    assert parsed("gen", "-W48", "-H32", "-b2") == {"width": 48, "height": 32, "images": 2}


def test_of_one_setting_the_last_value_counts_under_any_name():
    assert parsed("gen", "--steps", "3", "--num-inference-steps", "4") == {"steps": 4}
    assert parsed("gen", "--num-inference-steps", "4", "--steps", "3") == {"steps": 3}


def test_seeds_may_be_repeated_under_both_names():
    assert parsed("gen", "--seed", "1", "-s", "2")["seed"] == (1, 2)


@pytest.mark.parametrize("flag", ["--steps", "--num-inference-steps"])
def test_a_wrong_value_is_told_in_one_line(flag, capsys):
    assert main(["gen", "a", flag, "many"]) == 2
    err = capsys.readouterr().err
    assert "'many' is not a valid integer" in err
    assert err.count("\n") == 1


def test_a_picture_is_that_of_our_own_names(tiny_folder, tmp_path):
    usual = ["--model", str(tiny_folder), "--device", "cpu", "--dtype", "fp32", "--shift", "3"]
    ours = [
        "a cat",
        "--steps",
        "2",
        "--guidance",
        "2",
        "--negative",
        "dogs",
        "--size",
        "48x32",
        "--seed",
        "3",
        "-n",
        "2",
    ]
    theirs = ["--prompt", "a cat", "--num-inference-steps", "2", "--guidance-scale", "2", "--negative-prompt", "dogs"]
    theirs += ["-W", "48", "-H", "32", "-s", "3", "--num-images-per-prompt", "2"]
    for folder, arguments in (("ours", ours), ("theirs", theirs)):
        (tmp_path / folder).mkdir()
        assert main(["gen", *arguments, *usual, "-o", str(tmp_path / folder)]) == 0
    names = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "theirs").iterdir()) != []
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_prompts_may_be_an_option(tiny_folder, tmp_path, capsys):
    usual = [
        "--steps",
        "1",
        "--size",
        "32x32",
        "--seed",
        "1",
        "--model",
        str(tiny_folder),
        "-o",
        str(tmp_path),
        "--json",
    ]
    for given, prompts in (
        (["--prompt", "a"], ["a"]),
        (["-p", "a red cat"], ["a red cat"]),
        (["-p", "a", "--prompt=b"], ["a", "b"]),
    ):
        assert main(["gen", *given, *usual]) == 0
        assert [one["request"]["prompt"] for one in json.loads(capsys.readouterr().out)["images"]] == prompts
    assert main(["gen", "a", "-p", "b", *usual]) == 2
    assert "pass prompts as arguments or with --file" in capsys.readouterr().err
    assert main(["sweep", "-p", "a", "-o", str(tmp_path / "s"), "--vary", "steps=1,2", "--dry-run"]) == 0
    assert capsys.readouterr().out.count(" a\n") == 2


def test_the_page_of_commands_names_every_flag():
    page = (ROOT / "zimage/cli/README.md").read_text(encoding="utf-8")
    flags = [flag for names in RENAMED.values() for flag in names] + [flag for one in SPELLINGS for flag in one.flags]
    assert [flag for flag in flags if f"`{flag}" not in page and "_" not in flag] == []


@pytest.mark.parametrize("flag", ["--cfg", "--cfg-scale", "--cfg_scale"])
def test_guidance_counted_from_one(flag, capsys):
    for text, guidance in (("5", 4.0), ("1", 0.0), ("0", 0.0), ("1.1", 0.1)):
        assert parsed("gen", flag, text) == {"guidance": guidance}
    assert main(["gen", "a", flag, "5", "--guidance", "4"]) == 2
    assert "guidance is set too; pass only one of them" in capsys.readouterr().err
    for wrong, said in (
        ("much", "should be a number"),
        ("nan", "not a number"),
        ("102", "guidance 101.0 is too large"),
    ):
        assert main(["gen", "a", flag, wrong]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--sampler-name", "--sampling-method", "--sampling_method"])
def test_samplers_as_others_write_them(flag, capsys):
    written = {"Euler a": "euler_ancestral", "euler_a": "euler_ancestral", "dpm++2m": "dpmpp_2m", "er_sde": "er_sde"}
    for text, ours in written.items():
        assert parsed("gen", flag, text) == {"sampler": ours}
    both = {"sampler": "dpmpp_2m", "schedule": "karras"}
    assert parsed("gen", flag, "DPM++ 2M Karras") == parsed("gen", flag, "DPM++ 2M", "--scheduler", "Karras") == both
    for given, said in (
        ([flag, "PLMS"], "sampler 'PLMS' is not known here; use euler, "),
        ([flag, ""], "sampler '' is not known here"),
        (["--scheduler", "align_your_steps"], "schedule 'align_your_steps' is not known here; use simple, "),
        ([flag, "Euler", "--sampler", "heun"], "sampler is set too"),
        ([flag, "DPM++ 2M Karras", "--schedule", "beta"], "schedule is set too"),
    ):
        assert main(["gen", "a", *given]) == 2
        assert said in capsys.readouterr().err


def test_schedules_as_others_write_them():
    written = {"Simple": "simple", "KL Optimal": "kl_optimal", "linear-quadratic": "linear_quadratic"}
    for text, ours in written.items():
        assert parsed("gen", "--scheduler", text) == {"schedule": ours}
    assert parsed("gen", "--scheduler", "Automatic") == {}  # which is left open here, too
