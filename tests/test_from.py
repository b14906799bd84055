"""`gen --from`: our own pictures whatever is in them, other programs' texts, ComfyUI's graphs."""

import copy
import json
import os
import random
import time

import pytest
from fuzz import pictures
from PIL import Image, PngImagePlugin

from zimage.cli import main
from zimage.errors import RequestError, ZImageError
from zimage.pictures.comfyui import parse_graph
from zimage.pictures.files import read_metadata, read_settings
from zimage.pictures.foreign import CFG
from zimage.settings.names import named

QUICK = ["--steps", "1", "--width", "64", "--height", "48", "--dtype", "fp32", "--device", "cpu"]


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


PLAIN = {  # ComfyUI's own template for Z-Image-Turbo
    "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    "8": node("VAEDecode", samples=["3", 0], vae=["17", 0]),
    "3": node(
        "KSampler",
        seed=7,
        steps=9,
        cfg=1.0,
        sampler_name="res_multistep",
        scheduler="simple",
        denoise=1.0,
        model=["11", 0],
        positive=["6", 0],
        negative=["33", 0],
        latent_image=["13", 0],
    ),
    "6": node("CLIPTextEncode", text="a lighthouse", clip=["18", 0]),
    "33": node("ConditioningZeroOut", conditioning=["6", 0]),
    "11": node("ModelSamplingAuraFlow", shift=3.0, model=["28", 0]),
    "13": node("EmptySD3LatentImage", width=832, height=1216, batch_size=1),
    "28": node("LoraLoaderModelOnly", lora_name="ink.safetensors", strength_model=0.8, model=["16", 0]),
    "16": node("UNETLoader", unet_name="z_image_turbo_bf16.safetensors", weight_dtype="default"),
}
ADVANCED = {
    "1": node(
        "SamplerCustomAdvanced",
        noise=["2", 0],
        guider=["3", 0],
        sampler=["4", 0],
        sigmas=["5", 0],
        latent_image=["6", 0],
    ),
    "2": node("RandomNoise", noise_seed=8),
    "3": node("CFGGuider", model=["7", 0], positive=["8", 0], negative=["9", 0], cfg=4.5),
    "4": node("KSamplerSelect", sampler_name="euler"),
    "5": node("BasicScheduler", scheduler="simple", steps=20, denoise=1.0, model=["7", 0]),
    "6": node("EmptySD3LatentImage", width=["10", 0], height=["10", 1], batch_size=1),
    "10": node("ResolutionPicker", width=512, height=["11", 0]),
    "11": node("PrimitiveInt", value=768),
    "7": node("UNETLoader", unet_name="z_image.safetensors"),
    "8": node("CLIPTextEncode", text=["12", 0], clip=["13", 0]),
    "12": node("PrimitiveStringMultiline", value="a harbour"),
    "9": node("CLIPTextEncode", text="blurry", clip=["13", 0]),
}


def values(graph: dict) -> dict:
    return parse_graph(json.dumps(graph)).values


def changed(graph: dict, key: str, **inputs) -> dict:
    graph = copy.deepcopy(graph)
    graph[key]["inputs"] |= inputs
    return graph


# ------------------------------------------------------------------ ComfyUI's graphs


def test_the_usual_graph():
    found = parse_graph(json.dumps(PLAIN))
    numbers = {"steps": 9, "seed": 7, CFG: 1.0, "width": 832, "height": 1216, "shift": 3.0}
    assert found.values == {"prompt": "a lighthouse", "negative": "", **numbers}
    assert (found.sampler, found.schedule, found.loras) == ("res_multistep", "simple", ("ink.safetensors:0.8",))
    assert not found.by_picture


def test_a_graph_of_many_small_nodes():
    assert values(ADVANCED) == {
        "prompt": "a harbour",
        "negative": "blurry",
        "steps": 20,
        "seed": 8,
        CFG: 4.5,
        "width": 512,
        "height": 768,
    }
    basic = {**ADVANCED, "3": node("BasicGuider", model=["7", 0], conditioning=["8", 0])}
    assert values(basic)[CFG] == 1, "it has nothing to steer away from"
    assert values(basic)["prompt"] == "a harbour"


