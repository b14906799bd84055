"""Settings files: which one, which profile, what comes first, where it came from, and what is wrong with it."""

import json
import os
import random
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from zimage.cli import main
from zimage.errors import CheckpointError, ConfigFileError, RequestError
from zimage.settings.declared import Request
from zimage.settings.environment import REWRITER_KEY, from_environment, rewriter_key
from zimage.settings.loading import LoadSettings
from zimage.settings.merging import FIELDS
from zimage.settings.profiles import EXAMPLE, Config, find_config, read_config, resolve, usual_places
from zimage.settings.rewriting import RewriteSettings
from zimage.settings.serving import ServeSettings
from zimage.settings.toml_file import TomlFile

ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write zimage.toml in an empty folder that one is then in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZIMAGE_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "120")

    def call(text, path="zimage.toml"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
        return Path(path)

    return call


@pytest.fixture
def run(write, capsys):
    def call(*arguments):
        status = main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def config(text):
    return Config(TomlFile(Path("folder/zimage.toml"), text))


def values(text, profile=None, environ=(), **given):
    return {n: e.value for n, e in resolve(given, None, config(text), profile, dict(environ)).entries.items()}


# ---------------------------------------------------------------------- which file, which profile


def test_the_file_is_found_in_this_order(write, tmp_path):
    assert find_config(environ={}) is None
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "home"), "APPDATA": str(tmp_path / "home")}
    user = write("", tmp_path / "home/zimage/zimage.toml")
    assert find_config(environ=environ) == user
    write("")
    assert find_config(environ=environ) == Path("zimage.toml")
    write("", "env.toml")
    assert find_config(environ={**environ, "ZIMAGE_CONFIG": "env.toml"}) == Path("env.toml")
    assert find_config("named.toml", {**environ, "ZIMAGE_CONFIG": "env.toml"}) == Path("named.toml")
    assert find_config(environ={**environ, "ZIMAGE_CONFIG": ""}) == Path("zimage.toml"), "empty is not set"


@pytest.mark.skipif(sys.platform == "win32", reason="APPDATA there")
def test_without_a_variable_the_users_folder_is_in_their_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert usual_places({})[-1] == Path("/home/somebody/.config/zimage/zimage.toml")


def test_a_profile_has_what_default_has_unless_it_says_otherwise():
    text = """
        [default]
        steps = 4
        guidance = 2.0
        [a]
        steps = 5
        [b]
        inherit = "a"
        shift = 6.0
        [alone]
        inherit = ""
        shift = 1.0
    """
    assert values(text) == {"steps": 4, "guidance": 2.0}
    assert values(text, "a") == {"steps": 5, "guidance": 2.0}
    assert values(text, "b") == {"steps": 5, "guidance": 2.0, "shift": 6.0}
    assert values(text, "alone") == {"shift": 1.0}
    assert values(text, environ={"ZIMAGE_PROFILE": "a"}) == values(text, "a")
    assert values(text, "b", {"ZIMAGE_PROFILE": "a"}) == values(text, "b")
    assert values("[a]\nsteps = 5\n") == {}, "no default, none chosen"
    assert config(text).inherited("b") == ["a", "default"]
    with pytest.raises(ConfigFileError, match=r"zimage.toml: there is no profile 'defolt'; did you mean 'default'\?"):
        values(text, "defolt")
    with pytest.raises(ConfigFileError, match="profile 'a' needs a settings file; none exists at"):
        resolve({}, None, None, "a", {})


# ---------------------------------------------------------------------- what comes first


TEXT = """
[default]
model = "/file/model"
attention = "sdpa"
steps = 4
guidance = 2.0
"""


def test_a_servers_settings_have_a_table_of_their_own_in_each_profile():
    text = """
        [default]
        steps = 4
        [default.serve]
        port = 8000
        data = "pictures"
        [lab]
        guidance = 2.0
        serve.port = 9000
        [bare]
        inherit = ""
        serve = {allow_host = ["draw.example"]}
    """
    resolved = resolve({"grace": 5.0}, None, config(text), "lab", {})
    assert resolved.of(ServeSettings) == {"port": 9000, "data": str(Path("folder/pictures")), "grace": 5.0}
    assert resolved.of(Request) == {"steps": 4, "guidance": 2.0}
    assert resolved.source("port") == "zimage.toml [lab.serve] line 9"
    assert resolved.source("data") == "zimage.toml [default.serve] line 6"
    assert resolved.source("grace") == "--grace"
    assert resolve({"port": 1}, None, config(text), "lab", {}).of(ServeSettings)["port"] == 1
    assert values(text, "bare") == {"allow_host": ["draw.example"]}


