"""The pipeline on a tiny random model: same bits however it is called, events, residency, defaults, refusals."""

import logging
import threading

import pytest
import torch
from PIL import ImageChops

import zimage
from zimage import flow
from zimage.captioner import exhausted
from zimage.errors import CheckpointError, NonFiniteError, RequestError

SIZE = {"width": 64, "height": 48}


def pixels(result) -> list[bytes]:
    return [image.tobytes() for image in result.images]


def test_same_bits_alone_in_a_batch_and_at_any_place(pipe):
    prompts = ["a cat", "a much longer prompt about two dogs in the rain", "x"]
    batch = pipe.generate(prompts, seed=[5, 6, 7], steps=3, **SIZE)
    for prompt, seed, image in zip(prompts, (5, 6, 7), batch.images, strict=True):
        alone = pipe.generate(prompt, seed=seed, steps=3, **SIZE).images[0]
        assert ImageChops.difference(alone, image).getbbox() is None
    assert pixels(pipe.generate(prompts[::-1], seed=[7, 6, 5], steps=3, **SIZE))[::-1] == pixels(batch)


def test_padded_batches_agree_to_rounding(pipe):
    noise = torch.cat([flow.start_noise(seed, 16, 6, 8) for seed in (1, 2)])
    captions = pipe.encode(["a cat", "a much longer prompt about two dogs in the rain"])
    together = pipe.denoise(captions, noise, steps=3)
    apart = torch.cat([pipe.denoise(captions[i : i + 1], noise[i : i + 1], steps=3) for i in range(2)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4 * float(apart.abs().max()))


def test_stages_compose_to_generate(pipe):
    captions = pipe.encode(["a cat"])
    latents = pipe.denoise(captions, flow.start_noise(3, 16, 6, 8), steps=4)
    image = zimage.pictures.image.to_pil(pipe.decode(latents))[0]
    assert image.tobytes() == pixels(pipe.generate("a cat", seed=3, steps=4, **SIZE))[0]


def test_captions_from_elsewhere_draw_the_same_bits_without_a_text_encoder(tiny_folder):
    request = zimage.Request(prompt=["a cat", "a dog"], seed=3, width=64, height=32, steps=2, guidance=2.0)
    with_encoder, without = (zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32") for _ in range(2))
    job = with_encoder.prepare(request)
    conditions = exhausted(with_encoder.conditions(job))
    assert with_encoder.loaded == ("text_encoder",)
    sent = zimage.Job.from_dict(job.to_dict())
    drawn = [event.image for event in without.run(sent, conditions=conditions) if event.image]
    assert "text_encoder" not in without.loaded
    whole = [event.image for event in with_encoder.run(job) if event.image]
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in whole]


def test_seeds_count_up_within_a_prompt_and_match_single_renders(pipe):
    result = pipe.generate("a cat", seed=10, images=3, steps=1, **SIZE)
    assert result.seeds == [10, 11, 12]
    assert len(set(pixels(result))) == 3
    assert pixels(pipe.generate("a cat", seed=12, steps=1, **SIZE))[0] == pixels(result)[2]


def test_a_seed_is_drawn_and_reported_when_absent(pipe):
    first, second = (pipe.generate("a cat", steps=1, **SIZE) for _ in range(2))
    assert first.seeds != second.seeds
    assert pixels(pipe.generate("a cat", steps=1, seed=first.seeds[0], **SIZE)) == pixels(first)


def test_events_tell_every_step_in_order(pipe):
    request = zimage.Request(prompt=["a", "b"], steps=2, seed=1, **SIZE)
    events = [(e.stage, e.step, e.index) for e in pipe.run(request) if e.stage != "load"]
    encode = [("encode", s, i) for i in range(2) for s in (0, 1)]
    denoise = [("denoise", s, i) for i in range(2) for s in (0, 1, 2)]
    decode = [("decode", s, i) for i in range(2) for s in (0, 1)]
    assert events == encode + denoise + decode


@pytest.mark.parametrize("steps", [1, 8, 9])
def test_a_step_is_one_evaluation(pipe, steps, monkeypatch):
    calls, velocity = [], pipe.dit.velocity
    monkeypatch.setattr(pipe.dit, "velocity", lambda *a: calls.append(1) or velocity(*a))
    pipe.generate("a", seed=1, steps=steps, **SIZE)
    assert len(calls) == steps
    pipe.generate("a", seed=1, steps=steps, guidance=2.0, **SIZE)
    assert len(calls) == 3 * steps


def test_the_shift_bends_the_schedule(pipe):
    usual, same, other = (pipe.generate("a", seed=1, steps=4, shift=s, **SIZE) for s in (None, 3.0, 6.0))
    assert usual.request.shift == 3.0
    assert pixels(usual) == pixels(same) != pixels(other)


def test_closing_the_generator_cancels_and_lets_go(tiny_folder, monkeypatch):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", residency="stage")
    run = pipe.run(zimage.Request(prompt="a", steps=50, seed=1, **SIZE))
    steps = next(e.step for e in run if e.stage == "denoise" and e.step == 2)
    run.close()
    assert steps == 2
    assert not pipe.loaded
    assert not [t for t in threading.enumerate() if t.name == "zimage-prefetch"]


@pytest.mark.parametrize(("residency", "most"), [("stage", 1), ("keep", 3)])
def test_residency_bounds_what_is_loaded(tiny_folder, residency, most):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", residency=residency)
    held = [len(pipe.loaded) for _ in pipe.run(zimage.Request(prompt="a", steps=1, seed=1, **SIZE))]
    assert max(held) == most
    assert len(pipe.loaded) == (0 if residency == "stage" else 3)


def test_stages_called_one_by_one_let_go_of_one_another(tiny_folder):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", residency="stage")
    captions = pipe.encode(["a"])
    assert list(pipe.loaded) == ["text_encoder"]
    pipe.decode(pipe.denoise(captions, flow.start_noise(1, 16, 4, 4), steps=1))
    assert list(pipe.loaded) == ["vae"]


def test_each_stage_loads_once_per_request(tiny_folder):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", residency="stage")
    request = zimage.Request(prompt=["a", "b", "c"], steps=1, seed=1, guidance=2.0, **SIZE)
    loads = [e.detail for e in pipe.run(request) if e.stage == "load" and e.step == 1]
    assert loads == ["text_encoder", "dit", "vae"]


def test_several_threads_render_the_same_bits(pipe):
    expected = pixels(pipe.generate("a cat", seed=1, steps=2, **SIZE))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(pixels(pipe.generate("a cat", seed=1, steps=2, **SIZE))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_guidance_negative_truncation_and_normalization_each_change_the_picture(pipe):
    base = {"prompt": "a cat", "seed": 1, "steps": 4, **SIZE}
    variants = [
        {},
        {"guidance": 3.0},
        {"guidance": 3.0, "negative": "a dog"},
        {"guidance": 3.0, "cfg_truncation": 0.2},
        {"guidance": 3.0, "cfg_normalization": 0.5},
        {"shift": 6.0},
        {"steps": 5},
    ]
    rendered = [pixels(pipe.generate(**{**base, **v}))[0] for v in variants]
    assert len(set(rendered)) == len(variants)
    off = pixels(pipe.generate(**base, guidance=3.0, cfg_truncation=0.0))[0]
    assert off != rendered[0], "the first step, 1 − σ = 0, is still guided"


def test_defaults_follow_the_checkpoint(tiny_folder):
    turbo = zimage.ZImage.load(tiny_folder)
    r = turbo.prepare(zimage.Request(prompt="a")).request
    assert (r.width, r.height, r.steps, r.guidance, r.shift, r.negative) == (64, 64, 8, 0.0, 3.0, None)
    turbo.model.shift = 6.0
    r = turbo.prepare(zimage.Request(prompt="a")).request
    assert (r.steps, r.guidance, r.shift, r.negative) == (30, 4.0, 6.0, "")


def test_metadata_is_enough_to_render_again(pipe):
    result = pipe.generate(["a", "b"], seed=4, images=2, steps=2, **SIZE)
    again = pipe.generate(**result.metadata[3]["request"])
    assert pixels(again)[0] == pixels(result)[3]


def test_timings_cover_every_stage(pipe):
    assert set(pipe.generate("a", seed=1, steps=1, **SIZE).timings) == {"load", "encode", "denoise", "decode"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 1000}, "width 1000 is not a multiple of 16; nearest 992 or 1008"),
        ({"height": 16_400}, "height 16400 is too large; the maximum is 16384"),
        ({"width": -16}, "too small"),
        ({"steps": 0}, "steps 0 is too small; the minimum is 1"),
        ({"steps": 2.5}, "should be of type int"),
        ({"seed": "x"}, "should be of type int"),
        ({"seed": [1, 2]}, "the list has 2; pass one seed"),
        ({"guidance": float("nan")}, "guidance is not a number"),
        ({"shift": 0.0}, "must be above 0"),
        ({"guidance": 0.0, "negative": "a dog"}, "no effect at guidance 0"),
        ({"negative": "a dog"}, "no effect at guidance 0"),
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"prompt": []}, "the list is empty"),
        ({"prompt": [3]}, "should be of type str"),
        ({"prompt": None}, "a value is needed"),
        ({"prompt": "a \udcff cat"}, "not valid text"),
        ({"width": 16_384, "height": 16_384, "images": 1024, "batch_size": 1024}, "GB are free"),
    ],
)
def test_bad_requests_are_refused_in_one_line_before_loading(tiny_folder, settings, words):
    pipe = zimage.ZImage.load(tiny_folder, residency="keep")
    with pytest.raises(RequestError) as refusal:
        pipe.generate(**{"prompt": "a", **settings})
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not pipe.loaded


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "tpu"}, "device 'tpu' is not known"),
        ({"device": "cuda:99"}, "is not on this machine"),
        ({"dtype": "int3"}, "is not known"),
        ({"residency": "never"}, "use auto, keep, stage"),
    ],
)
def test_bad_loading_settings_are_refused(tiny_folder, arguments, words):
    with pytest.raises(RequestError, match=words):
        zimage.ZImage.load(tiny_folder, **arguments)