def test_other_samplers_text_nodes_and_wrappings():
    advanced = changed(PLAIN, "3", noise_seed=5)
    del advanced["3"]["inputs"]["seed"]
    advanced["3"]["class_type"] = "KSamplerAdvanced"
    assert values(advanced)["seed"] == 5
    guided = {**PLAIN, "40": node("FluxGuidance", guidance=3.5, conditioning=["6", 0])}
    assert values(changed(guided, "3", positive=["40", 0]))["prompt"] == "a lighthouse"
    control = {**PLAIN, "40": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["41", 0], strength=1.0)}
    control["41"] = node("CLIPTextEncode", text="bad")
    both = values(changed(control, "3", positive=["40", 0], negative=["40", 1]))
    assert (both["prompt"], both["negative"]) == ("a lighthouse", "bad")
    several = changed(PLAIN, "28", lora_1={"on": True, "lora": "a.safetensors", "strength": 1.0}, lora_2={"on": False})
    del several["28"]["inputs"]["lora_name"]
    assert parse_graph(json.dumps(several)).loras == ("a.safetensors:1.0",)


@pytest.mark.parametrize(
    ("node_of", "found"),
    [
        (node("KSamplerSelect", sampler_name="res_multistep"), "res_multistep"),
        (node("SamplerER_SDE", max_stage=3), "ER_SDE"),
        (node("SamplerEulerAncestral", eta=1.0), "EulerAncestral"),
    ],
)
def test_samplers_that_are_nodes(node_of, found):
    graph = {**ADVANCED, "4": node_of, "5": node("KarrasScheduler", steps=20, rho=7.0)}
    read = parse_graph(json.dumps(graph))
    assert (read.sampler, read.schedule, read.values["steps"]) == (found, "Karras", 20)
    assert named(read.sampler, read.schedule).unknown == {}


def test_of_two_passes_the_first_is_taken():
    second = {**PLAIN, "50": node("LatentUpscale", width=1664, height=2432, samples=["3", 0])}
    second = {"2": copy.deepcopy(PLAIN["3"]), **second}
    second["2"]["inputs"] |= {"latent_image": ["50", 0], "steps": 4, "denoise": 0.5}
    assert (values(second)["steps"], values(second)["width"]) == (9, 832)


def test_a_graph_that_starts_from_a_picture_says_so():
    graph = {**PLAIN, "13": node("VAEEncode", pixels=["60", 0]), "60": node("LoadImage", image="cat.png")}
    found = parse_graph(json.dumps(graph))
    assert found.by_picture
    assert "width" not in found.values
    unknown = parse_graph(json.dumps({**PLAIN, "13": node("LatentOfMyOwn", ratio="2:3")}))
    assert not unknown.by_picture


@pytest.mark.parametrize(
    "text", ["", "a cat", "{", "[]", "{}", '{"3": 4}', '{"3": {"class_type": 1, "inputs": []}}', "[" * 9999, "9" * 9999]
)
def test_what_is_no_graph_is_none(text):
    assert parse_graph(text) is None


def test_circles_and_far_links_end():
    for key in PLAIN:
        for name in [n for n, value in PLAIN[key]["inputs"].items() if isinstance(value, list)]:
            for target in PLAIN:
                parse_graph(json.dumps(changed(PLAIN, key, **{name: [target, 0]})))
    chain = {str(i): node("ConditioningSetArea", conditioning=[str(i + 1), 0]) for i in range(100, 20_000)}
    started = time.process_time()
    assert "prompt" not in values({**PLAIN, **chain, "3": changed(PLAIN, "3", positive=["100", 0])["3"]})
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "value", [None, True, "x", -1, 1e300, float("nan"), 2**63, [], ["3"], ["3", 0, 0], [["3"], 0], {}]
)
def test_inputs_of_any_kind_are_taken_or_named(tmp_path, value):
    for key in PLAIN:
        for name in PLAIN[key]["inputs"]:
            graph = changed(PLAIN, key, **{name: value})
            try:
                request, note = read_settings(write(tmp_path / "a.png", prompt=json.dumps(graph)))
            except RequestError:
                assert name in ("positive", "steps"), "it is no sampler any more"
                continue
            assert note.isprintable()
            assert set(request["request"]) >= {"steps"} if name != "steps" else True


# ------------------------------------------------------------------ whole pictures


