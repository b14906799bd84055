"""No dead settings: each changes what a render gives, as an option, in a file and, where it has one, by its variable.

That a picture's metadata repeats a value shows nothing; what counts is listed under "what may be seen".
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chat_server
import control_nets
import lora_files
import pytest
import tiny
import torch
from PIL import Image

from zimage.cli import main
from zimage.cli.gen import gen
from zimage.dit import ZImageDiT
from zimage.loading.files import ModelFiles, open_model
from zimage.render import denoising
from zimage.settings.captions import VISION_BLENDS
from zimage.settings.loading import LoadSettings
from zimage.settings.merging import ALL_SETTINGS, FIELDS
from zimage.settings.sampling import SAMPLERS, SCHEDULES
from zimage.text import Qwen3
from zimage.text.embeddings import save_embeddings
from zimage.vae import AutoencoderKL

TESTS = Path(__file__).parent

# ------------------------------------------------------------------ what may be seen


@dataclass
class Outcome:
    """All that a user could tell a run by."""

    status: int
    err: str
    pictures: list[tuple]  # size and pixels of each, by its name
    names: list[str]
    cached: list[str]  # files in the folder `cache`
    batches: list[int]  # images in each call of the denoiser
    compiled: int  # DiTs whose blocks were compiled
    asked: list[dict] = field(repr=False)  # bodies that the server got

    @property
    def size(self) -> tuple[int, int]:
        return self.pictures[0][0]

    @property
    def models(self) -> list[str]:
        return [body["model"] for body in self.asked]


Seen = Callable[[Outcome, Outcome], None]


def pixels(before: Outcome, after: Outcome) -> None:
    assert (before.status, after.status) == (0, 0), before.err + after.err
    assert before.pictures
    assert len(before.pictures) == len(after.pictures)
    assert all(a != b for a, b in zip(before.pictures, after.pictures, strict=True))


def differs(what: str, expected: Any) -> Seen:
    """Something else than pixels is as expected, and was not before."""

    def seen(before: Outcome, after: Outcome) -> None:
        assert (before.status, after.status) == (0, 0), before.err + after.err
        assert getattr(after, what) == expected
        assert getattr(before, what) != expected

    return seen


def says(words: str) -> Seen:
    """A line on standard error that was not there before."""

    def seen(before: Outcome, after: Outcome) -> None:
        assert (before.status, after.status) == (0, 0), before.err + after.err
        assert words in after.err
        assert words not in before.err

    return seen


def helps(words: str) -> Seen:
    """What cannot be had without it."""

    def seen(before: Outcome, after: Outcome) -> None:
        assert before.status != 0
        assert words in before.err
        assert after.status == 0, after.err
        assert after.pictures

    return seen


def fails(words: str) -> Seen:
    """What cannot be had is one line, and no picture."""

    def seen(before: Outcome, after: Outcome) -> None:
        assert before.status == 0, before.err
        assert after.status != 0
        assert words in after.err
        assert after.pictures == []

    return seen


def fails_otherwise(words: str) -> Seen:
    """Of a server that is no encoder: what cannot be had, and is told in other words."""

    def seen(before: Outcome, after: Outcome) -> None:
        assert before.status != 0
        assert after.status != 0
        assert words in after.err
        assert words not in before.err

    return seen


def asks(name: str, value: str) -> Seen:
    """A server is asked for something else, whatever it answers."""

    def seen(before: Outcome, after: Outcome) -> None:
        assert {body[name] for body in after.asked} == {value}
        assert before.asked
        assert value not in {body[name] for body in before.asked}

    return seen


# ------------------------------------------------------------------ the table

BASE = {
    **{"prompt": "a cat", "seed": 1, "steps": 1, "width": 64, "height": 48},
    **{"model": "{tiny}", "device": "cpu", "dtype": "fp32"},
}
GUIDED = {"guidance": 2.0, "steps": 2}
BLENDED = {"tile_mode": "blend", "tile_overlap": 16}
SEEING = {"model": "{seeing}", "vision_model": "{seeing}/vision"}
SEEN = SEEING | {"reference": ["{files}/seen.png"]}
STARTED = {"image": "{files}/start.png", "steps": 4}
MASKED = STARTED | {"mask": "{files}/mask.png"}
CORNERED = STARTED | {"mask": "{files}/corner.png"}
CONTROLLED = {"control": ["{files}/union:{files}/start.png"], "steps": 2}
LONG = {"prompt": "a cat on a mat " * 20}
WRITTEN = {"model": "{other}", "rewriter": "rewrite-expand", "rewrite_seed": 5, "max_tokens": 8}
ELSEWHERE = {"encoder_url": "{server}"}
ASKED = {**WRITTEN, "rewriter_url": "{server}"}


@dataclass(frozen=True)
class Case:
    """A setting at `value` beside `beside`, against a run without it; or with it where it stands in BASE or beside."""

    name: str
    value: Any
    seen: Seen = pixels
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> dict[str, Any]:
        return BASE | self.beside


CASES = [
    # text
    Case("prompt", "a dog"),
    Case("template", "photo-overcast"),
    Case("system_prompt", "In oil."),
    Case("thinking_content", "Fur."),
    Case("assistant_content", "Here:"),
    Case("force_think_block", True),
    Case("force_think_block", False, beside={"template": "thoughtful", "templates": "{files}/templates"}),
    Case("strip_quotes", True, beside={"prompt": 'say "hi"'}),
    Case("weights_in_prompt", True, beside={"prompt": "a (cat:1.5)"}),
    Case("hidden_layer", -3),
    Case("layer_weights", {-2: 1.0, -3: 0.5}),
    *[Case("long_prompt", mode, beside=LONG) for mode in ("truncate", "interpolate", "pool", "attention_pool")],
    Case("negative", "dogs", beside=GUIDED),
    Case("embeddings", "{files}/two.safetensors", beside={"prompt": None, "embeddings": "{files}/one.safetensors"}),
    # controls
    Case("control", ["{files}/union:{files}/start.png"]),
    Case("control", ["{files}/union:{files}/start.png:0.2"], beside=CONTROLLED),
    Case("control_start", 0.5, beside=CONTROLLED),
    Case("control_end", 0.5, beside=CONTROLLED),
    Case("control_flow", "diffusers", beside=CONTROLLED),
    Case("control_preprocess", "canny", beside=CONTROLLED),
    # references
    Case("reference", ["{files}/seen.png"], beside=SEEING),
    Case("reference", ["{files}/seen.png:0.6"], beside=SEEN),
    Case("reference", ["{files}/one.safetensors"]),
    *[Case("vision_blend", mode, beside=SEEN) for mode in VISION_BLENDS[1:]],
    Case("vision_layer", -1, beside=SEEN),
    Case("vision_tokens", "all", beside=SEEN),
    Case("vision_text", "a cat", beside=SEEN | {"vision_tokens": "all"}),
    Case("vision_model", "{seeing}/vision", helps("as vision_model"), beside=SEEN | {"vision_model": None}),
    Case("vision_mode", "tower", beside=SEEN),
    # sampling
    Case("steps", 2),
    Case("seed", 2),
    Case("guidance", 2.0),
    Case("guidance_method", "cfg_zero", beside=GUIDED),
    Case("guidance_method", "apg:threshold=1", beside=GUIDED | {"guidance_method": "apg"}),
    Case("guidance_method", "slg:layers=1,start=0,stop=1", beside=GUIDED),
    *[Case("sampler", name, beside={"steps": 3}) for name in SAMPLERS[1:]],
    Case("variety", 1.0),
    Case("variation", "2:0.3"),
    Case("shift", 6.0, beside={"steps": 2}),
    Case("nag", 4.0, beside={"steps": 2}),
    *[Case("schedule", name, beside={"steps": 3}) for name in SCHEDULES[1:]],
    Case("preset", "turbo-4", beside={"steps": None}),
    Case("sigmas", "1,0.9,0", beside={"steps": 2}),
    Case("cfg_truncation", 0.0, beside=GUIDED),
    Case("cfg_normalization", 0.5, beside=GUIDED),
    Case("batch_size", 2, differs("batches", [2, 1]), beside={"prompt": ["a", "b", "c"]}),
    # picture
    Case("width", 32, differs("size", (32, 48))),
    Case("height", 32, differs("size", (64, 32))),
    Case("aspect", "3:2", differs("size", (80, 48)), beside={"width": None, "height": None}),
    Case("image", "{files}/start.png", beside={"steps": 4}),
    Case("strength", 0.2, beside=STARTED),
    Case("strength", 0.2, beside={"hires": 2.0, "steps": 4}),
    Case("mask", "{files}/mask.png", beside=STARTED | {"strength": 0.6}),
    Case("mask", "alpha", beside={"image": "{files}/clear.png", "steps": 4}),
    Case("mask_invert", True, beside=MASKED),
    Case("mask_blur", 4.0, beside=CORNERED),
    Case("mask_crop", 0, beside=CORNERED),
    Case("extend", "0,16,7,0", differs("size", (71, 64)), beside=STARTED | {"width": None, "height": None}),
    Case("paste", False, beside=MASKED),
    Case("hires", 2.0, beside={"steps": 4}),
    Case("images", 2, differs("names", ["a-cat-1.png", "a-cat-2.png"])),
    # decoding
    Case("tile_mode", "exact", says("decoded in strips")),
    Case("tile_mode", "blend", beside={"tile_size": 32, "tile_overlap": 16}),
    Case("tile_size", 32, beside=BLENDED),
    Case("tile_overlap", 0, beside=BLENDED | {"tile_size": 32}),
    Case("tile_overlap", 0, beside=BLENDED | {"tile_size": 32, **STARTED}),
    # model
    Case("model", "{other}"),
    Case("dit", "{other}/transformer"),
    Case("text_encoder", "{other}/text_encoder"),
    Case("vae", "{other}/vae"),
    Case("tokenizer", "{files}/tokenizer"),
    Case("variant", "base", beside={"steps": 2, "guidance": 0.0}),
    Case("lora", ["{files}/style.safetensors"]),
    Case("lora", ["{files}/style.safetensors:0.5"], beside={"lora": ["{files}/style.safetensors"]}),
    Case("lora_skip", "text_encoder", helps("--lora-skip"), beside={"lora": ["{files}/both.safetensors"]}),
    Case("lora_folder", "{files}", helps("--lora-folder"), beside={"from": "{files}/styled.png"}),
    # a text encoder elsewhere
    Case("encoder_url", "{server}", fails("/api/captions")),
    Case("encoder_form", "hidden_states", fails_otherwise("/v1/hidden_states"), beside=ELSEWHERE),
    Case("encoder_model", "big", asks("model", "big"), beside=ELSEWHERE | {"encoder_form": "hidden_states"}),
    Case("encoder_dtype", "bf16", asks("dtype", "bfloat16"), beside=ELSEWHERE),
    Case("encoder_timeout", 0.05, fails_otherwise("within 0.05 seconds"), beside={"encoder_url": "{slow}"}),
    # machine
    Case("device", "cuda:99", fails("device 'cuda:99' is not on this machine")),
    Case("text_encoder_device", "cuda:99", fails("text_encoder_device 'cuda:99' is not on this machine")),
    Case("dit_device", "cuda:99", fails("dit_device 'cuda:99' is not on this machine")),
    Case("vae_device", "cuda:99", fails("vae_device 'cuda:99' is not on this machine")),
    Case("dtype", "bf16"),
    Case("attention", "flash2", fails("attention 'flash2' runs on NVIDIA GPUs only, not on cpu; use sdpa")),
    Case("precision", "int8"),
    Case("precision", "fp8"),
    Case("compile", True, differs("compiled", 1)),
    Case("cuda_graphs", True, says("runs without CUDA graphs, since its device is cpu")),
    Case("residency", "stage", says("components loaded one at a time")),
    Case("memory", 0.01, fails("no size fits: set memory")),
    # what is kept, and where one's own things are
    Case("templates", "{files}/templates", beside={"template": "photo-overcast"}),
    Case("cache_folder", "cache", differs("cached", ["one caption"])),
    Case("cache_entries", 0, differs("cached", []), beside={"cache_folder": "cache"}),
    # rewriting
    Case("rewriter", "rewrite-photo", beside=WRITTEN),
    Case("rewriter_url", "{server}", differs("models", ["default"]), beside=WRITTEN),
    Case("rewriter_model", "big", differs("models", ["big"]), beside=ASKED),
    Case(
        "rewriter_timeout", 0.05, fails("did not answer within 0.05 seconds"), beside=ASKED | {"rewriter_url": "{slow}"}
    ),
    Case("rewrite_thinking", True, beside=WRITTEN | {"rewrite_seed": 6, "max_tokens": 12}),
    Case("max_tokens", 3, beside=WRITTEN),
    Case("rewrite_seed", 6, beside=WRITTEN),
    Case("temperature", 5.0, beside=WRITTEN),
    Case("top_p", 0.1, beside=WRITTEN),
    Case("top_k", 2, beside=WRITTEN),
    Case("min_p", 0.9, beside=WRITTEN),
    Case("presence_penalty", 2.0, beside=WRITTEN),
]

# `gen`'s own options, and where what they do is seen.
OWN = {
    "sampler_name": "sampling/test_spellings.py::test_samplers_as_others_write_them",
    "scheduler": "sampling/test_spellings.py::test_schedules_as_others_write_them",
    "cfg": "sampling/test_spellings.py::test_guidance_counted_from_one",
    "cfg_scale": "sampling/test_spellings.py::test_guidance_counted_from_one",
    "size": "sampling/test_sizes.py::test_size_is_width_and_height",
    "named_prompts": "sampling/test_spellings.py::test_prompts_may_be_an_option",
    "each": "test_from.py::test_words_without_quotes_are_one_prompt",
    "prompt_file": "test_cli.py::test_prompts_from_standard_input_and_files",
    "picture": "test_cli.py::test_png_carries_settings_and_from_gives_the_same_pixels",
    "output": "test_cli.py::test_patterns_folders_and_many_images",
    "server": "serve/test_gen_server.py::test_pictures_are_saved_as_they_come_bit_for_bit",
    "gpus": "parallel/test_launch.py::test_pictures_are_those_of_one_rank",
    "cfg_parallel": "parallel/test_leader.py::test_guidance_on_two_halves",
    "save_state": "test_resume.py::test_the_state_is_written_before_the_first_step",
    "resume": "test_resume.py::test_every_setting_comes_from_the_state",
    "config": "test_flags.py::test_a_line_in_a_file_does_something",
    "profile": "test_config.py::test_gen_and_info_take_their_settings_from_the_file",
    "as_json": "test_cli.py::test_json_result_holds_every_setting",
    "verbose": "test_cli.py::test_the_plan_is_printed_before_loading",
    "quiet": "test_flags.py::test_quiet_leaves_the_names_alone",
}


def test_the_table_is_complete():
    """A new setting needs a case, a new option of `gen` a test of its own."""
    assert {case.name for case in CASES} == {name for settings in ALL_SETTINGS for name in settings.names()}
    assert {option.name for option in gen.params} == {case.name for case in CASES} | OWN.keys()
    for place in OWN.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8")


# ------------------------------------------------------------------ running


@pytest.fixture(scope="module")
def places(tiny_folder, seeing_folder, tmp_path_factory):
    """What stands in the table in braces."""
    folder = tmp_path_factory.mktemp("flags")
    parts = (Qwen3.from_config(tiny.QWEN), ZImageDiT.from_config(tiny.DIT), AutoencoderKL.from_config(tiny.KL))
    encoder, dit, vae = (tiny.randomised(part, seed) for seed, part in enumerate(parts, 11))
    states = [part.state_dict() for part in (tiny.talkative(encoder), dit, vae)]
    other = tiny.write_model(folder / "other", *states, tiny.KL)
    _write_files(folder)
    styled = {"lora": [str(folder / "style.safetensors")]}
    assert main(["gen", *options(BASE | styled, {"tiny": tiny_folder}), "-o", str(folder / "styled.png")]) == 0
    slow = chat_server.said("A fine cat.")
    slow.drip = 0.002
    with chat_server.serving(chat_server.said("A fine cat.")) as server, chat_server.serving(slow) as slow_server:
        yield {
            **{"tiny": tiny_folder, "seeing": seeing_folder, "other": other, "files": folder, "asked": server.asked},
            **{"server": server.url, "slow": slow_server.url},
        }


def _write_files(folder: Path) -> None:
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(folder / "start.png")
    Image.radial_gradient("L").resize((96, 80)).convert("RGB").save(folder / "seen.png")
    Image.linear_gradient("L").resize((64, 48)).rotate(180).save(folder / "mask.png")
    corner = Image.new("L", (64, 48))
    corner.paste(255, (0, 0, 8, 8))
    corner.save(folder / "corner.png")
    clear = Image.new("RGBA", (64, 48), "red")
    clear.paste((0, 0, 0, 0), (0, 0, 20, 20))
    clear.save(folder / "clear.png")
    style = lora_files.NAMINGS["kohya"](lora_files.factors([lora_files.ONE]))
    lora_files.write(folder / "style.safetensors", style)
    lora_files.write(folder / "both.safetensors", style | {"lora_te_x.lora_down.weight": torch.ones(1)})
    for i, name in enumerate(("one", "two")):
        caption = torch.randn(5, tiny.QWEN["hidden_size"], generator=torch.Generator().manual_seed(i))
        save_embeddings(folder / f"{name}.safetensors", caption, {}, "")
    control_nets.write(
        folder / "union", "2.1", n_refiner_layers=1, control_layers_places=[0, 1], control_refiner_layers_places=[0]
    )
    (folder / "templates").mkdir()
    for name, keys in (("photo-overcast", ""), ("thoughtful", "add_think_block: true\n")):
        text = f"---\nname: {name}\ndescription: Mine\ncategory: photo\n{keys}---\nMine.\n"
        (folder / "templates" / f"{name}.md").write_text(text, encoding="utf-8")
    tokenizer = json.loads(tiny.tokenizer().to_str())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: 255 - i for word, i in words.items()}  # the same words by other numbers
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


@pytest.fixture(scope="module")
def opened():
    """Opens each model once: half of a tiny render's time."""
    models = {}

    def call(path: Any, settings: LoadSettings, default: Path, elsewhere: Sequence[str] = ()) -> ModelFiles:
        named = [getattr(settings, name) for name in ("dit", "text_encoder", "vae", "tokenizer", "variant")]
        key = (path, *named, *elsewhere)
        if key not in models:
            models[key] = open_model(path, settings, default, elsewhere)
        return models[key]

    return call