def test_options_come_before_the_environment_it_before_the_file_that_before_defaults():
    environ = {"ZIMAGE_MODEL": "/env/model", "ZIMAGE_ATTENTION": ""}
    resolved = resolve({"steps": 9}, None, config(TEXT), None, environ)
    assert resolved.of(LoadSettings) == {"model": "/env/model", "attention": "sdpa"}
    assert resolved.of(Request) == {"steps": 9, "guidance": 2.0}
    assert resolved.of(RewriteSettings) == {}
    sources = {name: resolved.source(name) for name in ("steps", "model", "attention", "guidance", "shift")}
    assert sources == {
        "steps": "--steps",
        "model": "ZIMAGE_MODEL",
        "attention": "zimage.toml [default] line 4",
        "guidance": "zimage.toml [default] line 6",
        "shift": "default",
    }
    assert resolve({"model": "/option"}, None, config(TEXT), None, environ).of(LoadSettings)["model"] == "/option"


def test_a_picture_brings_its_whole_request_and_says_nothing_on_loading():
    origin = Request("a cat", steps=7, seed=1).to_mapping()
    resolved = resolve({"seed": 2}, origin, config(TEXT), None, {})
    assert resolved.of(Request) == {**origin, "seed": 2}
    assert resolved.of(Request)["guidance"] is None, "the file's guidance is not the picture's"
    assert resolved.of(LoadSettings) == {"model": "/file/model", "attention": "sdpa"}
    assert (resolved.source("steps"), resolved.source("seed")) == ("picture", "--seed")
    with pytest.raises(RequestError, match="there is no setting 'stepz'; did you mean 'steps'"):
        resolve({}, {"stepz": 3})
    with pytest.raises(RequestError, match="steps 0 is too small"):
        resolve({}, {"steps": 0})
    assert resolve({"steps": 2}, {"steps": 0}).of(Request) == {"steps": 2}


def test_values_of_the_environment_are_checked():
    for read in (lambda e: resolve({}, environ=e), lambda e: from_environment(LoadSettings, e)):
        with pytest.raises(
            RequestError, match=r"attention 'flash9' is not known; .* \(from ZIMAGE_ATTENTION\)"
        ) as caught:
            read({"ZIMAGE_ATTENTION": "flash9"})
        assert caught.value.fields == ("attention",)


def test_the_library_reads_the_environment_in_the_same_place():
    environ = {"ZIMAGE_MODEL": "/env/model", "ZIMAGE_ATTENTION": "", "ZIMAGE_REWRITER_URL": "http://a", "HOME": "/b"}
    assert from_environment(LoadSettings, environ) == {"model": "/env/model"}
    assert from_environment(RewriteSettings, environ) == {"rewriter_url": "http://a"}
    assert from_environment(Request, environ) == {}
    assert rewriter_key({REWRITER_KEY: "secret"}) == "secret"
    assert rewriter_key({REWRITER_KEY: ""}) is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("steps", "8", 8), ("guidance", "1.5", 1.5), ("compile", "Yes", True), ("compile", "0", False),
     ("lora", "a.safetensors", ["a.safetensors"]), ("seed", "3", 3), ("layer_weights", "-2:1", {-2: 1.0})],
)  # fmt: skip
def test_text_of_the_environment_has_the_fields_type(monkeypatch, name, text, value):
    monkeypatch.setattr(FIELDS[name], "metadata", {**FIELDS[name].metadata, "env": "ZIMAGE_TRIED"})
    assert resolve({}, environ={"ZIMAGE_TRIED": text}).entries[name].value == value
    if not isinstance(value, list | dict):
        with pytest.raises(RequestError, match=rf"{name} 'many' should be .* \(from ZIMAGE_TRIED\)"):
            resolve({}, environ={"ZIMAGE_TRIED": "many"})


