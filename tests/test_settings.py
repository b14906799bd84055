"""What a setting is: its types, bounds and forms, on the command line and as plain values."""

import dataclasses
import json
import pickle
import re
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from zimage.cli.options import GroupedCommand, given, options_of
from zimage.errors import CheckpointError, RequestError
from zimage.settings.declared import Request
from zimage.settings.fields import fields, json_schema, parse_weights
from zimage.settings.loading import LoadSettings
from zimage.settings.merging import EVERY_SETTINGS
from zimage.settings.profiles import SERVE
from zimage.settings.rewriting import RewriteSettings
from zimage.settings.scale import BatchSettings, ParallelSettings
from zimage.settings.serving import ServeSettings


def parsed(*arguments):
    """What a command line comes to as the fields of a request."""

    @click.command(cls=GroupedCommand)
    @options_of(Request, skip=("prompt",))
    def command(**options):
        click.echo(json.dumps(given(options, Request)))

    done = CliRunner().invoke(command, arguments)
    return json.loads(done.stdout) if done.exit_code == 0 else done.output


def test_names_are_unique_over_all_settings():
    names = [name for settings in EVERY_SETTINGS for name in settings.names()]
    assert len(names) == len(set(names))
    assert not {"config", "profile", "inherit", SERVE} & set(names), "these mean something else in files and options"


def test_every_setting_says_what_it_is():
    for field in (field for settings in EVERY_SETTINGS for field, _ in fields(settings)):
        assert field.metadata["help"].endswith("."), field.name
        if field.metadata["attachment"]:
            assert field.metadata["per_call"], field.name


@pytest.mark.parametrize(
    ("text", "weights"),
    [("-2:1", {-2: 1.0}), ("-2:0.7,-8:0.3", {-2: 0.7, -8: 0.3}), (" -2 : 1 , -1 : -.5 ", {-2: 1.0, -1: -0.5})],
)
def test_weights_as_text(text, weights):
    assert parse_weights(text) == weights
    assert Request.from_mapping({"layer_weights": text}).layers == weights


@pytest.mark.parametrize("text", ["", "-2", "-2:", ":1", "-2:x", "x:1", "-2:1,", "-2:1,-2:1", "-2:1:1", "-2.5:1"])
def test_text_that_is_no_weights(text):
    with pytest.raises(RequestError, match="write LAYER:WEIGHT,") as caught:
        Request.from_mapping({"layer_weights": text})
    assert caught.value.fields == ("layer_weights",)


def test_weights_as_json_and_toml_hold_them():
    request = Request.from_mapping({"layer_weights": {"-2": 0.7, "-8": 1}})
    assert request.layer_weights == {-2: 0.7, -8: 1}
    assert request.to_mapping()["layer_weights"] == {"-2": 0.7, "-8": 1}
    with pytest.raises(RequestError, match="write LAYER:WEIGHT"):  # which of the two would count?
        Request.from_mapping({"layer_weights": {"-2": 0.7, "-02": 0.3}})


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "should be a table of layers"),
        (3, "should be a table of layers"),
        ([-2], "should be a table of layers"),
        ({0: 1.0}, "layer 0 should be a negative integer"),
        ({True: 1.0}, "layer True should be"),
        ({-2: "a"}, "the weight 'a' of layer -2 should be a number"),
        ({-2: True}, "the weight True"),
        ({-2: float("nan")}, "the weight nan"),
        ({-2: float("inf")}, "the weight inf"),
        ({-2: 10**400}, "should be a number up to 1e\\+06"),
        ({-2: 1.0, -3: -1.0}, "add up to 0"),
    ],
)
def test_weights_that_cannot_be_meant(weights, words):
    with pytest.raises(RequestError, match=words) as caught:
        Request(layer_weights=weights)
    assert caught.value.fields == ("layer_weights",)


def test_flags_of_three_states():
    assert "force_think_block" not in parsed()
    assert parsed("--force-think-block") == {"force_think_block": True}
    assert parsed("--no-force-think-block") == {"force_think_block": False}
    assert parsed("--no-force-think-block", "--force-think-block") == {"force_think_block": True}
    assert Request().force_think_block is None
    with pytest.raises(RequestError, match="force_think_block 'yes' is of type str; it should be of type bool"):
        Request(force_think_block="yes")


def test_options_become_values():
    assert parsed() == {}
    assert parsed("--layer-weights", "-2:1") == {"layer_weights": "-2:1"}
    assert parsed("--seed", "1") == {"seed": 1}
    assert parsed("--seed", "1", "--seed", "2") == {"seed": [1, 2]}
    assert parsed("-n", "2", "--hires", "2") == {"images": 2, "hires": 2.0}
    assert "Invalid value for '--long-prompt'" in parsed("--long-prompt", "cut")