@pytest.fixture
def run(places, opened, tmp_path, monkeypatch, capsys):
    """A command line in a folder of its own; whatever it does is noted."""
    calls, compiled, count = [], [], iter(range(99))
    denoise = denoising.denoise_steps
    monkeypatch.setattr("zimage.pipeline.open_model", opened)
    monkeypatch.setattr("zimage.loading.residency.compile_blocks", compiled.append)
    monkeypatch.setattr(denoising, "denoise_steps", lambda *a: calls.append(len(a[3].noise)) or denoise(*a))

    def call(*arguments: str, settings: str | None = None, environment: tuple[str, str] | None = None) -> Outcome:
        for notes in (calls, compiled, places["asked"]):
            notes.clear()
        folder = tmp_path / str(next(count))
        folder.mkdir()
        monkeypatch.chdir(folder)
        if settings:
            (folder / "settings.toml").write_text(settings, encoding="utf-8")
            arguments = ("--config", "settings.toml", *arguments)
        with monkeypatch.context() as patch:
            patch.setenv(*environment or ("NOTHING", ""))
            status = main(["gen", "-v", *arguments])
        pictures = {}
        for path in sorted(folder.glob("*.png")):
            with Image.open(path) as image:
                pictures[path.name] = (image.size, image.tobytes())
        cached = ["one caption" for _ in folder.glob("cache/*.safetensors")]
        seen = (list(pictures.values()), list(pictures), cached, list(calls), len(compiled), list(places["asked"]))
        return Outcome(status, capsys.readouterr().err, *seen)

    return call


