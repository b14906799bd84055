"""The `parameters` text of our pictures, read back and by sd-parsers; and those that other programs wrote."""

import copy
import json
import re

import pytest
import sd_parsers
from PIL import Image

from zimage.pictures.files import read_metadata, read_settings, save
from zimage.pictures.foreign import CFG
from zimage.pictures.parameters import parameters_text, parse_parameters
from zimage.pictures.texts import UNICODE, comment_bytes, read_texts
from zimage.settings.sampling import SAMPLERS, SCHEDULES

EXIF, COMMENT = 0x8769, 0x9286
LORA = {"name": "style.safetensors", "scale": 0.8, "hash": "0123456789abcdef"}
RECORD = {
    "version": "0.1.0",
    "request": {
        "prompt": "a cat",
        "negative": None,
        "width": 1024,
        "height": 768,
        "steps": 8,
        "seed": 7,
        "guidance": 0.0,
        "shift": 3.0,
        "strength": None,
        "hires": None,
    },
    "model": {"name": "Z-Image-Turbo", "fingerprint": "abcdef0123456789"},
    "lora": [],
}
PROMPTS = [
    "a cat",
    "猫 🐈 on a mat",
    "one line\nand another",
    "Negative prompt: dogs",
    "a cat\nNegative prompt: dogs\nNegative prompt: more",
    "the words Negative prompt: within a line",
    "Steps: 3, Sampler: DPM, CFG scale: 9, Seed: 5",
    "a list\nSteps: one, two",
    'quotes " and \\ and , and : everywhere',
]


def record(**request) -> dict:
    changed = copy.deepcopy(RECORD)
    changed["request"] |= request
    return changed


def last_line(text: str) -> str:
    return text.split("\n")[-1]


def picture() -> Image.Image:
    return Image.new("RGB", (16, 16), "red")


# ------------------------------------------------------------------ our own


def test_the_text_of_a_plain_picture():
    assert parameters_text(RECORD).split("\n") == [
        "a cat",
        "Steps: 8, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Seed: 7, Size: 1024x768, Model: Z-Image-Turbo, "
        "Model hash: abcdef0123456789, Shift: 3, Version: zimage 0.1.0",
    ]


def test_loras_stand_in_the_prompt_and_with_their_hashes():
    full = {**RECORD, "lora": [LORA, {"name": "a: b, <c>.safetensors", "scale": -1.0, "hash": "fedcba9876543210"}]}
    text = parameters_text(full)
    assert text.startswith("a cat <lora:style:0.8> <lora:a b c:-1>\n")
    assert 'Lora hashes: "style: 0123456789abcdef, a b c: fedcba9876543210"' in last_line(text)
    found = parse_parameters(text)
    assert (found.values["prompt"], found.loras) == ("a cat", ("style:0.8", "a b c:-1"))


def test_strength_and_passes_are_told_as_that_form_does():
    assert "Denoising strength: 0.6, " in parameters_text(record(strength=0.6))
    even = last_line(parameters_text(record(strength=0.6, hires=2.0)))
    assert "Size: 512x384, " in even, "the first pass's"
    assert "Denoising strength: 0.6, Hires upscale: 2, Hires steps: 8, Hires upscaler: Lanczos, " in even
    assert "Hires resize" not in even
    uneven = last_line(parameters_text(record(strength=0.6, hires=1.7)))
    assert "Size: 608x448, " in uneven
    assert "Hires upscale: 1.7, " in uneven
    assert "Hires resize: 1024x768, " in uneven


@pytest.mark.parametrize("name", ["plain", "with, comma", "a: b", 'with "quotes", too', '"quoted"', "\\"])
def test_values_with_signs_of_the_form_are_quoted(name):
    text = parameters_text({**RECORD, "model": {"name": name, "fingerprint": "f00"}})
    assert ('"' in last_line(text)) == (name != "plain" and name != "\\")
    found = parse_parameters(text)
    assert found.values == parse_parameters(parameters_text(RECORD)).values, "nothing is shifted"


@pytest.mark.parametrize("hires", [None, 2.0, 1.7654321])
@pytest.mark.parametrize("negative", [None, *PROMPTS])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_is_written_is_read_again(prompt, negative, hires):
    full = record(prompt=prompt, negative=negative, guidance=1.2345678, hires=hires, strength=hires and 0.45)
    values = parse_parameters(parameters_text({**full, "lora": [LORA]})).values
    expected = {name: value for name, value in full["request"].items() if value is not None}
    assert values.pop(CFG) == pytest.approx(expected.pop("guidance") + 1, abs=1e-9)
    assert values.pop("negative") == (negative or "")
    expected.pop("negative", None)
    assert values == expected


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("negative", [None, *PROMPTS[3:5]])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_another_program_reads_it_in_every_format(tmp_path, suffix, prompt, negative, monkeypatch):
    # It keeps the last picture's text by its id(), which another picture may have after it.
    monkeypatch.setattr("sd_parsers.extractors._jpeg_usercomment._image_id", None)
    full = {**record(prompt=prompt, negative=negative, guidance=1.5, strength=0.5), "lora": [LORA]}
    path = save(picture(), tmp_path / f"a.{suffix}", full, replace=False)
    read = sd_parsers.ParserManager().parse(path)
    (sampler,) = read.samplers
    assert (sampler.name, sampler.model.name, sampler.model.hash) == ("Euler", "Z-Image-Turbo", "abcdef0123456789")
    assert sampler.parameters == {"steps": "8", "cfg_scale": "2.5", "seed": "7", "scheduler": "Simple"}
    assert (read.metadata["Size"], read.metadata["Denoising strength"]) == ("1024x768", "0.5")
    assert [_visible(p.value) for p in sampler.prompts] == [f"{prompt} <lora:style:0.8>"]
    assert [_visible(p.value) for p in sampler.negative_prompts] == ([negative] if negative else [])
    assert read_metadata(path) == full, "our own settings stand beside it"