def write(path, **chunks):
    """A small picture with these text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text)
    Image.new("RGB", (64, 48), "red").save(path, pnginfo=info)
    return path


def test_our_own_settings_are_preferred(tmp_path):
    ours = json.dumps({"request": {"prompt": "ours"}})
    path = write(
        tmp_path / "a.png", zimage=ours, parameters="theirs\nSteps: 3, Seed: 1, Size: 8x8", prompt=json.dumps(PLAIN)
    )
    assert read_settings(path) == ({"request": {"prompt": "ours"}}, "")


def test_texts_behind_the_pixels_are_read(tmp_path):
    path = write(tmp_path / "a.png", parameters="a cat\nSteps: 3, Seed: 1, Size: 64x48")
    data = path.read_bytes()
    start = data.index(b"tEXt") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    tail = data.index(b"IEND") - 4
    path.write_bytes(data[:start] + data[end:tail] + data[start:end] + data[tail:])
    assert read_settings(path)[0]["request"]["prompt"] == "a cat"


@pytest.mark.parametrize("tag", [0x010F, 0x0110])
def test_comfyui_in_webp(tmp_path, tag):
    exif = Image.Exif()
    exif[tag] = f"prompt:{json.dumps(PLAIN)}"
    Image.new("RGB", (64, 48)).save(tmp_path / "a.webp", exif=exif)
    assert read_settings(tmp_path / "a.webp")[0]["request"]["prompt"] == "a lighthouse"


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 10_000,
        '{"request": {"seed": ' + "9" * 5000 + "}}",
        '{"request": {"seed": 1, "seed": 2}}',
        "{",
        "no",
        "[1]",
    ],
    ids=["deep", "digits", "twice", "cut", "words", "list"],
)
def test_damaged_settings_are_one_line(tmp_path, text):
    with pytest.raises(RequestError, match=r"a\.png: its text 'zimage' ") as error:
        read_metadata(write(tmp_path / "a.png", zimage=text))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("key", ["zimage", "parameters", "prompt"])
def test_texts_without_end_are_refused_before_they_are_parsed(tmp_path, key):
    path, started = write(tmp_path / "a.png", **{key: "x" * 6_000_000}), time.process_time()
    with pytest.raises(RequestError, match=f"its text '{key}' has 6,000,000 characters"):
        read_settings(path)
    assert time.process_time() - started < 1


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run `gen` in an empty folder; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, quick=QUICK):
        status = main(["gen", *quick, "--model", str(tiny_folder), *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def saved(tiny_folder, tmp_path_factory):
    """A picture of ours."""
    path = tmp_path_factory.mktemp("ours") / "one.png"
    assert main(["gen", "a cat", "-q", *QUICK, "--model", str(tiny_folder), "--seed", "7", "-o", str(path)]) == 0
    return path


@pytest.fixture
def ours(saved):
    """The settings that it carries."""
    return read_metadata(saved)


def test_another_programs_picture_is_rendered(run, tmp_path):
    for name, chunks in {
        "a.png": {"parameters": "a cat <lora:ink:0.5>\nSteps: 2, Sampler: Euler, Seed: 7, CFG scale: 2.5, Size: 64x48"},
        "c.png": {"prompt": json.dumps(changed(PLAIN, "13", width=64, height=48))},
    }.items():
        write(tmp_path / name, **chunks)
        status, _, err = run("--from", name, "-o", f"out-{name}", quick=QUICK[6:])
        assert status == 0, err
        assert err.startswith(f"{name} was saved by another program: prompt, steps, seed, CFG, size, sampler"), err
        assert "its LoRAs are not loaded: ink" in err
    run(
        "a cat",
        "--seed",
        "7",
        "--steps",
        "2",
        "--guidance",
        "1.5",
        "-o",
        "same.png",
        quick=["--width", "64", "--height", "48", *QUICK[6:]],
    )
    pixels = [Image.open(tmp_path / name).tobytes() for name in ("out-a.png", "same.png")]
    assert pixels[0] == pixels[1]
    assert read_metadata(tmp_path / "out-c.png")["request"]["steps"] == 9


def test_options_override_another_programs_picture(run, tmp_path):
    write(
        tmp_path / "a.png", parameters="a cat\nNegative prompt: dogs\nSteps: 2, Sampler: Euler, Seed: 7, CFG scale: 3"
    )
    assert run("--from", "a.png", "--guidance", "0", "--seed", "9", "-o", "b.png")[0] == 0
    request = read_metadata(tmp_path / "b.png")["request"]
    assert (request["guidance"], request["negative"], request["seed"], request["prompt"]) == (0, None, 9, "a cat")


def test_a_picture_without_settings_says_whose_are_read(run, tmp_path):
    write(tmp_path / "a.png")
    status, out, err = run("--from", "a.png")
    assert (status, out) == (2, "")
    assert err == (
        "error: a.png carries no settings of a render; "
        "pass a picture as it was saved by this program, AUTOMATIC1111's web UI or ComfyUI\n"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ["a", "b"]),
        ("prompt", 5),
        ("prompt", "\ud800"),
        ("seed", [1]),
        ("seed", 1.5),
        ("seed", True),
        ("seed", -2),
        ("images", 10_000),
        ("steps", "8"),
        ("steps", 10**9),
        ("guidance", {}),
        ("guidance", float("nan")),
        ("width", 1000),
        ("layer_weights", {"x": 1}),
        ("layer_weights", {"-2": "1"}),
        ("long_prompt", ["none"]),
        ("image", "a.png"),
        ("image", {"name": 1}),
        ("embeddings", [1]),
        ("negative", "x" * 110_000),
        ("prompt", "x" * 300_000),
        ("\x1b]0;owned\x07", 1),
        ("steps", "\x1b[2J"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_a_setting_does_not_take_is_one_line_with_the_pictures_name(run, tmp_path, ours, name, value):
    ours["request"][name] = value
    write(tmp_path / "made.png", zimage=json.dumps(ours))
    before, started = set(os.listdir(tmp_path)), time.process_time()
    status, out, err = run("--from", "made.png")
    assert (status, out) == (2, "")
    assert err.startswith("error: made.png")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert len(err) < 400
    assert time.process_time() - started < 2
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("value", [5, "\x1b]0;owned\x07" * 500, [[[1]]], {"hash": {}}, None, [{"hash": "x"}]], ids=str)
def test_facts_of_any_kind_are_at_most_a_warning(run, tmp_path, ours, value):
    facts = {name: value for name in (*ours, "files", "note", "rewritten") if name not in ("request", "lora")}
    write(tmp_path / "made.png", zimage=json.dumps({**ours, **facts}))
    status, _, err = run("--from", "made.png", "-o", "x.png")
    assert status == 0, err
    assert "\x1b" not in err
    assert max(map(len, err.splitlines())) < 600


# ------------------------------------------------------------------ prompts and notes


@pytest.mark.parametrize(
    ("arguments", "prompts"),
    [
        (["a", "cat"], ["a cat"]),
        (["cat", "dog", "--each"], ["cat", "dog"]),
        (["a cat", "a dog"], ["a cat", "a dog"]),
        (["a cat", "dog"], ["a cat dog"]),
        (["a cat", "dog", "--each"], ["a cat", "dog"]),
        (["cat", "--each"], ["cat"]),
        (["cat "], ["cat "]),
        (["cat ", "dog"], ["cat  dog"]),
    ],
)
def test_words_without_quotes_are_one_prompt(run, tmp_path, arguments, prompts):
    status, out, err = run(*arguments, "--seed", "1")
    assert status == 0
    drawn = [read_metadata(tmp_path / name)["request"]["prompt"] for name in out.split()]
    assert drawn == prompts
    joined = len([a for a in arguments if a != "--each"]) > 1 and len(prompts) == 1
    note = f"one prompt: {prompts[0]} (quote prompts, or pass --each, for one per argument)"
    assert (err.splitlines()[0] == note) == joined, err


def test_standard_input_is_one_prompt_alone(run):
    for arguments in (["-", "dog"], ["-", "-", "--each"]):
        status, _, err = run(*arguments)
        assert (status, err) == (2, "error: - reads the prompt from standard input; pass it alone\n")


def test_guidance_1_on_turbo_is_explained(run):
    note = "guidance 1 runs the model twice per step; ComfyUI's CFG 1, which is off, is --guidance 0"
    for arguments, said in {("--guidance", "1"): True, ("--guidance", "2"): False, (): False}.items():
        assert (note in run("a cat", *arguments)[2].splitlines()) == said
    assert note not in run("a cat", "--guidance", "1", "-q")[2]


def test_mutated_pictures_and_texts_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "ROUNDS", 2)
    ended, longest = {"read": 0, "refused": 0}, 0.0
    for name, call in pictures.cases(random.Random(5), tmp_path):
        if not name.endswith("gen"):
            started, said = time.process_time(), ""
            try:
                call()
            except ZImageError as error:
                said = str(error)
            ended["refused" if said else "read"] += 1
            assert said.isprintable(), name
            longest = max(longest, time.process_time() - started)
    assert min(ended.values()) > 500, ended
    assert longest < 10