@pytest.fixture(scope="module")
def plain():
    """Runs without the setting in question, by their arguments."""
    return {}


@pytest.fixture
def check(places, run, plain):
    """See to it that a case's second run differs from its first, which is the same however the setting is given."""

    def call(case: Case, second: dict[str, Any], **elsewhere: Any) -> None:
        key = repr(case.before)
        if key not in plain:
            plain[key] = run(*options(case.before, places))
        case.seen(plain[key], run(*options(second, places), **elsewhere))

    return call


def filled(value: Any, places: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [filled(item, places) for item in value]
    for name in places if isinstance(value, str) else ():
        value = value.replace(f"{{{name}}}", str(places[name]))
    return value


def options(values: dict[str, Any], places: dict[str, Any]) -> list[str]:
    """A command line of settings."""
    arguments = []
    for name, value in values.items():
        flag, value = "--" + name.replace("_", "-"), filled(value, places)
        if name == "prompt":
            arguments += ["--each", *value] if isinstance(value, list) else [value] if value else []
        elif isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-"))
        elif isinstance(value, dict):
            arguments += [flag, ",".join(f"{layer}:{weight}" for layer, weight in value.items())]
        elif value is not None:
            for item in value if isinstance(value, list) else [value]:
                arguments += [flag, str(item)]
    return arguments


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{layer} = {weight}" for layer, weight in value.items()) + "}"
    return json.dumps(value)


