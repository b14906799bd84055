"""Reference pictures: seen in a stage of their own, mixed into captions, kept, planned, and asked for again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

import zimage
from zimage.captioner import Captioner
from zimage.cli import main
from zimage.errors import CheckpointError, RequestError
from zimage.pictures.files import read_metadata
from zimage.render import seeing
from zimage.render.job import Job
from zimage.render.state import RenderState
from zimage.settings.captions import VISION_BLENDS
from zimage.text import Qwen3, Qwen3VL
from zimage.text.blend import Seen, blend
from zimage.text.chat import seen_text
from zimage.text.embeddings import load_embeddings, save_embeddings
from zimage.text.vision_input import pixels_of

SMALL = {"width": 64, "height": 48, "steps": 2, "seed": 1}
MODES = ("full", "tower")


def picture(seed: int = 1, size: tuple[int, int] = (96, 72)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def load(folder, mode="full", **settings):
    given = {"device": "cpu", "dtype": "fp32", "vision_model": folder / "vision", "vision_mode": mode, **settings}
    return zimage.ZImage.load(folder, **given)


@pytest.fixture(scope="module", params=MODES)
def seer(request, seeing_folder):
    """A pipeline that sees, in either mode."""
    return load(seeing_folder, request.param)


def drawn(pipe, **request) -> bytes:
    return pipe.generate("a cat", **{**SMALL, **request}).images[0].tobytes()


def events(pipe, request) -> list:
    return list(pipe.run(request))


@pytest.fixture
def counted(monkeypatch):
    """The pictures that a vision model has looked at."""
    looked, look = [], Qwen3VL.look
    monkeypatch.setattr(Qwen3VL, "look", lambda self, pictures: looked.extend(pictures) or look(self, pictures))
    return looked


# ------------------------------------------------------------------ what is seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("layer", "tokens", "text"), [(-2, "image", ""), (-1, "all", "a cat"), (-4, "all", "")])
def test_a_picture_is_read_as_the_modules_read_it(seeing_folder, mode, layer, tokens, text):
    """By hand, from the files alone: tower, then the text stack of either model, and the rows that are wanted."""
    vision = Qwen3VL.from_config(tiny.SEEING)
    vision.load_state_dict(load_file(seeing_folder / "vision" / "model.safetensors"))
    encoder = Qwen3.from_config(tiny.SEEING_QWEN)
    encoder.load_state_dict(load_file(seeing_folder / "text_encoder" / "model.safetensors"))
    pixels = pixels_of(picture(), vision.config.pixel_limits(seeing_folder / "vision"))
    with torch.no_grad():
        sight = vision.look([pixels])
        words = tiny.tokenizer(tiny.SEEING_TOKENS).encode(seen_text(text, sight.counts)).ids
        ids = torch.tensor([words])
        state = (vision.text if mode == "full" else encoder)(ids, layer, sight=sight)[0]
    expected = state if tokens == "all" else state[ids[0] == tiny.SEEING["image_token_id"]]
    found = load(seeing_folder, mode).see(picture(), text, layer, tokens)
    assert torch.equal(found, expected)
    assert len(found) == (len(words) if tokens == "all" else 6 * 4)  # 96 × 72 pixels in tokens of 16 × 16: 6 × 4.5


def test_the_modes_see_differently_and_each_layer_too(seeing_folder):
    full, tower = (load(seeing_folder, mode) for mode in MODES)
    seen = [full.see(picture()), tower.see(picture()), full.see(picture(), layer=-1), full.see(picture(2))]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_large_pictures_are_seen_at_about_a_megapixel(seer):
    """No more tokens than a caption has room for: a photo of 12 megapixels has 11,718 otherwise."""
    view = seer.vision.view(seeing.InputPicture.of(Image.new("RGB", (4000, 3000)), lambda given: given), seeing.Look())
    rows, columns = view.grid
    assert 0.97 <= rows * columns * 8**2 / (1 << 20) <= 1
    assert columns / rows == pytest.approx(4 / 3, rel=0.03)


# ------------------------------------------------------------------ the stage


def test_the_vision_model_is_let_go_before_anything_else_is_loaded(seer, counted):
    seer.release()
    seer.cache.clear()
    request = zimage.Request("a cat", reference=[picture(), (picture(2), 0.5), picture()], **SMALL)
    loaded, told = [], set()
    for event in seer.run(request):
        told.add((event.stage, event.step, event.index, event.count))
        if event.stage == "load" and event.step == 1:
            loaded.append(seer.loaded)
    assert len(counted) == 2, "a picture that is named twice is seen once"
    name, steps = seer.vision.component, 2 if seer.vision.mode == "tower" else 1
    assert loaded[0] == (name,)
    assert all(name not in names for names in loaded[1:])
    assert {("see", step, i, 2) for step in (0, steps) for i in (0, 1)} <= told
    assert name not in seer.loaded


def test_each_picture_is_seen_once_for_every_way_of_reading_it(seer, counted):
    seer.cache.clear()
    first = drawn(seer, reference=[picture()])
    again = events(seer, zimage.Request("a cat", reference=[picture()], **SMALL))
    assert len(counted) == 1
    assert "load" not in {event.stage for event in again if event.detail == seer.vision.component}
    assert again[-1].image.tobytes() == first
    drawn(seer, reference=[picture()], vision_blend="adain")
    assert len(counted) == 1, "how it is mixed does not matter"
    for more in ({"vision_layer": -3}, {"vision_tokens": "all"}, {"vision_tokens": "all", "vision_text": "x"}):
        drawn(seer, reference=[picture()], **more)
    assert len(counted) == 4


def test_what_was_seen_outlives_the_process_in_the_folder_of_captions(seeing_folder, tmp_path, counted):
    pixels = []
    for mode in ("full", "full", "tower", "tower"):
        pixels.append(drawn(load(seeing_folder, mode, cache_folder=str(tmp_path)), reference=[picture()]))
    assert len(counted) == 2, "once in each mode"
    assert pixels[0] == pixels[1] != pixels[2] == pixels[3]


def test_what_was_seen_is_forgotten_when_a_config_changes(seeing_folder, tmp_path, counted):
    """The weights and their dates stay: what else a caption depends on is in config.json and beside it."""
    folder = tmp_path / "vision"
    shutil.copytree(seeing_folder / "vision", folder)

    def seen() -> torch.Tensor:
        return load(seeing_folder, vision_model=folder, cache_folder=str(tmp_path / "captions")).see(picture())

    before, config = seen(), json.loads((folder / "config.json").read_text())
    assert torch.equal(seen(), before)
    config["vision_config"]["deepstack_visual_indexes"] = [0, 2, 3]
    (folder / "config.json").write_text(json.dumps(config))
    assert not torch.equal(seen(), before)
    assert len(counted) == 2


def test_without_references_nothing_is_otherwise(seer, seeing_folder):
    plain = zimage.ZImage.load(seeing_folder, device="cpu", dtype="fp32")
    assert drawn(seer) == drawn(plain)
    assert drawn(seer, reference=[(picture(), 0.0)]) == drawn(plain)
    job = seer.prepare(zimage.Request("a cat", **SMALL))
    assert list(job.plan.stages) == ["text_encoder", "dit", "vae"]
    assert "vision" not in seer.metadata(job, 0)
    assert seer.model.fingerprint == plain.model.fingerprint


def test_alpha_0_needs_no_vision_model(seeing_folder):
    plain = zimage.ZImage.load(seeing_folder, device="cpu", dtype="fp32")
    assert drawn(plain, reference=[(picture(), 0.0)]) == drawn(plain)


# ------------------------------------------------------------------ what is mixed


@pytest.mark.parametrize("mode", VISION_BLENDS)
def test_a_render_denoises_the_blended_caption(seer, mode):
    """A render with references is one of the caption that `blend` makes of the parts, saved or not."""
    pictures = [(picture(), 0.3), (picture(2), 0.6)]
    (caption,) = seer.encode("a cat")
    by_hand = blend(caption, [Seen(seer.see(p), alpha) for p, alpha in pictures], mode, seer.texts.limit)
    (encoded,) = seer.encode("a cat", reference=pictures, vision_blend=mode)
    assert torch.equal(encoded, by_hand)
    images = seer.generate(embeddings=by_hand, **SMALL).images
    assert drawn(seer, reference=pictures, vision_blend=mode) == images[0].tobytes()


def test_prompts_are_mixed_and_the_negative_prompt_is_not(seer):
    request = {"reference": [picture()], "guidance": 2.0, "negative": "dogs", **SMALL}
    both = [image.tobytes() for image in seer.generate(["a cat", "a dog"], **request).images]
    assert both == [seer.generate(prompt, **request).images[0].tobytes() for prompt in ("a cat", "a dog")]
    mixed, negative = seer.encode("a cat", reference=[picture()]), seer.encode("dogs")
    noise = zimage.flow.start_noise(1, 16, 6, 8)
    latents = seer.denoise(mixed, noise, steps=2, guidance=2.0, negative=negative)
    found = [e.latents for e in seer.run(zimage.Request("a cat", **request)) if e.latents is not None][-1]
    assert torch.equal(found, latents)


def test_embeddings_take_references_too(seer):
    (caption,) = seer.encode("a cat")
    again = seer.generate(embeddings=caption, reference=[picture()], **SMALL).images[0].tobytes()
    assert again == drawn(seer, reference=[picture()])


def test_saved_captions_stand_in_the_place_of_pictures(seer, seeing_folder, tmp_path):
    save_embeddings(tmp_path / "seen.safetensors", seer.see(picture()), {}, "")
    plain = zimage.ZImage.load(seeing_folder, device="cpu", dtype="fp32")
    found = drawn(plain, reference=[f"{tmp_path}/seen.safetensors:0.5"])
    assert found == drawn(seer, reference=[(picture(), 0.5)])
    assert found == drawn(plain, reference=[(seer.see(picture()), 0.5)])


def test_one_line_tells_what_is_mixed(seer):
    job = seer.prepare(zimage.Request("a cat", reference=[picture()], vision_blend="concat", **SMALL))
    tokens = job.token_counts[0]
    told = f"(24 tokens seen, {tokens} of text: {tokens + 7} in all)"
    assert seer.describe_references(job.request, tokens).endswith(told)


# ------------------------------------------------------------------ jobs, states, metadata


def test_a_job_survives_json_and_refuses_other_pictures(seer, tmp_path):
    picture().save(tmp_path / "a.png")
    job = seer.prepare(zimage.Request("a cat", reference=[f"{tmp_path}/a.png:0.5"], **SMALL))
    plain = json.loads(json.dumps(job.to_dict()))
    again = Job.from_dict(plain)
    assert again.glimpses == job.glimpses
    assert [e.image for e in events(seer, again)][-1].tobytes() == drawn(seer, reference=[(picture(), 0.5)])
    picture(2).save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="not the file that the job was prepared with"):
        Job.from_dict(plain)


def test_a_job_of_another_vision_model_or_mode_is_refused(seeing_folder):
    full, tower = (load(seeing_folder, mode) for mode in MODES)
    job = Job.from_dict(full.prepare(zimage.Request("a cat", reference=[picture()], **SMALL)).to_dict(), _given())
    with pytest.raises(RequestError, match="the job's glimpses are not those that its request has here"):
        events(tower, job)


def _given() -> dict:
    opened = seeing.InputPicture.of(picture(), lambda given: given)
    return {opened.hash: picture()}


def test_interleaved_jobs_do_not_see_each_other(seer):
    requests = [zimage.Request("a cat", reference=[(picture(i), 0.6)], **SMALL) for i in (1, 2)]
    alone = [events(seer, request)[-1].image.tobytes() for request in requests]
    seer.cache.clear()
    seer.release()
    runs, pixels = [seer.run(request) for request in requests], [b"", b""]
    while runs[0] or runs[1]:
        for i, run in enumerate(runs):
            event = next(run, None) if run else None
            runs[i] = run if event else None
            pixels[i] = event.image.tobytes() if event and event.image else pixels[i]
    assert pixels == alone


def test_a_state_is_continued_to_the_same_pixels(seer):
    request = zimage.Request("a cat", reference=[picture()], **SMALL)
    job, state = seer.prepare(request), RenderState()
    for event in seer.run(job):
        state.update(event)
        if event.latents is not None:
            break
    seer.cache.clear()
    assert events(seer, job)[-1].image.tobytes() == list(seer.run(job, state))[-1].image.tobytes()


def test_a_picture_says_what_it_was_made_from_and_what_saw_it(seer):
    job = seer.prepare(zimage.Request("a cat", reference=[picture()], vision_blend="adain", **SMALL))
    told = seer.metadata(job, 0)
    (reference,) = told["request"]["reference"]
    assert (reference["alpha"], len(reference["hash"])) == (0.3, 16)
    assert told["request"]["vision_blend"] == "adain"
    assert told["vision"] == {"name": "vision", "fingerprint": seer.vision.fingerprint, "mode": seer.vision.mode}
    assert "vision" not in told["device"]


# ------------------------------------------------------------------ the plan


def test_concat_counts_in_the_plan(seer):
    """The DiT's tokens are those of the text and of the picture's share, known before anything is loaded."""
    request = {"reference": [(picture(size=(512, 512)), 0.1)], **SMALL}
    plans = {b: seer.prepare(zimage.Request("a cat", vision_blend=b, **request)).plan for b in VISION_BLENDS}
    tokens = {blend: plan.work.tokens for blend, plan in plans.items()}
    text = seer.count_tokens("a cat").tokens
    assert tokens["interpolate"] == tokens["adain"] == text
    assert tokens["concat"] == text + 102  # of 1024
    assert tokens["linear"] == seer.texts.limit
    for blended in ("concat", "linear"):
        (caption,) = seer.encode("a cat", vision_blend=blended, reference=request["reference"])
        assert len(caption) == tokens[blended]
        assert plans[blended].stages["dit"].activations > plans["adain"].stages["dit"].activations
    work = plans["concat"].work
    assert (work.vision_patches, work.vision_tokens) == (4096, len(tiny_ids(1024)))


def tiny_ids(count: int) -> list[int]:
    return tiny.tokenizer(tiny.SEEING_TOKENS).encode(seen_text("", [count])).ids


def test_what_does_not_fit_is_not_looked_at(seeing_folder, counted):
    """Also where nothing is drawn: only a render's plan was held against the memory."""
    pipe = load(seeing_folder, memory=0.01)
    for call in (lambda: pipe.see(picture()), lambda: pipe.encode("a cat", reference=[picture()])):
        with pytest.raises(RequestError, match=r"seeing a picture needs .* GB may be used; set more memory or vis"):
            call()
    assert not counted
    assert not pipe.loaded


