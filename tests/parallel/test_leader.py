"""Jobs that rank 0 leads and the others follow: whatever a request asks for, the pictures are those of one rank.

Latents: the largest error over the largest value is at most 1e-5 in fp32. Pictures differ by a level at most.
"""

import control_nets
import leading
import lora_files
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from renders import WIDE
from tiny import relative_error

from zimage.errors import RequestError, ZImageError
from zimage.settings.sampling import SAMPLERS

LIMIT = 1e-5
SIZE = {"width": 64, "height": 48, "steps": 3, "seed": 1}
PLAIN = {**SIZE, "prompt": "a cat"}


@pytest.fixture(scope="module")
def settings(wide_folder):
    return {"path": str(wide_folder)}


def same(ours: list[leading.Drawn], plain: list[leading.Drawn]) -> None:
    assert len(ours) == len(plain)
    for several, one in zip(ours, plain, strict=True):
        assert len(several.latents) == len(one.latents)
        for left, right in zip(several.latents, one.latents, strict=True):
            assert relative_error(left, right) <= LIMIT
        assert len(several.pictures) == len(one.pictures) > 0
        for left, right in zip(several.pictures, one.pictures, strict=True):
            levels = [np.frombuffer(bits, dtype=np.uint8).astype(int) for bits in (left, right)]
            assert abs(levels[0] - levels[1]).max() <= 1


def alone(settings, requests) -> list[leading.Drawn]:
    pipe = leading.load(settings)
    return [leading.collected(pipe.run(leading.Request.from_mapping(request))) for request in requests]


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode) if channels == 1 else Image.fromarray(pixels, mode)


def half_mask() -> Image.Image:
    mask = Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 32, 48))
    return mask


def transparent(tmp_path) -> str:
    image = picture(3, "RGBA")
    image.putalpha(half_mask().point(lambda level: 255 - level))
    image.save(tmp_path / "transparent.png")
    return str(tmp_path / "transparent.png")


def requests(wide_folder, tmp_path) -> dict[str, dict]:
    """Pictures come as objects, which have no path: the other ranks can only have them from the first."""
    nets = str(wide_folder / "nets" / "2.1")
    caption = torch.randn(20, tiny.QWEN["hidden_size"], generator=torch.Generator().manual_seed(1))
    return {
        "prompts of unequal lengths in a batch, with guidance": {
            **SIZE, "prompt": ["a cat", "a much longer prompt than that of a cat, with a dog, a horse and a house"],
            "images": 2, "batch_size": 3, "guidance": 3.0, "negative": "blurred", "cfg_truncation": 0.7,
        },
        "captions that vary, in a batch": {**PLAIN, "prompt": ["a cat", "a dog"], "batch_size": 2, "variety": 1.0},
        "weights in prompts": {
            **PLAIN, "prompt": ["a (cat:1.3)", "a cat"], "weights_in_prompt": True, "guidance": 2.0,
            "negative": "(x:2) y",
        },
        "variations": {**PLAIN, "images": 2, "batch_size": 2, "variation": "5:0.4"},
        "NAG away from a longer caption": {**PLAIN, "nag": 4.0, "negative": "a dog " * 20},
        "two passes": {**PLAIN, "hires": 1.5, "control": [(nets, picture(2))]},
        "a picture": {**PLAIN, "image": picture(1), "strength": 0.7},
        "a picture, in strips": {**PLAIN, "image": picture(1), "strength": 0.7, "tile_mode": "exact", "tile_size": 32},
        "a mask": {**PLAIN, "image": picture(1), "mask": half_mask(), "strength": 0.8},
        "a mask in the picture": {**PLAIN, "image": transparent(tmp_path), "mask": "alpha", "strength": 0.8},
        "a control": {**PLAIN, "control": [(nets, picture(2), 0.9)]},
        "a control and a mask": {
            **PLAIN, "image": picture(1), "mask": half_mask(), "control": [(nets, picture(2))], "strength": 0.9,
        },
        "embeddings": {**SIZE, "embeddings": caption, "reference": [(caption, 0.4)]},
    }  # fmt: skip


def test_every_kind_of_request(pool, settings, wide_folder, tmp_path):
    given = requests(wide_folder, tmp_path)
    plain = dict(zip(given, alone(settings, given.values()), strict=True))
    found, *loaded = pool.run(3, leading.led, settings, leading.draw, list(given.values()))
    for name, drawn in zip(given, found, strict=True):
        same([drawn], [plain[name]])
    assert all("text_encoder" not in names for names in loaded)


@pytest.mark.parametrize("size", [2, 4])
def test_guidance_on_two_halves(pool, settings, size):
    """And without guidance, all ranks share each evaluation."""
    guided = {**PLAIN, "guidance": 3.0, "steps": 4, "cfg_truncation": 0.7}
    methods = ("apg:threshold=3,momentum=0.5", "slg:layers=1,start=0,stop=1")
    given = [{**guided, "images": 2}, PLAIN, *({**guided, "guidance_method": method} for method in methods)]
    found, *_ = pool.run(size, leading.led_in_halves, settings, leading.draw, given)
    same(found, alone(settings, given))