@pytest.mark.parametrize(
    ("text", "given", "kept", "left_out"),
    [
        ("hidden_layer = -3", {"layer_weights": "-2:1"}, {"layer_weights": {-2: 1.0}}, "hidden_layer"),
        ("layer_weights = '-2:1'", {"hidden_layer": -3}, {"hidden_layer": -3}, "layer_weights"),
        ("guidance = 0", {"negative": "dogs"}, {"negative": "dogs"}, "guidance"),
        ("guidance = 2\nnegative = 'dogs'", {"guidance": 0}, {"guidance": 0}, "negative"),
        ("strength = 0.3", {}, {}, "strength"),
        ("strength = 0.3", {"hires": 2}, {"hires": 2, "strength": 0.3}, None),
        ("strength = 0.3", {"image": "a.png"}, {"image": "a.png", "strength": 0.3}, None),
        ("hires = 2\nstrength = 0.3", {"image": "a.png"}, {"image": "a.png", "strength": 0.3}, "hires"),
        ("force_think_block = false", {"thinking_content": "a"}, {"thinking_content": "a"}, "force_think_block"),
        ("thinking_content = 'a'", {"force_think_block": False}, {"force_think_block": False}, "thinking_content"),
        ("thinking_content = 'a'", {"force_think_block": True},
         {"force_think_block": True, "thinking_content": "a"}, None),
        ("tile_mode = 'blend'\ntile_size = 256", {"tile_overlap": 256},
         {"tile_mode": "blend", "tile_overlap": 256}, "tile_size"),
        ("template = 'a'\nsystem_prompt = 'b'", {"embeddings": "a.safetensors"},
         {"embeddings": "a.safetensors"}, "template, system_prompt"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_left_out_of_the_lower_source(text, given, kept, left_out):
    resolved = resolve(given, None, config(f"[default]\n{text}\n"), None, {})
    assert resolved.of(Request) == kept
    assert sorted(resolved.left_out) == sorted(left_out.split(", ") if left_out else [])
    file, *notes = resolved.note.split("; ")
    assert file == f"settings: {Path('folder/zimage.toml')} [default]"
    assert [re.match(r"(\w+) from zimage.toml \[default\] line \d is left out", note)[1] for note in notes] == list(
        resolved.left_out
    )


def test_a_file_that_lets_the_model_think_gives_way_to_a_server():
    environ = {"ZIMAGE_REWRITER_URL": "http://localhost:8000"}
    resolved = resolve({}, None, config("[default]\nrewrite_thinking = true\n"), None, environ)
    assert resolved.of(RewriteSettings) == {"rewriter_url": "http://localhost:8000"}
    assert list(resolved.left_out) == ["rewrite_thinking"]


def test_what_is_inherited_gives_way_too():
    text = "[default]\nhidden_layer = -3\n[blend]\nlayer_weights = {-2 = 0.5, -8 = 0.5}\n"
    assert values(text, "blend") == {"layer_weights": {-2: 0.5, -8: 0.5}}
    assert values(text) == {"hidden_layer": -3}


def test_a_picture_gives_way_to_options():
    origin = Request("a", guidance=2.0, negative="dogs").to_mapping()
    resolved = resolve({"guidance": 0.0}, origin, None, None, {})
    assert resolved.of(Request)["guidance"] == 0
    assert "negative" not in resolved.of(Request)
    assert resolved.note == "settings: negative from picture is left out"


def test_options_that_contradict_each_other_are_an_error():
    with pytest.raises(RequestError, match="layer_weights: hidden_layer is set too"):
        resolve({"hidden_layer": -2, "layer_weights": "-2:1"}, None, config(TEXT), None, {})
    with pytest.raises(RequestError, match="strength: it has no effect without an image or hires"):
        resolve({"strength": 0.5}, None, config("[default]\nstrength = 0.4\n"), None, {})


# ---------------------------------------------------------------------- paths


def test_paths_are_relative_to_the_file(monkeypatch):
    monkeypatch.setenv("HOME", str(Path("/home/somebody")))
    monkeypatch.setenv("USERPROFILE", str(Path("/home/somebody")))
    absolute = str(Path("/models/turbo").absolute()).replace("\\", "/")
    text = f"""
        [default]
        model = "{absolute}"
        vae = "../vae.safetensors"
        templates = "~/templates"
        lora = ["loras/a.safetensors:0.8", "~/b.safetensors"]
        device = "cpu"
    """
    expected = {
        "model": absolute,
        "vae": "folder/../vae.safetensors",
        "templates": "/home/somebody/templates",
        "lora": ["folder/loras/a.safetensors:0.8", "/home/somebody/b.safetensors"],
        "device": "cpu",
    }
    found = values(text)
    assert json.loads(json.dumps(found).replace("\\\\", "/")) == expected
    assert values("[default]\n", model="model") == {"model": "model"}, "options are relative to where one is"


def test_every_setting_that_names_a_file_is_a_path():
    """A new one has to say which it is."""
    paths = {n for n, f in FIELDS.items() if f.metadata["path"] or f.metadata["attachment"]}
    assert paths == {
        *("model", "dit", "text_encoder", "vae", "tokenizer", "lora", "lora_folder", "templates"),
        *("cache_folder", "embeddings", "image", "mask", "token_file", "data", "vision_model", "control_folder"),
    }


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[default]\nsteps = \n", 2, "Invalid value; text needs quotation marks (column 9)"),
        ("[default]\nsteps = 4\nsteps = 5\n", 3, "Cannot overwrite a value; the key appears twice"),
        ("[default]\nsteps = 4\nsteps = 5", 3, "Cannot overwrite a value"),
        ("[default]\nlora = [\n" + "['']\n,\n" * 600 + "]\nsteps = 4", 2, "it should be of type str"),
        ("[default]\n[default]\n", 2, "Cannot declare [default] twice"),
        ("[default]\nsteps = 4\n\nsystem_prompt = '''\na\nb\n", 4, "Expected \"'''\""),
        ("[default]\nlora = [\n  'a',\n", 2, "Invalid value"),
        ('[default]\nmodel = "C:\\models"\n', 2, "; write paths in 'single quotes', where a backslash stands for"),
        ('[default]\nmodel = "C:\\Users"\n', 2, "; write paths in 'single quotes', where a backslash stands for"),
        ("[default]\n\nsteps = 1" + "0" * 5000, 3, "a number has too many digits"),
        ("[default]\nsteps = 0x1" + "0" * 5000, 2, "is too large; the maximum is 1000"),
        ("[default]\nsteps = 1" + "0" * 4000, 2, "is too large; the maximum is 1000"),
        ("[default]\nseed = " + "[" * 5000, 2, "nested too deeply"),
        ("[default]\nsteps" + ".a" * 40_000 + " = 1", 2, "nested too deeply"),
        ("[default]\nsteps = {a" + ".a" * 3000 + " = 1}", 2, "nested too deeply"),
        ("[default]\nstepz = 4\n", 2, "there is no setting 'stepz'; did you mean 'steps'?"),
        ("[default]\ntile-mode = 'off'\n", 2, "did you mean 'tile_mode'?"),
        ("[default]\ninherits = 'a'\n", 2, "did you mean 'inherit'?"),
        ("[default]\nsteps = 4.0\n", 2, "steps 4.0 is of type float; it should be of type int"),
        ("[default]\nsteps = 2020-01-01\n", 2, "is of type date; it should be of type int"),
        ("[default]\nguidance = nan\n", 2, "guidance is not a number"),
        ("[default]\nguidance = inf\n", 2, "guidance inf is too large"),
        ("[default]\n# a\n\n  width = 1000\n", 4, "nearest 992 or 1008"),
        ("[default]\nprecision = 'int3'\n", 2, "use bf16, int8, fp8"),
        ("[default]\nlora = 'a.safetensors'\n", 2, "it should be a list"),
        ("[default]\ndevice = 'cpu'\nlora = [\n'a.safetensors',\n'a.safetensors:nan'\n]\n", 3, "lora scale nan"),
        ("[default]\nmodel = ''\n", 2, "the path is empty"),
        ("[default]\nprompt = 'a cat'\n", 2, "prompt belongs to a single call"),
        ("[default]\nimage = 'a.png'\n", 2, "image belongs to a single call"),
        ("[default]\nseed = [1, 2]\n", 2, "a list belongs to a single call"),
        ("steps = 4\n[default]\n", 1, "steps is outside of any profile; put it under [default]"),
        ("[[default]]\nsteps = 4\n", 1, "default is outside of any profile"),
        ("[default.steps]\na = 4\n", 1, "it should be of type int"),
        ("[default]\nsteps = 4\n[default.layers]\n-2 = 1\n", 3, "there is no setting 'layers'"),
        ("[a.serve]\nhost = 'x'\nprot = 1\n", 3, "there is no setting 'prot'; did you mean 'port'?"),
        ("[a]\nserve.host = 'x'\nserve.port = 70000\n", 3, "port 70000 is too large"),
        ("[a.serve]\nhost = 'x'\n[b]\ninherit = 'a'\n[b.serve]\nport = 'x'\n", 6, "port 'x' is of type str"),
        ("a.serve.host = 'x'\na.serve.grace = -1\n", 2, "grace -1 is too small"),
        ("[a]\nserve = {host = 'x', data = ''}\n", 2, "the path is empty"),
        ("[a]\nserve = 'x'\n", 2, "serve is of type str; it should be a table, [a.serve]"),
        ("[a]\n[[a.serve]]\nport = 1\n", 2, "serve is of type list; it should be a table, [a.serve]"),
        ("[serve]\nport = 80\n", 2, "port belongs to a server; put it under [PROFILE.serve]"),
        ("[a]\nhsot = 'x'\n", 2, "there is no setting 'hsot'"),
        ("[a.serve]\nsteps = 4\n", 2, "steps does not belong to the server alone; put it under [PROFILE]"),
        ("[a.serve]\ninherit = 'b'\n", 2, "there is no setting 'inherit'"),
        ("[a.serve]\nworker = 'cpu'\n", 2, "it should be a list"),
        ("[default]\n[default.layer_weights]\n-2 = 'a'\n", 2, "the weight 'a' of layer -2"),
        ("[default]\nlayer_weights = {-2 = 1, -3 = -1}\n", 2, "add up to 0"),
        ("[default]\nlayer_weights.-2 = 1e400\n", 2, "the weight inf"),
        ("[default]\n[a]\ninherit = 'defualt'\n", 3, "there is no profile 'defualt'; did you mean 'default'?"),
        ("[default]\n[a]\ninherit = 'a'\n", 3, "inherit: a → a is a cycle"),
        ("[a]\ninherit = 'b'\n[b]\ninherit = 'c'\n[c]\ninherit = 'b'\n", 6, "inherit: b → c → b is a cycle"),
        ("[default]\ninherit = 'a'\n[a]\nsteps = 3\n", 3, "is a cycle; break it with inherit = \"\""),
        ("[default]\ninherit = 3\n", 2, "inherit is of type int; it should be the name of a profile"),
        ("[a]\nsteps = 1\nhidden_layer = -2\nlayer_weights = '-2:1'\n", 4, "hidden_layer is set too"),
        ("[a]\nguidance = 0\nnegative = 'b'\n", 3, "negative: it has no effect at guidance 0"),
        ("[a]\ntile_mode = 'blend'\ntile_overlap = 600\n", 3, "tile_overlap 600 must be below the tile_size"),
        ("[a]\n[unused]\nsteps = 0\n", 3, "steps 0 is too small"),
        ("[a]\nsystem_prompt = '''\n[b]\nsteps = 3\n'''\nsteps = 0\n", 6, "steps 0 is too small"),
        ("[a]\n'steps' = 0\n", 2, "steps 0 is too small"),
        ("a.steps = 0\n", 1, "steps 0 is too small"),
        ("a = {device = 'cpu', steps = 0}\n", 1, "steps 0 is too small"),
        ('[a]\nsystem_prompt = """\n\\"""\n"""""\nsteps = 0 # """\n', 5, "steps 0 is too small"),
    ],
)  # fmt: skip
def test_faults_name_file_and_line(write, text, line, words):
    with pytest.raises(ConfigFileError) as caught:
        read_config(write(text))
    message = str(caught.value)
    assert message.startswith(f"zimage.toml line {line}: "), message[:300]
    assert words in message
    assert "\n" not in message
    assert len(message) < 2000


LONG = {  # all just within the longest file
    "quotes": "[a]\nsystem_prompt = " + '"' * 90_000,
    "quotes on lines": "[a]\nsystem_prompt = " + '"""\n' * 20_000,
    "single quotes": "[a]\nsystem_prompt = " + "'" * 90_000,
    "escaped quotes": "[a]\nsystem_prompt = " + r'\"""' * 20_000,
    "escaped quotes after one": '[a]\nsystem_prompt = "' + r"\"" * 40_000,
    "quotes in an open bracket": "[a]\nlora = [" + r'"""\\'[:-1] * 20_000,
    "strings that end lines": "[a]\nsystem_prompt = '''\n" + '"""\n' * 20_000,
    "brackets that never close": "[a]\nlora = [\n" + "['']\n" * 15_000,
    "brackets that never open": "[a]\nlora = [\n" + "]\n" * 40_000,
    "a bracket a line": "[a]\nlora = [\n" + "['']\n,\n" * 10_000 + "]",
    "a chain of profiles": "".join(f'[p{i}]\ninherit = "p{i + 1}"\n' for i in range(3500)) + "[p3500]\n",
    "a circle of profiles": "".join(f'[p{i}]\ninherit = "p{(i + 1) % 3500}"\n' for i in range(3500)),
    "many keys": "[a]\n" + "".join(f"k{i} = 1\n" for i in range(9000)),
    "two long names": f'[{"x" * 40_000}]\n[{"x" * 39_999}]\ninherit = "{"x" * 19_000}"',
    "dots": "[a]\nsteps = {a" + ".a" * 40_000 + " = 1}",
    "dots with blanks": "[a]\nsteps = [{a" + " . 'a'" * 15_000 + " = 1}]",
    "arrays": "[a]\nsteps = " + "[" * 45_000 + "]" * 45_000,
    "tables": "[a]\nsteps = " + "{a = " * 19_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_no_file_takes_long_to_refuse(write, kind):
    begun = time.perf_counter()
    with pytest.raises(ConfigFileError, match=r"^zimage\.toml line \d+: ") as caught:
        read_config(write(LONG[kind]))
    assert len(str(caught.value)) < 2000
    assert time.perf_counter() - begun < 4  # 0.3 s on an idle core


def test_thousands_of_profiles_are_read(write):
    text = "[default]\nseed = 1\n" + "".join(f"[p{i}]\nsteps = 1\n" for i in range(2000)) + "\n" * 50_000
    assert len(read_config(write(text)).profiles) == 2001
    chain = "".join(f'[p{i}]\ninherit = "p{i + 1}"\n' for i in range(31)) + "[p31]\nsteps = 2\n"
    assert len(read_config(write(chain)).inherited("p0")) == 31


STRINGS = (
    '"a # b"', "'a # b [' # [", r'"\"]"', "'''\na''b'''''", '"""\n\\"""\n""a"""""', "''''''", '""""""', "''", '""',
    "'''[\n{\n'''", r'"\\"', r'"""\\"""', '"{" # "', r"'\' # '",
)  # fmt: skip


def test_lines_are_found_whatever_strings_hold():
    """The lines of keys after every kind of string, comment and bracket, all of it odd."""
    chance = random.Random(1)
    for _ in range(50):
        text, lines = "", {}
        for i, value in enumerate(chance.choices(STRINGS, k=5)):
            text += chance.choice(["", "\n", "# [\n", " \t\n# '''\n"])
            text += f"[p{i}]\n"
            for key, rest in (
                ("system_prompt", f" = {value}"),
                ("lora", f" = [ # [\n {value}, # ]\n]"),
                ("steps", ".a = 1.5"),
            ):
                lines[f"p{i}", key] = text.count("\n") + 1
                text += f"{key}{rest}\n"
        file = TomlFile(Path("x.toml"), text)
        assert {key: file.line(*key) for key in lines} == lines, text


def test_files_that_cannot_be_read(write, tmp_path):
    with pytest.raises(ConfigFileError, match=r"absent.toml: there is no such settings file"):
        read_config("absent.toml")
    with pytest.raises(ConfigFileError, match=r"there is no such settings file \(from ZIMAGE_CONFIG\)"):
        find_config(environ={"ZIMAGE_CONFIG": "absent.toml"})
    with pytest.raises(ConfigFileError, match="is a folder; pass the settings file in it"):
        read_config(tmp_path)
    with pytest.raises(ConfigFileError, match="is larger than 100 kB"):
        read_config(write("#" * 100_001))
    Path("latin.toml").write_bytes("[default]\nsteps = 3\nnegative = 'ärger'\n".encode("latin-1"))
    with pytest.raises(ConfigFileError, match=r"latin.toml line 3: the file is not encoded in UTF-8"):
        read_config("latin.toml")
    assert read_config(os.devnull).profiles == {}


def test_byte_order_marks_and_windows_line_ends_are_read(write):
    Path("zimage.toml").write_bytes("\ufeff[default]\r\nsystem_prompt = '''a\r\nb'''\r\nsteps = 3\r\n".encode())
    found = resolve({}, None, read_config("zimage.toml"))
    assert found.of(Request) == {"system_prompt": "a\nb", "steps": 3}
    assert found.source("steps") == "zimage.toml [default] line 4"


def test_lines_of_keys_after_values_of_many_lines():
    text = "[default]\nlora = [ # ]\n  'a', # ]\n  'b ]' ]\nsystem_prompt = '''\n[a]\nsteps = 1 ]\n''' # }\nsteps = 3\n"
    resolved = resolve({}, None, config(text), None, {})
    lines = {name: resolved.source(name).rpartition(" ")[2] for name in resolved.entries}
    assert lines == {"lora": "2", "system_prompt": "5", "steps": "9"}


# ---------------------------------------------------------------------- on the command line


def test_gen_and_info_take_their_settings_from_the_file(run, write, tiny_folder):
    write(
        f"[default]\nmodel = '{tiny_folder}'\nsteps = 2\nwidth = 64\nheight = 48\n[small]\nwidth = 32\nstrength = 0.5\n"
    )
    status, out, err = run("gen", "a", "--seed", 1, "--json", "--device", "cpu", "--dtype", "fp32")
    assert (status, err) == (0, "")
    request = json.loads(out)["images"][0]["request"]
    assert (request["steps"], request["width"], request["height"]) == (2, 64, 48)
    status, out, err = run("gen", "a", "--profile", "small", "--steps", 1, "--device", "cpu", "--dtype", "fp32")
    assert status == 0
    assert err.splitlines()[0] == "settings: zimage.toml [small]; strength from zimage.toml [small] line 8 is left out"
    assert "32×48, 1 step," in err
    assert "settings" not in run("gen", "a", "-q", "--steps", 1, "--device", "cpu")[2]
    assert "plan          64×48" in run("info", "--plan")[1]
    assert json.loads(run("info", "--json")[1])["name"] == Path(tiny_folder).name
    write("[a]\nsteps = 3\n")
    assert "nothing from zimage.toml, which has no [default]" in run("gen", "a", "--steps", 1, "--device", "cpu")[2]


def test_errors_of_later_stages_say_where_the_value_stands(run, write, monkeypatch):
    write("[default]\ndevice = 'cuda:9'\n[gone]\ninherit = ''\nmodel = 'nowhere'\n")
    status, out, err = run("gen", "a")
    assert (status, out) == (2, "")
    assert err.splitlines()[1] == (
        "error: device 'cuda:9' is not on this machine; use auto or cpu (from zimage.toml [default] line 2)"
    )
    status, _, err = run("info", "--profile", "gone")
    assert status == 1
    assert err.endswith("(from zimage.toml [gone] line 5)\n")
    assert "(from" not in run("gen", "a", "--device", "cuda:8")[2]
    monkeypatch.setenv("ZIMAGE_MODEL", "nowhere")
    assert run("info", "--device", "cpu")[2].endswith("(from ZIMAGE_MODEL)\n")


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        (("hidden_layer",), "zimage.toml [default] line 2"),
        (("shift", "hidden_layer", "width"), "zimage.toml [default] line 2"),
        (("width", "attention"), "ZIMAGE_ATTENTION"),
        (("height",), None),
        (("width", "height"), None),
        (("hidden_layer", "height", "attention"), None),
        (("shift",), None),
        (("nothing",), None),
        ((), None),
    ],
)
def test_a_late_fault_is_found_by_its_fields_and_blamed_on_the_highest_source(fields, source):
    text = "[default]\nhidden_layer = -400\nwidth = 1024\n"
    resolved = resolve({"height": 512}, None, config(text), None, {"ZIMAGE_ATTENTION": "sdpa"})
    with pytest.raises(CheckpointError) as caught, resolved.naming_sources():
        raise CheckpointError("width and hidden layer −400: see there", fields=fields)
    assert str(caught.value) == "width and hidden layer −400: see there" + (f" (from {source})" if source else "")
    assert caught.value.fields == fields