@pytest.mark.parametrize("value", [3, 0.5, True, b"png", ["a.png"], {"name": "a.png"}])
@pytest.mark.parametrize("name", ["image", "mask", "embeddings"])
def test_attachments_are_paths_or_objects(name, value):
    with pytest.raises(RequestError, match=f"{name} .*of type {type(value).__name__}; it should be the path of a file"):
        Request(**{name: value})


def test_attachments_are_described_without_their_folder():
    picture = Image.new("RGB", (16, 16))
    for given_as in ("/home/me/cat.png", Path("/home/me/cat.png")):
        assert Request(image=given_as).to_mapping()["image"] == {"name": "cat.png"}
    assert Request(image=picture).to_mapping()["image"] == {"name": "Image"}
    picture.describe = lambda: {"name": "cat.png", "hash": "0123"}
    assert Request(image=picture).to_mapping()["image"] == {"name": "cat.png", "hash": "0123"}
    assert Request().to_mapping()["image"] is None


@pytest.mark.parametrize("settings", EVERY_SETTINGS)
def test_plain_values_go_through_json_and_back(settings):
    changed = {
        Request: {"prompt": ["a", "b"], "seed": [1, 2], "layer_weights": {-2: 1.0}, "force_think_block": False},
        LoadSettings: {"lora": ["a.safetensors:0.5"], "memory": 8},
        RewriteSettings: {"rewriter": "cinematic", "temperature": 0},
        ServeSettings: {"port": 80, "worker": ["cpu", "cpu"], "keep_days": 0.5},
        ParallelSettings: {"gpus": 4, "cfg_parallel": True},
        BatchSettings: {"workers": 2, "encoders": 1, "address": "auto"},
    }[settings]
    for instance in (settings(), settings(**changed)):
        assert settings.from_mapping(json.loads(json.dumps(instance.to_mapping()))) == instance


@pytest.mark.parametrize(
    ("settings", "name", "value", "words"),
    [
        (Request, "steps", 0, "steps 0 is too small; the minimum is 1"),
        (Request, "steps", True, "steps True is of type bool"),
        (Request, "guidance", float("nan"), "guidance is not a number"),
        pytest.param(Request, "steps", 10**5000, "steps a number of 16610 bits is too large", id="5000 digits"),
        (Request, "hidden_layer", 0, "hidden_layer 0 is too large; the maximum is -1"),
        (Request, "long_prompt", "cut", "use none, truncate, interpolate"),
        (Request, "long_prompt", None, "long_prompt: a value is needed"),
        (Request, "template", "\ud800", "template is not valid text"),
        (LoadSettings, "lora", "a.safetensors", "it should be a list"),
        (RewriteSettings, "top_p", 0, "top_p 0 is too small; it must be above 0"),
    ],
)
def test_a_value_is_checked_by_itself_and_in_its_place(settings, name, value, words):
    for check in (lambda: settings.check_one(name, value), lambda: settings.from_mapping({name: value})):
        with pytest.raises(RequestError, match=words) as caught:
            check()
        assert caught.value.fields == (name,)


def test_every_bound_is_held():
    """One step past each bound is refused, by the field's name."""
    for settings in EVERY_SETTINGS:
        for field in dataclasses.fields(settings):
            for bound, past in (("minimum", -1), ("maximum", 1), ("above", 0)):
                if (limit := field.metadata[bound]) is not None:
                    with pytest.raises(RequestError, match=f"^{field.name} .* is too (small|large)") as caught:
                        settings.check_one(field.name, limit + past)
                    assert caught.value.fields == (field.name,)


