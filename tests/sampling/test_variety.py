"""Variety between seeds: captions that differ in the first steps, the same ones however an image is drawn."""

import itertools

import pytest
import torch
from PIL import Image

import zimage
from zimage import flow
from zimage.errors import RequestError
from zimage.render.state import StateFile, load_state
from zimage.settings.declared import Request

SIZE = {"width": 64, "height": 48}
LIKE_ALONE = 1e-5  # a batch multiplies other shapes: largest error over largest value


def caption(rows: int = 40, columns: int = 64) -> torch.Tensor:
    return 60 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)) + 3


# ------------------------------------------------------------------ the formula


@pytest.mark.parametrize("variety", [0.5, 1.0, 3.0])
def test_half_of_the_entries_move_within_bounds(variety):
    plain = caption(400, 256)
    moved = (flow.varied(plain, 7, variety) - plain).double()
    bound = variety / 3 * plain.double().std(correction=0)
    chosen = moved[moved != 0] / bound
    assert 0.995 < chosen.abs().max() <= 1 + 1e-5
    assert abs(len(chosen) / moved.numel() - 0.5) < 0.01
    assert abs(chosen.mean()) < 0.01
    assert abs(chosen.square().mean() - 1 / 3) < 0.01  # uniform from −1 to 1


def test_noise_is_of_the_seed_and_neither_of_its_start_noise_nor_of_other_purposes():
    plain = caption(16, 256)
    moved = flow.varied(plain, 7, 1.0) - plain
    assert torch.equal(flow.varied(plain, 7, 1.0) - plain, moved)
    others = [flow.varied(plain, 8, 1.0) - plain, flow.start_noise(7, 1, 16, 256)[0, 0]]
    others += [torch.randn(plain.shape, generator=flow.stream(7, "another purpose"))]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([moved.flatten(), other.flatten()]))[0, 1]) < 0.06  # 4 deviations


def test_a_caption_keeps_its_dtype_and_its_length():
    plain = caption().bfloat16()
    assert flow.varied(plain, 1, 1.0).dtype == torch.bfloat16
    assert flow.varied(plain, 1, 1.0).shape == plain.shape


def test_early_steps_are_those_that_begin_in_the_first_fifth_of_those_that_run():
    counts = [(0, 1), (0, 5), (0, 6), (0, 8), (0, 10), (0, 30), (12, 30), (29, 30)]
    expected = [[0], [0], [0, 1], [0, 1], [0, 1], [*range(6)], [12, 13, 14, 15], [29]]
    assert [[*flow.varied_steps(*count)] for count in counts] == expected
    for steps in range(1, 300):
        assert [*flow.varied_steps(0, steps)] == [k for k in range(steps) if 5 * k < steps]


# ------------------------------------------------------------------ runs


class Seen:
    """A hook that keeps the prompts' and the negative context of each evaluation, by step."""

    def __init__(self):
        self.positive, self.negative = [], []

    def __call__(self, evaluate):
        def seeing(e):
            self.positive.append(e.positive.tokens)
            self.negative.append(e.negative and e.negative.tokens)
            return evaluate(e)

        return seeing


def drawn(pipe, state=None, **settings):
    """The contexts of each evaluation, and the latents of every event."""
    seen = Seen()
    events = list(pipe.run(pipe.prepare(Request.from_mapping({"prompt": "a cat", **SIZE, **settings})), state, [seen]))
    return seen, [event.latents for event in events if event.latents is not None]


def refined(pipe, prompt, seed=None, variety=1.0):
    (plain,) = pipe.encode([prompt])
    return pipe.dit.refine([plain if seed is None else flow.varied(plain, seed, variety)])[0]


def test_only_early_steps_and_only_prompts_are_varied(pipe):
    seen, _ = drawn(pipe, seed=3, steps=10, guidance=2.0, negative="dogs", variety=1.0)
    varied, plain, negative = refined(pipe, "a cat", 3), refined(pipe, "a cat"), refined(pipe, "dogs")
    assert [torch.equal(x[0], varied) for x in seen.positive] == [True] * 2 + [False] * 8
    assert [torch.equal(x[0], plain) for x in seen.positive] == [False] * 2 + [True] * 8
    assert all(torch.equal(x[0], negative) for x in seen.negative)