def test_words_in_a_message_are_not_taken_for_fields():
    """A value that holds a setting's name says nothing about that setting."""
    resolved = resolve({"system_prompt": "width"}, None, config("[default]\nwidth = 64\nstrength = 0.5\n"), None, {})
    assert list(resolved.left_out) == ["strength"]
    with pytest.raises(ConfigFileError, match=r"zimage.toml line 3: .*seed") as caught:
        config("[default]\nwidth = 64\nseed = 'width guidance'\n")
    assert caught.value.fields == ("seed",)


@pytest.mark.parametrize("profile", ["default", "rtx4090", "low_vram", "cpu", "distributed"])
def test_the_shipped_example_can_be_shown_by_profile(run, write, profile):
    status, text, _ = run("config", "example")
    assert (status, text) == (0, EXAMPLE.read_text(encoding="utf-8"))
    write(text)
    assert f"{profile} " in run("config", "profiles")[1]
    status, out, _ = run("config", "show", "--profile", profile, "--steps", 3)
    assert status == 0
    assert out.splitlines()[0] == f"file     {Path('zimage.toml').absolute()}"
    assert out.splitlines()[1].startswith(f"profile  {profile}")
    assert re.search(r"^  steps +3 +--steps$", out, re.MULTILINE)
    assert re.search(r"^  residency +\w+ +zimage.toml \[\w+\] line \d+$", out, re.MULTILINE)
    assert re.search(r"^  shift +- +default: from the checkpoint's scheduler config$", out, re.MULTILINE)
    shown = json.loads(run("config", "show", "--profile", profile, "--json")[1])
    assert set(shown["settings"]) == {name for name, field in FIELDS.items() if not field.metadata["per_call"]}
    assert shown["left_out"] == {}
    for name, setting in shown["settings"].items():
        if setting["source"] != "default":
            line = text.splitlines()[int(setting["source"].rpartition(" ")[2]) - 1]
            assert line.startswith(f"{name} = "), "the line is the setting's"