@pytest.mark.parametrize(
    ("settings", "values", "fields"),
    [
        (Request, {"layer_weights": {-2: 1.0}, "hidden_layer": -2}, ("layer_weights", "hidden_layer")),
        (Request, {"force_think_block": False, "thinking_content": "a"}, ("thinking_content", "force_think_block")),
        (Request, {"tile_mode": "blend", "tile_size": 64}, ("tile_overlap", "tile_size")),
        (Request, {"prompt": []}, ("prompt",)),
        (Request, {"negative": "dogs", "guidance": 0}, ("negative", "guidance", "nag")),
        (Request, {"seed": [1, 2, 3]}, ("seed", "prompt", "images")),
        (Request, {"mask": "a.png"}, ("mask", "image")),
        (Request, {"strength": 0.5}, ("strength", "image", "hires")),
        (Request, {"hires": 2, "image": "a.png"}, ("hires", "image")),
        (Request, {"embeddings": "a.safetensors", "prompt": "a"}, ("embeddings", "prompt")),
        (Request, {"embeddings": "a.safetensors", "template": "a", "system_prompt": "b"},
         ("embeddings", "template", "system_prompt")),
        (LoadSettings, {"lora": ["a.safetensors:nan"]}, ("lora",)),
        (LoadSettings, {"lora": ["a.safetensors:1e9"]}, ("lora",)),
        (RewriteSettings, {"rewrite_thinking": True, "rewriter_url": "http://a"}, ("rewrite_thinking", "rewriter_url")),
        (Request, {"stepz": 3}, ("stepz",)),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together_are_named_as_data(settings, values, fields):
    with pytest.raises(RequestError) as caught:
        settings.from_mapping(values)
    assert caught.value.fields == fields


def test_errors_keep_their_fields():
    error = CheckpointError("model: nothing there", fields=("model",))
    longer = error.with_text(f"{error} (from a file)")
    assert (type(longer), str(longer), longer.fields) == (
        CheckpointError,
        "model: nothing there (from a file)",
        ("model",),
    )
    assert pickle.loads(pickle.dumps(error)).fields == ("model",)
    assert CheckpointError("a").fields == ()


def test_unknown_names_offer_the_nearest():
    with pytest.raises(RequestError, match="there is no setting 'stepz'; did you mean 'steps'"):
        Request.from_mapping({"stepz": 3})


# ---------------------------------------------------------------------- as JSON Schema

JSON_TYPES = {
    **{"string": str, "integer": int, "number": (int, float), "boolean": bool},
    **{"array": list, "object": dict, "null": types.NoneType},
}


def allowed(schema, value):
    """Whether a value is valid by the few words of JSON Schema that are used."""
    if "anyOf" in schema:
        return any(allowed(form, value) for form in schema["anyOf"])
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    kinds = [name for name in names if isinstance(value, JSON_TYPES[name])]
    if not kinds or (isinstance(value, bool) and "boolean" not in kinds):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, list):
        return all(allowed(schema["items"], item) for item in value)
    if isinstance(value, dict):
        keys = all(re.search(schema["propertyNames"]["pattern"], key) for key in value)
        return (
            keys
            and len(value) >= schema["minProperties"]
            and all(allowed(schema["additionalProperties"], item) for item in value.values())
        )
    return not isinstance(value, int | float) or (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and value > schema.get("exclusiveMinimum", value - 1)
        and value % schema.get("multipleOf", 1) in (0, value % 1)
    )


@pytest.mark.parametrize("settings", EVERY_SETTINGS)
def test_json_schema_has_every_field_as_declared(settings):
    schema = json.loads(json.dumps(json_schema(settings)))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (schema["type"], schema["additionalProperties"]) == ("object", False)
    assert list(schema["properties"]) == settings.names()
    for field in dataclasses.fields(settings):
        entry, m = schema["properties"][field.name], field.metadata
        assert (entry["default"], entry["description"], entry["x-group"]) == (field.default, m["help"], m["group"])
        assert (entry.get("x-attachment", False), entry.get("x-per-call", False)) == (m["attachment"], m["per_call"])
        assert allowed(entry, field.default), field.name
        if m["attachment"]:
            assert entry["type"] == ["string", "null"]
            continue
        scalar = entry.get("anyOf", [entry])[0]
        scalar = scalar.get("items", scalar)
        bounds = {"minimum": "minimum", "maximum": "maximum", "above": "exclusiveMinimum", "multiple": "multipleOf"}
        if "object" not in scalar["type"]:
            assert {scalar.get(name) == m[bound] for bound, name in bounds.items()} == {True}, field.name
        assert [value for value in scalar.get("enum", []) if value is not None] == list(m["choices"] or [])


@pytest.mark.parametrize(
    ("settings", "name", "values"),
    [
        (Request, "seed", [None, 0, 2**63 - 1, [1, 2], -1, 2**63, [-1], [None], "a", 0.5, True]),
        (Request, "prompt", ["a", ["a", "b"], None, 3, [3]]),
        (Request, "width", [None, 16, 1024, 1000, 0, 16_400, "a"]),
        (Request, "shift", [None, 3, 0.1, 0, 101]),
        (Request, "tile_mode", [None, "exact", "cut", 3]),
        (Request, "long_prompt", ["pool", None, "cut"]),
        (Request, "force_think_block", [None, True, False, 1, "yes"]),
        (Request, "layer_weights", [None, {"-2": 1}, "-2:1", {}, {"2": 1}, {"-2": "a"}, {"-2": 1e7}, 3]),
        (LoadSettings, "lora", [None, ["a.safetensors"], "a.safetensors", [3]]),
        (LoadSettings, "compile", [True, None, 1]),
    ],
)
def test_json_schema_allows_what_the_checks_allow(settings, name, values):
    entry = json_schema(settings)["properties"][name]
    for value in values:
        try:
            settings.check_one(name, value)
            is_right = True
        except RequestError:
            is_right = False
        assert allowed(entry, value) == is_right, value