def test_where_memory_is_short_the_vision_model_is_alone(seeing_folder):
    for residency, beside in (("keep", 3), ("stage", 0)):
        pipe = load(seeing_folder, residency=residency)
        plan = pipe.prepare(zimage.Request("a cat", reference=[picture()], **SMALL)).plan
        assert next(iter(plan.stages)) == "vision"
        assert len(plan.stages["vision"].beside) == beside
        assert plan.keeps_all == (residency == "keep")
        list(pipe.run(zimage.Request("a cat", reference=[picture()], **SMALL)))
        assert len(pipe.loaded) == beside


@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_are_streamed_see_the_same(seeing_folder, monkeypatch, mode):
    """As if the process itself took nothing, in less memory than the vision model has."""
    for name in ("_held_bytes", "_base_bytes"):
        monkeypatch.setattr(f"zimage.loading.planner.{name}", lambda device: 0)
    request = zimage.Request("a cat", reference=[picture()], **SMALL)
    whole = load(seeing_folder, mode, residency="stage")
    stage = whole.prepare(request).plan.stages[whole.vision.component]
    tight = load(seeing_folder, mode, memory=(stage.peak - stage.weights / 10) / 1e9)
    job = tight.prepare(request, must_fit=False)
    assert job.plan.stages[tight.vision.component].streamed
    assert torch.equal(tight.see(picture()), whole.see(picture()))