def test_settings_in_the_examples_comments_are_right_too():
    """With every commented setting in force it is still a sound file."""
    text = re.sub(r"^# (?=\w+ = |-\d+ = )", "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    before, layers, after = re.split(r"# (\[default.layer_weights\]\n(?:-.*\n)+)", text)
    active = config(before + after + layers)
    assert len(active.profiles["default"]) == 18
    assert resolve({}, None, active, None, {}).of(Request)["layer_weights"] == {-2: 0.7, -8: 0.3}


def test_show_says_what_is_left_out_and_where_there_is_no_file(run, write):
    status, out, _ = run("config", "show")
    assert status == 0
    assert out.startswith("file     none (zimage.toml or ")
    assert "create one with: zimage config example > zimage.toml" in out
    status, out, err = run("config", "path")
    assert (status, out) == (2, "")
    assert "no settings file exists at zimage.toml or " in err
    write('[default]\nstrength = 0.4\nsystem_prompt = "a\\nb"\n')
    out = run("config", "show", "--layer-weights", "-2:1,-3:0.5")[1]
    assert "left out: strength 0.4 from zimage.toml [default] line 2, because\n  strength: it has no effect" in out
    assert re.search(r"layer_weights +-2: 1.0, -3: 0.5 +--layer-weights", out)
    assert re.search(r"system_prompt +a b +zimage.toml \[default\] line 3", out)
    assert run("config", "path")[1].strip() == str(Path("zimage.toml").absolute())


SPARKLE = """
import dataclasses, json, pathlib, sys
import zimage.settings.declared as settings
from zimage.settings.fields import setting

@dataclasses.dataclass(frozen=True)
class Request(settings.Request):
    sparkle: int = setting(3, "How much it sparkles.", group="Picture", minimum=0)

settings.Request = Request
from zimage.cli import main

main(["gen", "--help"])
print("=====")
main(["config", "show"])
print("=====")
print(json.dumps(Request.from_mapping(json.loads(json.dumps(Request(sparkle=5).to_mapping()))).to_mapping()))
print("=====")
main(["gen", "a cat", "-q", "-o", "one.png", "--device", "cpu"])
main(["gen", "--from", "one.png", "-q", "-o", "two.png", "--device", "cpu"])
sys.exit(main(["gen", "a cat", "--sparkle", "-1"]))
"""


def test_a_new_field_appears_everywhere(write, tmp_path):
    """Flag, help, TOML key, `config show`, JSON, bounds and a picture's metadata, from one declaration."""
    from zimage.pictures.files import read_metadata

    write("[default]\nsparkle = 7\nsteps = 1\n")
    code = [sys.executable, "-c", SPARKLE]
    done = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path, encoding="utf-8", check=False)
    usage, shown, plain, files = done.stdout.split("=====\n")
    assert re.search(r"--sparkle INT +How much it sparkles\. Default: 3\.", usage)
    assert re.search(r"^  sparkle +7 +zimage.toml \[default\] line 2$", shown, re.MULTILINE)
    assert json.loads(plain)["sparkle"] == 5
    assert files.split() == ["one.png", "two.png"]
    for name in files.split():
        assert read_metadata(tmp_path / name)["request"]["sparkle"] == 7
    assert done.stderr == "error: sparkle -1 is too small; the minimum is 0\n"
    assert done.returncode == 2