def test_a_caption_past_the_trained_range_warns_and_runs(pipe, caplog):
    logger = logging.getLogger("zimage")
    logger.propagate = True
    with caplog.at_level("WARNING", logger="zimage"):
        result = pipe.generate("word " * 60, seed=1, steps=1, **SIZE)
    assert "trained for at most 224" in caplog.text
    assert len(result.images) == 1


def test_a_side_past_the_trained_range_warns_and_runs(pipe, caplog):
    logging.getLogger("zimage").propagate = True
    with caplog.at_level("WARNING", logger="zimage"):
        result = pipe.generate("a", seed=1, steps=1, width=1040, height=16)
    assert "a side of 1040 px is past the 1024 px" in caplog.text
    assert result.images[0].size == (1040, 16)


def test_nan_weights_are_named(tiny_folder):
    for part, weight in (
        ("text_encoder", "model.layers.0.mlp.up_proj.weight"),
        ("dit", "layers.0.attention.to_q.weight"),
        ("vae", "decoder.conv_in.weight"),
    ):
        pipe = zimage.ZImage.load(tiny_folder, dtype="fp32", residency="keep")
        module = getattr(pipe, part)
        with torch.no_grad():
            module.get_parameter(weight)[0] = float("nan")
        with pytest.raises(NonFiniteError, match=weight):
            pipe.generate("a", seed=1, steps=1, **SIZE)