def test_halves_are_for_guidance_alone(pool, settings):
    """NAG has its negative prompt within one evaluation, which all ranks then share."""
    away = {**PLAIN, "negative": "a dog"}
    given = [PLAIN, {**away, "nag": 4.0}, {**away, "guidance": 3.0}, {**away, "guidance": 3.0, "nag": 4.0}]
    found, _ = pool.run(2, leading.led_in_halves, settings, leading.draw_listening, given)
    assert [("patches" in kinds, "guidance" in kinds) for kinds in found] == [(True, False)] * 2 + [(False, True)] * 2


@pytest.mark.parametrize("lead", [leading.led, leading.led_in_halves], ids=["together", "in halves"])
def test_every_sampler(pool, settings, lead):
    """Guided at first, two images in a batch; every rank draws the same noise."""
    guided = {**PLAIN, "steps": 4, "guidance": 2.0, "cfg_truncation": 0.5, "images": 2, "batch_size": 2}
    given = [{**guided, "sampler": name} for name in SAMPLERS]
    found, *_ = pool.run(2, lead, settings, leading.draw, given)
    same(found, alone(settings, given))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    shapes = lora_files.linear_shapes(control_nets.dit(**WIDE))
    generator, tensors = torch.Generator().manual_seed(7), {}
    for path in (path for path in shapes if path.startswith("layers")):
        rows, columns = shapes[path]
        tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
        tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
    return lora_files.write(tmp_path_factory.mktemp("loras") / "every.safetensors", tensors)


def test_streamed_block_by_block(pool, settings, lora):
    """Each rank by its own plan, as tight as it gets."""
    given = {**settings, "lora": [f"{lora}:0.7"]}
    found, _ = pool.run(2, leading.led_tightly, given, leading.draw_streamed, PLAIN)
    same(found, alone(given, [PLAIN]))


@pytest.mark.parametrize("more", [{"residency": "stage"}, {"precision": "int8"}], ids=str)
def test_ways_of_loading(pool, settings, lora, more):
    """Stage by stage, and quantised, with an adapter."""
    given = {**settings, "lora": [f"{lora}:0.7"], **more}
    found, *_ = pool.run(2, leading.led, given, leading.draw, [PLAIN])
    same(found, alone(given, [PLAIN]))
    assert relative_error(found[0].latents[0], alone(settings, [PLAIN])[0].latents[0]) > 1e-3


# ------------------------------------------------------------------ what a consumer does


def test_a_run_that_is_closed_leaves_the_ranks_ready(pool, settings):
    request = {**PLAIN, "images": 2, "image": picture(1), "strength": 0.7}
    events = len(list(leading.load(settings).run(leading.Request.from_mapping(request))))
    found, *_ = pool.run(3, leading.led, settings, leading.cancel, request, range(0, events + 1, 2))
    same(found, alone(settings, [request]))


@pytest.mark.parametrize("sampler", ["euler", "unipc", "er_sde"])
def test_a_run_goes_on_from_any_state_to_the_same_bits(pool, settings, sampler):
    request = {**PLAIN, "images": 2, "hires": 1.5, "sampler": sampler}
    found, *_ = pool.run(2, leading.led, settings, leading.resume, request)
    whole, *_ = pool.run(2, leading.led, settings, leading.draw, [request])
    assert all(map(torch.equal, found[0].latents, whole[0].latents))
    assert found[0].pictures == whole[0].pictures


def test_one_job_after_the_other(pool, settings):
    found, *_ = pool.run(2, leading.led, settings, leading.interleave, PLAIN)
    assert found == "the ranks are at a job; run one job after the other, before the leader is closed"


def test_an_error_of_the_consumer_lets_the_ranks_go(pool, settings):
    with pytest.raises(ZImageError, match="the disk is full"):
        pool.run(2, leading.led, settings, leading.raise_midway, PLAIN)
    found, *_ = pool.run(2, leading.led, settings, leading.draw, [PLAIN])  # the same processes
    same(found, alone(settings, [PLAIN]))


def test_what_cannot_be_divided_is_refused(pool, settings):
    with pytest.raises(RequestError, match="needs an even number of ranks"):
        pool.run(3, leading.led_in_halves, settings, leading.draw, [PLAIN])
    few = {"path": None}  # the demo has six heads
    with pytest.raises(RequestError, match="cannot be divided over"):
        pool.run(5, leading.led, few, leading.draw, [PLAIN])


# ------------------------------------------------------------------ memory


def test_a_rank_is_planned_with_its_share_of_the_work(pool, settings):
    request = {**PLAIN, "width": 4096, "height": 4096, "tile_mode": "exact"}
    plain = leading.load(settings).prepare(leading.Request.from_mapping(request)).plan.stages
    found, *_ = pool.run(4, leading.led, settings, leading.plans, request)
    halved, *_ = pool.run(4, leading.led_in_halves, settings, leading.plans, request)
    assert found["dit"] == plain["dit"].activations / 4
    assert halved["dit"] == plain["dit"].activations / 2
    assert found["vae"] < 0.6 * plain["vae"].activations
    assert found["ranks"] == halved["ranks"] == 4


def test_afterwards_a_pipeline_is_planned_alone(pool, settings):
    plain = leading.load(settings).prepare(leading.Request.from_mapping(PLAIN)).plan.stages
    assert pool.run(2, leading.afterwards, settings, PLAIN) == [(plain["dit"].activations, 1)] * 2
