"""Variations of a seed: its noise on the arc to that of another, which counts up over the images of a prompt."""

import json

import pytest
import torch
from PIL import Image

from zimage import flow
from zimage.batch.rows import rows_of
from zimage.batch.sources import Source
from zimage.cli import main
from zimage.errors import RequestError
from zimage.settings.declared import Request
from zimage.settings.sampling import MAX_SEED, split_variation

SIZE = {"width": 64, "height": 48, "steps": 2}
SHAPE = (16, 6, 8)


def noises() -> tuple[torch.Tensor, torch.Tensor]:
    return flow.start_noise(3, *SHAPE), flow.start_noise(8, *SHAPE)


# ------------------------------------------------------------------ the formula


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_the_arc_against_a_rotation_in_float64(weight):
    """By another way: turn a towards b, by the share of their angle, in the plane of both."""
    a, b = (x.double().flatten() for x in noises())
    along = a / a.norm()
    across = b - (b @ along) * along
    across /= across.norm()
    angle = torch.atan2(b @ across, b @ along) * weight
    turned = along * torch.cos(angle) + across * torch.sin(angle)
    torch.testing.assert_close(flow.slerp(along, b / b.norm(), weight), turned, rtol=0, atol=1e-12)
    wide = (x.double() for x in noises())  # of their own lengths, and in fp32
    torch.testing.assert_close(flow.slerp(*noises(), weight), flow.slerp(*wide, weight).float(), rtol=0, atol=1e-6)


def test_ends_are_the_noises_themselves_and_between_them_lies_noise():
    a, b = noises()
    assert torch.equal(flow.slerp(a, b, 0), a)
    assert torch.equal(flow.slerp(a, b, 1), b)
    wide = flow.start_noise(1, 16, 64, 64), flow.start_noise(2, 16, 64, 64)
    for weight in (0.1, 0.3, 0.5):
        assert abs(flow.slerp(*wide, weight).std() - 1) < 0.01  # a mean would have 0.71 in the middle


@pytest.mark.parametrize("factor", [1, -1])
def test_noises_without_an_arc_are_mixed_on_a_line(factor):
    a, _ = noises()
    torch.testing.assert_close(flow.slerp(a, factor * a, 0.25), (0.75 + 0.25 * factor) * a)


# ------------------------------------------------------------------ requests


def latents(pipe, **settings) -> list[torch.Tensor]:
    job = pipe.prepare(Request.from_mapping({"prompt": "a cat", **SIZE, **settings}))
    events = [event for event in pipe.run(job) if event.latents is not None and event.step == event.total]
    return [x for event in events for x in event.latents.split(1)]


def test_a_run_starts_from_the_arc(pipe):
    (caption,) = pipe.encode(["a cat"])
    (found,) = latents(pipe, seed=3, variation="8:0.3")
    expected = pipe.denoise([caption], flow.slerp(*noises(), 0.3), steps=2)
    assert torch.equal(found, expected)
    assert torch.equal(latents(pipe, seed=3, variation="8:0")[0], latents(pipe, seed=3)[0])
    assert torch.equal(latents(pipe, seed=3, variation="8:1")[0], latents(pipe, seed=8)[0])


def test_of_several_images_the_seed_stays_and_the_other_counts_up(pipe):
    request = Request(prompt=["a", "b"], images=2, seed=[3, 5], variation="8:0.3")
    assert request.seeds == [3, 3, 5, 5]
    assert request.variations == [(8, 0.3), (9, 0.3), (8, 0.3), (9, 0.3)]
    assert Request(images=2, seed=[3, 4], variation=f"{MAX_SEED}:0.3").variations == [(MAX_SEED, 0.3), (0, 0.3)]
    several = latents(pipe, seed=3, images=2, variation="8:0.3")
    singles = [latents(pipe, seed=3, variation=f"{seed}:0.3")[0] for seed in (8, 9)]
    assert all(torch.equal(one, other) for one, other in zip(several, singles, strict=True))


@pytest.mark.parametrize("text", ["8", "8:", ":0.3", "8:1.1", "8:-0.1", "8:nan", "-2:0.3", "8.5:0.3", "8:0.3:1", ""])
def test_what_is_no_variation_is_refused(text):
    with pytest.raises(RequestError, match="should be SEED:WEIGHT") as caught:
        Request(variation=text)
    assert caught.value.fields == ("variation",)


def test_an_open_seed_is_drawn_once(pipe):
    first, second = (pipe.prepare(Request(prompt="a", seed=1, variation="-1:0.25", **SIZE)).request for _ in range(2))
    assert first.variation != second.variation
    assert first.variations[0][0] >= 0
    assert first.variations[0][1] == 0.25


def test_a_picture_carries_its_own_and_comes_again(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["gen", "a cat", "--model", str(tiny_folder), "--dtype", "fp32", "--seed", "3", "--variation", "8:0.3"]
    size = ["--width", "64", "--height", "48", "--steps", "2"]
    assert main([*given, *size, "-n", "2", "-o", "{index}.png", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [image["request"]["variation"] for image in said["images"]] == ["8:0.3", "9:0.3"]
    assert main(["gen", "--from", "2.png", "--model", str(tiny_folder), "--dtype", "fp32", "-o", "again.png"]) == 0
    assert "seed 3, variation 9:0.3" in capsys.readouterr().err
    assert Image.open("again.png").tobytes() == Image.open("2.png").tobytes() != Image.open("1.png").tobytes()


def test_rows_of_a_batch_are_single_variations(tmp_path):
    row = {"prompt": "a cat", "seed": 3, "images": 2, "variation": "8:0.3"}
    values = [one.request for one in rows_of([Source("line 1", row)], {}, tmp_path)]
    assert [(one["seed"], one["variation"], one["images"]) for one in values] == [(3, "8:0.3", 1), (3, "9:0.3", 1)]
    with pytest.raises(RequestError, match="pass the seed"):
        rows_of([Source("line 1", {**row, "seed": None})], {}, tmp_path)


def test_an_open_variation_of_a_row_follows_from_its_id(tmp_path):
    row = {"prompt": "a cat", "seed": 3, "images": 2, "variation": "-1:0.25"}
    first, again = ([one.request["variation"] for one in rows_of([Source("line 1", row)], {}, tmp_path)] for _ in "ab")
    assert first == again
    found = [split_variation(text) for text in first]
    assert all(0 <= seed < 2**32 and weight == 0.25 for seed, weight in found)
    assert found[0] != found[1]
    assert Request(**row).variations == [(-1, 0.25)] * 2