def _visible(text: str) -> str:
    return text.replace("\u200b", "")


@pytest.mark.parametrize(("letters", "both"), [(3000, True), (9000, False)])
def test_a_jpeg_without_room_for_both_keeps_our_own_settings(tmp_path, letters, both):
    full = record(prompt="猫" * letters)
    for suffix in ("jpg", "webp", "png"):
        texts = read_texts(save(picture(), tmp_path / f"a.{suffix}", full, replace=False))
        assert json.loads(texts.settings) == full
        assert bool(texts.parameters) == (both or suffix != "jpg")


def test_the_room_in_a_jpeg_is_used_up_to_the_last_byte(tmp_path):
    kept = []
    for length in range(21_300, 21_700, 20):
        path = save(picture(), tmp_path / "a.jpg", record(prompt="x" * length), replace=True)
        kept.append(bool(read_texts(path).parameters))
    assert kept == sorted(kept, reverse=True)
    assert set(kept) == {True, False}


# ------------------------------------------------------------------ other programs'


CIVITAI = (
    "a lighthouse at dusk\nNegative prompt: blurry\nSteps: 9, Sampler: Euler, CFG scale: 1, Seed: 123456, "
    "Size: 832x1216, Clip skip: 2, Created Date: 2025-12-01T12:30:00.0000Z, Civitai resources: "
    '[{"type":"checkpoint","modelVersionId":1,"modelName":"Z, Image: Turbo"}], Civitai metadata: {}'
)
FORGE = (
    "a lighthouse, <lora:Ink_v2:0.65> at dusk <lora:plain>\nsecond line\n"
    "Steps: 9, Sampler: DPM++ 2M, Schedule type: Beta, CFG scale: 4.5, Shift: 9, Seed: 0, Size: 512x512, "
    "Model hash: 0123, Model: z_image, Denoising strength: 0.4, Hires upscale: 1.5, Hires steps: 4, "
    'Hires upscaler: Latent, Lora hashes: "Ink_v2: abc, plain: def", Version: f2'
)


def test_what_civitai_keeps():
    found = parse_parameters(CIVITAI)
    assert found.values == {
        "prompt": "a lighthouse at dusk",
        "negative": "blurry",
        "steps": 9,
        "seed": 123456,
        CFG: 1.0,
        "width": 832,
        "height": 1216,
    }
    assert (found.sampler, found.schedule, found.loras, found.by_picture) == ("Euler", "", (), False)


def test_what_forge_writes():
    found = parse_parameters(FORGE)
    expected = {
        "steps": 9,
        "seed": 0,
        CFG: 4.5,
        "shift": 9.0,
        "strength": 0.4,
        "hires": 1.5,
        "width": 768,
        "height": 768,
    }
    assert found.values == {"prompt": "a lighthouse, at dusk\nsecond line", "negative": "", **expected}
    assert (found.sampler, found.schedule) == ("DPM++ 2M", "Beta")
    assert found.loras == ("Ink_v2:0.65", "plain:1")


def test_a_picture_from_a_picture_is_told():
    assert parse_parameters("a cat\nSteps: 9, Sampler: Euler, Seed: 1, Denoising strength: 0.4").by_picture


@pytest.mark.parametrize(
    "text", ["", "a cat", "a: b, c: d, e: f", "Steps: 3, Seed: 4", '{"sui_image_params": {"steps": 8}}']
)
def test_what_holds_no_settings_is_none(text):
    assert parse_parameters(text) is None


def test_lines_behind_the_settings_and_other_line_ends_do_no_harm():
    text = "a cat\r\nNegative prompt: dogs\r\nSteps: 3, Sampler: Euler, Seed: 4\r\n\r\nTemplate: a __cat__\r\n"
    values = parse_parameters(text).values
    assert values == {"prompt": "a cat", "negative": "dogs", "steps": 3, "seed": 4}