PEAK = """
import json, sys
import zimage
from PIL import Image
settings, folder = json.loads(sys.argv[1]), sys.argv[2]
pipe = zimage.ZImage.load(folder, device="cpu", dtype="fp32", vision_model=folder + "/vision", **settings)
seen = Image.effect_noise((400, 448), 64).convert("RGB")
job = pipe.prepare(zimage.Request("a cat", steps=1, width=32, height=32, seed=1, reference=[seen]))
for event in pipe.run(job):
    if event.stage not in ("load", "see"):
        break
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
stages = job.plan.stages
planned = {name: stage.peak for name, stage in stages.items()}
print(json.dumps({"peak": peak, "planned": planned, "weights": stages[pipe.vision.component].weights}))
"""


@pytest.fixture(scope="module")
def larger_folder(tmp_path_factory):
    """Models whose weights and maps stand out of what the process takes anyway."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    qwen = {**tiny.SEEING_QWEN, "hidden_size": 512, "intermediate_size": 2304, "num_hidden_layers": 6}
    qwen |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    vision = {**tiny.SEEING["vision_config"], "hidden_size": 512, "intermediate_size": 2048, "out_hidden_size": 512}
    vision |= {"depth": 6, "num_heads": 8, "deepstack_visual_indexes": [1, 3, 5], "num_position_embeddings": 2304}
    text = {**tiny.SEEING["text_config"], **{k: qwen[k] for k in qwen if k not in ("model_type", "rope_theta")}}
    text |= {"rope_scaling": {"mrope_interleaved": True, "mrope_section": [12, 10, 10]}}
    config = {**tiny.SEEING, "vision_config": vision, "text_config": text}
    dit = {**tiny.DIT, "cap_feat_dim": 512}
    parts = (
        Qwen3.from_config(qwen),
        zimage.dit.ZImageDiT.from_config(dit),
        zimage.vae.AutoencoderKL.from_config(tiny.KL),
    )
    states = [tiny.randomised(part, seed).state_dict() for seed, part in enumerate(parts)]
    tiny.write_model(folder, *states, tiny.KL, dit, text_config=qwen)
    tiny.write_vision(folder / "vision", tiny.randomised(Qwen3VL.from_config(config), 3).state_dict(), config)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM, which Linux counts")
@pytest.mark.parametrize("mode", MODES)
def test_the_peak_of_seeing_is_as_planned(larger_folder, mode):
    arguments = [json.dumps({"vision_mode": mode, "residency": "stage"}), str(larger_folder)]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    names = ["vision"] if mode == "full" else ["vision_tower", "text_encoder"]
    planned = max(found["planned"][name] for name in names)
    assert 0.9 <= found["peak"] / planned <= 1.1, found


# ------------------------------------------------------------------ what cannot be


def fails(folder, words, fields, kind=CheckpointError, **settings):
    with pytest.raises(kind, match=words) as caught:
        load(folder, **settings)
    assert caught.value.fields == fields
    assert "\n" not in str(caught.value)


def test_what_is_missing_and_where_it_is_got(seeing_folder, tiny_folder, tmp_path):
    plain = zimage.ZImage.load(seeing_folder, device="cpu")
    words = r"nothing here sees pictures; pass the folder of Qwen/Qwen3-VL-4B-Instruct \(`hf download"
    for call in (lambda: plain.see(picture()), lambda: plain.generate("a", reference=[picture()], **SMALL)):
        with pytest.raises(RequestError, match=words) as caught:
            call()
        assert caught.value.fields == ("reference", "vision_model")
    field = ("vision_model",)
    fails(seeing_folder, "is neither a folder nor a file; pass the folder of Qwen", field, vision_model=tmp_path / "no")
    fails(seeing_folder, "holds no vision model; pass the folder of Qwen", field, vision_model=tiny_folder)
    fails(seeing_folder, "vision_model: .*; pass the folder of Qwen", field, vision_model=seeing_folder / "vae")
    fails(tiny_folder, r"vision_model: .*no token '<\|image_pad\|>'", field, vision_model=seeing_folder / "vision")


def narrow(folder: Path, **changes) -> Path:
    """A vision model with other values in its config."""
    nested = {name: {**tiny.SEEING[name], **value} for name, value in changes.items() if isinstance(value, dict)}
    config = {**tiny.SEEING, **changes, **nested}
    return tiny.write_vision(folder, tiny.randomised(Qwen3VL.from_config(config), 3).state_dict(), config)


def test_widths_and_tokens_must_fit(seeing_folder, tmp_path):
    field = ("vision_model",)
    wide = narrow(tmp_path / "wide", vision_config={"out_hidden_size": 80}, text_config={"hidden_size": 80})
    words = "vision_model: its {} are 80 wide, and the {} 64; Z-Image takes those of Qwen/Qwen3-VL-4B-Instruct"
    fails(seeing_folder, words.format("captions", "model's"), field, vision_model=wide)
    fails(seeing_folder, words.format("image tokens", "text encoder's"), field, vision_model=wide, mode="tower")
    other = narrow(tmp_path / "other", image_token_id=7)
    fails(seeing_folder, "its pictures are token 7, and the tokenizer has 263", field, vision_model=other)
    few = narrow(tmp_path / "few", text_config={"vocab_size": 200}, image_token_id=7)
    fails(seeing_folder, "the tokenizer's 264 entries exceed its 200", field, vision_model=few)
    strange = tiny.write_vision(tmp_path / "strange", load_file(seeing_folder / "vision" / "model.safetensors"))
    (strange / "preprocessor_config.json").write_text(json.dumps({**tiny.PIXELS, "patch_size": 14}))
    fails(seeing_folder, "vision_model: .*patch_size = 14", field, kind=Exception, vision_model=strange)


def test_the_tower_alone_is_read_by_the_text_encoder(seeing_folder, tmp_path):
    weights = load_file(seeing_folder / "vision" / "model.safetensors")
    tower = {key: value for key, value in weights.items() if key.startswith("model.visual.")}
    folder = tiny.write_vision(tmp_path / "tower", tower)
    fields = ("vision_mode", "vision_model")
    fails(seeing_folder, "vision_mode: full needs a text stack", fields, kind=RequestError, vision_model=folder)
    alone = load(seeing_folder, None, vision_model=folder)
    assert alone.vision.mode == "tower"
    assert torch.equal(alone.see(picture()), load(seeing_folder, "tower").see(picture()))


def test_with_the_text_encoder_elsewhere_tower_is_refused_and_full_works(seeing_folder, tmp_path):
    url = "http://127.0.0.1:9"
    fields = ("vision_mode", "encoder_url")
    fails(
        seeing_folder,
        "vision_mode: with tower the text encoder reads",
        fields,
        RequestError,
        mode="tower",
        encoder_url=url,
    )
    weights = load_file(seeing_folder / "vision" / "model.safetensors")
    tower = {key: value for key, value in weights.items() if key.startswith("model.visual.")}
    folder = tiny.write_vision(tmp_path / "tower", tower)
    fields = ("vision_model", "encoder_url")
    given = {"mode": None, "vision_model": folder, "encoder_url": url}
    fails(seeing_folder, "vision_model: its files hold the vision tower alone", fields, RequestError, **given)
    apart = load(seeing_folder, "full", encoder_url=url)
    assert torch.equal(apart.see(picture()), load(seeing_folder).see(picture()))
    (caption,) = load(seeing_folder).encode("a cat")
    found = apart.generate(embeddings=caption, reference=[picture()], **SMALL).images[0].tobytes()
    assert found == drawn(load(seeing_folder), reference=[picture()])


def test_what_only_encodes_can_see(seeing_folder):
    for mode in MODES:
        pipe = Captioner.load(seeing_folder, "cpu", "fp32", vision_model=seeing_folder / "vision", vision_mode=mode)
        assert torch.equal(pipe.see(picture()), load(seeing_folder, mode).see(picture()))


@pytest.mark.parametrize(
    ("request_", "words", "field"),
    [
        ({"vision_layer": -9}, "vision_layer -9 does not exist; use −[56] to −1", "vision_layer"),
        ({"vision_text": "a hat"}, "vision_text: image tokens come before it .* pass vision_tokens all", "vision_text"),
        (
            {"vision_text": "<|image_pad|>", "vision_tokens": "all"},
            r"vision_text: leave <\|image_pad\|> out of it",
            "vision_text",
        ),
        ({"reference": [Image.new("RGB", (900, 3))]}, "a reference picture of 900×3 cannot be read", "reference"),
        ({"reference": [torch.zeros(3, 63)]}, "is 63 wide; this model takes 64", "reference"),
        ({"vision_blend": "concat", "prompt": "a cat " * 60}, "leaves no room for the picture's", "vision_blend"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_field(seer, request_, words, field):
    with pytest.raises(RequestError, match=words) as caught:
        seer.prepare(zimage.Request(**{"prompt": "a cat", "reference": [picture()], **SMALL, **request_}))
    assert caught.value.fields[0] == field


def test_a_weight_that_is_not_a_number_is_named(seeing_folder, tmp_path):
    weights = load_file(seeing_folder / "vision" / "model.safetensors")
    weights["model.visual.blocks.0.mlp.linear_fc1.weight"][0, 0] = torch.nan
    folder = tiny.write_vision(tmp_path / "broken", weights)
    pipe = load(seeing_folder, vision_model=folder)
    with pytest.raises(zimage.ZImageError, match=r"tower holds NaN .*visual.blocks.0.mlp.linear_fc1.weight"):
        pipe.see(picture())
    assert pipe.loaded == ()


# ------------------------------------------------------------------ the command line


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a", "b"), 1):
        picture(i).save(f"{name}.png")
    return tmp_path


def options(folder, *more):
    return ["--model", str(folder), "--device", "cpu", "--dtype", "fp32", *map(str, more)]


def sees(folder, mode="full"):
    return ("--vision-model", folder / "vision", "--vision-mode", mode)


GEN = ("a cat", "--width", "64", "--height", "48", "--steps", "2", "--seed", "1")


@pytest.mark.parametrize("mode", MODES)
def test_see_saves_what_stands_for_the_picture(seeing_folder, files, capsys, mode):
    assert main(["see", "a.png", *options(seeing_folder, *sees(seeing_folder, mode))]) == 0
    assert capsys.readouterr().out == "a.safetensors\n"
    saved = load_embeddings("a.safetensors")
    assert torch.equal(saved.caption, load(seeing_folder, mode).see(picture(1)))
    assert saved.request["vision"]["mode"] == mode
    assert main(["gen", *GEN, *options(seeing_folder, "--reference", "a.safetensors:0.5", "-o", "one.png")]) == 0
    more = ("--reference", "a.png:0.5", "-o", "two.png")
    assert main(["gen", *GEN, *options(seeing_folder, *sees(seeing_folder, mode), *more)]) == 0
    with Image.open("one.png") as one, Image.open("two.png") as two:
        assert one.tobytes() == two.tobytes()
    assert main(["see", "a.png", *options(seeing_folder, *sees(seeing_folder, mode))]) == 2
    assert "'a.safetensors' exists; pass it with -o to replace it" in capsys.readouterr().err
    assert main(["see", "a.png", "-o", "a.safetensors", *options(seeing_folder, *sees(seeing_folder, mode))]) == 0


def test_encode_saves_the_blended_caption(seeing_folder, files, capsys):
    more = ("--reference", "a.png:0.6", "--reference", "b.png", "--vision-blend", "concat", "-o", "cat.safetensors")
    assert main(["encode", "a cat", *options(seeing_folder, *sees(seeing_folder), *more)]) == 0
    assert "concat: " in capsys.readouterr().err
    saved, pipe = load_embeddings("cat.safetensors"), load(seeing_folder)
    (expected,) = pipe.encode("a cat", reference=[("a.png", 0.6), "b.png"], vision_blend="concat")
    assert torch.equal(saved.caption, expected)
    assert [r["name"] for r in saved.request["reference"]] == ["a.png", "b.png"]
    assert all(len(r["hash"]) == 16 for r in saved.request["reference"])


def test_gen_tells_and_from_asks_again(seeing_folder, files, capsys):
    given = options(seeing_folder, *sees(seeing_folder))
    assert main(["gen", *GEN, *given, "-v", "--reference", "a.png:0.5", "-o", "one.png"]) == 0
    told = capsys.readouterr().err
    assert "vision model  cpu" in told
    assert "interpolate: the picture is resampled to the text's length (24 tokens seen" in told
    assert read_metadata("one.png")["vision"]["mode"] == "full"
    assert main(["gen", "--from", "one.png", *given]) == 2
    assert "pass it with --reference" in capsys.readouterr().err
    assert main(["gen", "--from", "one.png", *given, "--reference", "a.png:0.5", "-o", "two.png"]) == 0
    assert "warning" not in capsys.readouterr().err
    with Image.open("one.png") as one, Image.open("two.png") as two:
        assert one.tobytes() == two.tobytes()
    other = options(seeing_folder, *sees(seeing_folder, "tower"), "--reference", "b.png:0.5", "-o", "three.png")
    assert main(["gen", "--from", "one.png", *other]) == 0
    told = capsys.readouterr().err
    assert "warning: vision was vision" in told
    assert "warning: reference was a.png" in told
    assert main(["gen", "--from", "one.png", *options(seeing_folder), "--reference", "a.png:0.5"]) == 2
    assert "nothing here sees pictures" in capsys.readouterr().err


def test_info_shows_the_vision_model_and_its_stage(seeing_folder, capsys):
    given = ["--device", "cpu", "--dtype", "fp32", *map(str, sees(seeing_folder, "tower"))]
    assert main(["info", str(seeing_folder), "--plan", *given]) == 0
    told = capsys.readouterr().out
    assert "vision_tower  Qwen3VLTower" in told
    assert "vision tower  cpu" in told


def test_a_render_that_was_killed_goes_on_without_being_told_of_its_references(
    seeing_folder, files, monkeypatch, capsys
):
    given = [*options(seeing_folder, *sees(seeing_folder)), "--reference", "a.png:0.5"]
    assert main(["gen", *GEN, *given, "-o", "whole.png"]) == 0
    with monkeypatch.context() as patch:

        def killed(*args):
            raise KeyboardInterrupt

        patch.setattr("zimage.cli.target.Target.save", killed)
        assert main(["gen", *GEN, *given, "-o", "one.png", "--save-state", "state"]) == 130
    assert main(["gen", "--resume", "state"]) == 0, capsys.readouterr().err
    with Image.open("one.png") as one, Image.open("whole.png") as whole:
        assert one.tobytes() == whole.tobytes()
    with monkeypatch.context() as patch:
        patch.setattr("zimage.cli.target.Target.save", killed)
        assert main(["gen", *GEN, *given, "-o", "two.png", "--save-state", "state"]) == 130
    picture(3).save("a.png")
    assert main(["gen", "--resume", "state"]) == 2
    assert "a.png" in capsys.readouterr().err