# ---------------------------------------------------------------------- a thousand broken files


WRONG_VALUES = (
    *("0", "-1", "1e400", "nan", "inf", "-inf", "true", '""', '"a"', "[]", "[1]", "{}", "{a = 1}", "2020-01-01"),
    *("12:00:00", "0x" + "f" * 5000, "9" * 4000, "9" * 5000, "[[[[]]]]", "'''\na\n'''", "0.5", "1" + "0" * 30),
)


def mutated(lines, chance):
    """The lines of the example with one thing changed, as bytes."""
    lines, at = list(lines), chance.randrange(len(lines))
    other = chance.randrange(len(lines))
    keys = [i for i, line in enumerate(lines) if re.match(r"\w+ = ", line)]
    key = chance.choice(keys)
    name = lines[key].split(" = ")[0]
    kind = chance.randrange(14)
    if kind == 0:
        return "\n".join(lines).encode()[: chance.randrange(len("\n".join(lines)))]
    if kind == 1:
        data = bytearray("\n".join(lines).encode())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(data)
    if kind == 2:
        del lines[at]
    elif kind == 3:
        lines.insert(at, lines[other])
    elif kind == 4:
        i = chance.randrange(len(name))
        lines[key] = name[:i] + chance.choice("-._ abcé\"'") + name[i + 1 :] + lines[key][len(name) :]
    elif kind in (5, 6, 7):
        lines[key] = f"{name} = {chance.choice(WRONG_VALUES)}"
    elif kind == 8:
        lines[key] = f"{chance.choice(list(FIELDS))} = {chance.choice(WRONG_VALUES)}"
    elif kind == 9:
        lines.insert(key, f"{name}.{chance.choice(['a', '-2', 'inherit', '1.2'])} = 1")
    elif kind == 10:
        lines.insert(at, chance.choice(["[default.a]", "[[cpu]]", "[a.b.c]", "[layer_weights]", "[]", "[a", "inherit"]))
    elif kind == 11:
        lines[key] = f'inherit = "{chance.choice(["", "cpu", "low_vram", "default", "rtx", "distributed"])}"'
    elif kind == 12:
        return "\r\n".join([*lines[:at], lines[other], *lines[at:]]).encode(chance.choice(["utf-8-sig", "utf-16"]))
    elif kind == 13:
        lines[at], lines[other] = lines[other], lines[at]
    return "\n".join(lines).encode()