@pytest.mark.parametrize(
    "value", ["9" * 5000, "nan", "inf", "-1", "1e999", "x", "", "0x10", "1_000", '"8', "8" + " " * 1000, "٣"]
)
@pytest.mark.parametrize("name", ["Steps", "Seed", "CFG scale", "Size", "Hires upscale", "Hires resize", "Shift"])
def test_values_of_any_kind_are_taken_or_named(tmp_path, name, value):
    """Whatever stands there, the rest is taken and a line says what is not."""
    rest = {"Steps": "3", "Seed": "4", "CFG scale": "2", "Size": "64x64", "Sampler": "Euler", name: value}
    request, note = _of_png(tmp_path, "a cat\n" + ", ".join(f"{n}: {v}" for n, v in rest.items()))
    assert request["prompt"] == "a cat"
    assert len(request) >= 4
    assert len(note) < 2000
    assert note.isprintable()


def _of_png(tmp_path, text: str) -> tuple[dict, str]:
    from PIL import PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    picture().save(tmp_path / "a.png", pnginfo=chunks)
    found, note = read_settings(tmp_path / "a.png")
    return found["request"], note


def test_what_is_taken_and_what_is_not_is_one_line(tmp_path):
    request, note = _of_png(tmp_path, FORGE)
    assert request == {
        "prompt": "a lighthouse, at dusk\nsecond line",
        "steps": 9,
        "seed": 0,
        "guidance": 3.5,
        "shift": 9.0,
        "strength": 0.4,
        "hires": 1.5,
        "width": 768,
        "height": 768,
        "sampler": "dpmpp_2m",
        "schedule": "beta_shifted",
    }
    assert note.endswith(
        "a.png was saved by another program: "
        "prompt, steps, seed, CFG, size, sampler, schedule taken from `parameters`; "
        "its LoRAs are not loaded: Ink_v2:0.65, plain:1; pass them with --lora"
    )
    request, note = _of_png(tmp_path, CIVITAI)
    assert (request["guidance"], "negative" in request) == (0.0, False)
    assert "at CFG 1 the negative prompt has no effect" in note
    request, note = _of_png(tmp_path, "a cat\nSteps: 4, Sampler: Euler, Model: x")
    assert request == {"prompt": "a cat", "steps": 4, "sampler": "euler"}
    assert "not found: seed, CFG, size" in note
    request, note = _of_png(tmp_path, "a\nSteps: 4000, Sampler: Euler, Seed: 99999999999999999999, Size: 1000x1350")
    assert request == {"prompt": "a", "width": 992, "height": 1344, "sampler": "euler"}
    assert "steps 4000 is too large; the maximum is 1000; seed 99999999999999999999 is too large" in note


def test_what_is_not_known_here_is_named(tmp_path):
    text = FORGE.replace("DPM++ 2M,", "DPM++ SDE,").replace("type: Beta", "type: Align Your Steps")
    request, note = _of_png(tmp_path, text)
    assert not {"sampler", "schedule"} & request.keys()
    assert "its sampler DPM++ SDE is not known here, pass --sampler; " in note
    assert "its schedule Align Your Steps is not known here, pass --schedule; " in note


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samplers_and_schedules_are_written_and_read_again(tmp_path, sampler, schedule):
    text = parameters_text(record(sampler=sampler, schedule=schedule))
    assert re.search(r"Sampler: [\w +]+, Schedule type: [A-Z][\w ]+, CFG scale: ", text), "as the web UI has them"
    request, note = _of_png(tmp_path, text)
    assert (request["sampler"], request["schedule"]) == (sampler, schedule)
    assert "not known" not in note


def test_exact_noise_levels_have_no_schedule_by_name():
    text = parameters_text(record(sampler="heun", steps=2, schedule=None, shift=None, sigmas="1,0.5,0"))
    assert "Schedule type" not in text
    assert 'Sigmas: "1,0.5,0", Version' in text


def test_a_negative_prompt_is_kept_where_it_acts(tmp_path):
    assert _of_png(tmp_path, CIVITAI.replace("scale: 1,", "scale: 3,"))[0]["negative"] == "blurry"


COMMENTS = {
    "big end first": comment_bytes(FORGE),
    "little end first": UNICODE + FORGE.encode("utf-16-le"),
    "marked": UNICODE + FORGE.encode("utf-16"),
    "ascii": b"ASCII\0\0\0" + FORGE.encode(),
    "unnamed": bytes(8) + FORGE.encode(),
    "bare": FORGE.encode(),
    "closed": comment_bytes(FORGE) + b"\0\0",
}


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
@pytest.mark.parametrize("form", COMMENTS)
def test_every_form_of_a_comment_is_read(tmp_path, form, suffix):
    exif = Image.Exif()
    exif[EXIF] = {COMMENT: COMMENTS[form]}
    picture().save(tmp_path / f"a.{suffix}", exif=exif)
    assert read_texts(tmp_path / f"a.{suffix}").parameters == FORGE


@pytest.mark.parametrize("order", ["be", "le"])
def test_words_of_any_script_tell_the_order_of_bytes(tmp_path, order):
    text = "灯台の絵" * 50 + "\nSteps: 3, Sampler: Euler, Seed: 4"
    exif = Image.Exif()
    exif[EXIF] = {COMMENT: UNICODE + text.encode(f"utf-16-{order}")}
    picture().save(tmp_path / "a.jpg", exif=exif)
    assert read_texts(tmp_path / "a.jpg").parameters == text