def test_a_render_changes_no_setting_of_pytorch(tiny_folder):
    """A host program's own stand, and fp32 means fp32: no TF32, unless the host has chosen it."""

    def settings():
        return {
            "matmul": torch.get_float32_matmul_precision(),
            "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
            "fp16 sums": torch.backends.cuda.matmul.allow_fp16_accumulation,
            "bf16 sums": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
            "sdp": tuple(getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "math", "cudnn")),
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "gradients": torch.is_grad_enabled(),
            "random": torch.get_rng_state().tolist(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    before = settings()
    assert before["matmul"] == "highest"
    for load in ({"dtype": "fp32"}, {"dtype": "bf16", "precision": "int8", "attention": "sdpa-math"}):
        pipe = zimage.ZImage.load(tiny_folder, device="cpu", **load)
        pipe.generate("a", steps=1, guidance=2.0, tile_mode="exact", **SIZE)
    assert settings() == before


def test_a_missing_folder_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder"):
        zimage.ZImage.load(tmp_path / "nowhere")


def test_where_the_whole_does_not_fit_strips_decode_the_same_picture(tiny_folder, monkeypatch):
    """Chosen when the request is resolved, and recorded, so that the same request gives the same pixels elsewhere."""
    whole = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32")
    request = whole.prepare(zimage.Request("a", seed=1, width=64, height=64, steps=1)).request
    assert request.tile_mode == "off"
    weights = sum(sizes.weights for sizes in whole.planner.sizes.values())
    monkeypatch.setattr("zimage.loading.planner.available_memory", lambda device: 2 * weights + 1_000_000)
    tight = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", residency="keep")
    assert tight.prepare(zimage.Request("a", width=1024, height=1024), must_fit=False).plan.tile_mode == "exact"
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr("zimage.loading.planner.available_memory", lambda device: 0)
    torch.testing.assert_close(tight.decode(latents), whole.decode(latents, tile_mode="off"), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"tile_mode": "strips"}, {"tile_size": 8}, {"tile_size": 100}, {"tile_mode": "blend", "tile_overlap": 512}],
    ids=str,
)
def test_unusable_tile_settings_are_refused(settings):
    with pytest.raises(RequestError, match="tile_"):
        zimage.Request("a", **settings)