def test_a_thousand_mutated_files_are_understood_or_refused(tmp_path):
    """Each is read whole, every key of it in force, or refused in one line with its file and line."""
    chance, path = random.Random(5), tmp_path / "zimage.toml"
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("#")] + ["[blend]", "layer_weights = {-2 = 1, -3 = 0.5}"]
    refused = []
    for _ in range(1000):
        path.write_bytes(mutated(lines, chance))
        try:
            found = read_config(path)
        except ConfigFileError as error:
            refused.append((str(error), path.read_bytes().count(b"\n") + 1))
            continue
        document = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
        keys = {
            name: (table | table.get("serve", {})).keys() - {"inherit", "serve"} for name, table in document.items()
        }
        assert {profile: own.keys() for profile, own in found.profiles.items()} == keys
        for profile in found.profiles:
            resolved = resolve({}, None, found, profile, {})  # all checks of the settings together
            inherited = [keys[name] for name in (profile, *found.inherited(profile))]
            assert resolved.entries.keys() | resolved.left_out.keys() == set().union(*inherited)
    for message, count in refused:
        line = re.match(rf"{re.escape(str(path))} line (\d+): \S[^\n]*$", message)
        assert line, message[:300]
        assert 1 <= int(line[1]) <= count
    assert 300 < len(refused) < 900, "both kinds are tried"