def named(case: Case) -> str:
    return f"{case.name}={case.value}"


ONCE = {case.name: case for case in reversed(CASES)}.values()  # of each setting the first case
IN_A_FILE = [case for case in ONCE if not FIELDS[case.name].metadata["per_call"]]
IN_THE_ENVIRONMENT = [case for case in CASES if FIELDS[case.name].metadata["env"]]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_an_option_does_something(check, case):
    check(case, {**case.before, case.name: case.value})


@pytest.mark.parametrize("case", IN_A_FILE, ids=named)
def test_a_line_in_a_file_does_something(check, places, case):
    line = f"{case.name} = {toml(filled(case.value, places))}"
    check(case, {**case.before, case.name: None}, settings=f"[default]\n{line}\n")


@pytest.mark.parametrize("case", IN_THE_ENVIRONMENT, ids=named)
def test_a_variable_does_something(check, places, case):
    variable = FIELDS[case.name].metadata["env"]
    check(case, {**case.before, case.name: None}, environment=(variable, filled(case.value, places)))


def test_quiet_leaves_the_names_alone(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = []
    for more in ([], ["-q"]):
        assert main(["gen", *options(BASE, places), *more]) == 0
        said.append(capsys.readouterr())
    assert "seed 1" in said[0].err
    assert (said[1].out, said[1].err) == ("a-cat-1-2.png\n", "")