def test_without_variety_no_step_differs(pipe):
    seen, latents = drawn(pipe, seed=3, steps=10, variety=0.0)
    assert all(torch.equal(x[0], refined(pipe, "a cat")) for x in seen.positive)
    assert torch.equal(latents[-1], drawn(pipe, seed=3, steps=10)[1][-1])
    assert not torch.equal(latents[-1], drawn(pipe, seed=3, steps=10, variety=0.25)[1][-1])


def test_both_evaluations_of_a_step_see_the_same(pipe):
    seen, _ = drawn(pipe, seed=3, steps=4, sampler="heun", variety=1.0)
    varied = refined(pipe, "a cat", 3)
    assert [torch.equal(x[0], varied) for x in seen.positive] == [True] * 2 + [False] * 5


def test_an_image_counts_the_steps_that_run(pipe):
    image = Image.new("RGB", (64, 48), "red")
    seen, _ = drawn(pipe, seed=3, steps=10, image=image, strength=0.5, variety=1.0)
    varied = refined(pipe, "a cat", 3)
    assert [torch.equal(x[0], varied) for x in seen.positive] == [True] + [False] * 4


def test_of_two_passes_the_first_is_varied(pipe):
    seen, _ = drawn(pipe, seed=3, steps=4, hires=2.0, strength=1.0, width=64, height=64, variety=1.0)
    varied = refined(pipe, "a cat", 3)
    assert [torch.equal(x[0], varied) for x in seen.positive] == [True] + [False] * 7


def test_in_a_batch_each_image_sees_what_it_sees_alone(pipe):
    prompts = ["a cat", "a dog"]
    seen, latents = drawn(pipe, prompt=prompts, seed=[3, 9], images=2, steps=5, batch_size=4, variety=1.0)
    for row, (prompt, seed) in enumerate([("a cat", 3), ("a cat", 4), ("a dog", 9), ("a dog", 10)]):
        assert torch.equal(seen.positive[0][row], refined(pipe, prompt, seed))
        _, alone = drawn(pipe, prompt=prompt, seed=seed, steps=5, variety=1.0)
        error = (latents[-1][row] - alone[-1][0]).abs().max() / alone[-1].abs().max()
        assert error <= LIKE_ALONE


def test_a_run_goes_on_from_any_step_to_the_same_bits(pipe, tmp_path):
    request = Request.from_mapping({"prompt": "a cat", "seed": 3, "steps": 10, **SIZE, "variety": 1.0})
    job = pipe.prepare(request)
    whole = [event.latents for event in pipe.run(job) if event.latents is not None]
    kept = StateFile(tmp_path / "state", job.to_dict())
    for step, event in enumerate(e for e in pipe.run(job) if e.latents is not None):
        kept._due = 0  # written at every step, whatever it takes
        kept.update(event)
        state, plain = load_state(tmp_path / "state")
        *_, last = [None, *(e.latents for e in pipe.run(zimage.Job.from_dict(plain), state) if e.latents is not None)]
        assert step == 9 or torch.equal(last, whole[-1])


def test_the_stage_alone_gives_the_same(pipe):
    (plain,) = pipe.encode(["a cat"])
    noise = flow.start_noise(3, 16, 6, 8)
    latents = pipe.denoise([plain], noise, steps=5, variety=1.0, seeds=[3])
    assert torch.equal(latents, drawn(pipe, seed=3, steps=5, variety=1.0)[1][-1])
    with pytest.raises(RequestError, match="pass one for each of 1 images"):
        pipe.denoise([plain], noise, steps=5, variety=1.0)
    with pytest.raises(RequestError, match="variety -1 is too small"):
        pipe.denoise([plain], noise, steps=5, variety=-1)


def test_on_the_demo_seeds_come_further_apart_with_more_variety():
    """From one start noise, so that what differs is the variety's; `bench variety` has the whole table."""
    demo = zimage.ZImage.load(device="cpu", dtype="fp32")
    noise = flow.start_noise(5, 16, 16, 16).expand(3, -1, -1, -1)
    captions, distances = demo.encode(["a cat"]) * 3, []
    for variety in (0.0, 0.5, 1.0, 2.0, 4.0):
        x = demo.denoise(captions, noise, variety=variety, seeds=[1, 2, 3])
        distances.append(float(torch.pdist(x.flatten(1)).mean()))
    assert distances[0] == 0
    assert all(after > 1.5 * before for before, after in itertools.pairwise(distances))
