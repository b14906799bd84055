"""Guidance methods: their formulas with values worked out by hand, what may be asked for, the same bits after a resume.

Whole runs beside diffusers: `test_parity_guiders.py`.
"""

import json

import pytest
import torch
from torch import Tensor

import zimage
from zimage import flow
from zimage.errors import RequestError
from zimage.render.state import RenderState, load_state, save_state
from zimage.settings.declared import Request
from zimage.settings.guiding import METHODS, GuidanceMethod

SIZE = {"prompt": "a cat", "width": 64, "height": 48, "seed": 1}
SKIP = "slg:layers=1,start=0,stop=1"
AVERAGED = "apg:threshold=3,momentum=0.7"


def guidance(text: str) -> flow.Guidance:
    name, values = GuidanceMethod.parse(text)
    return flow.Guidance(2.0, method=name, values=values)


def velocities(*samples: tuple[list[float], list[float]]) -> dict[str, Tensor]:
    pairs = zip(*samples, strict=True)
    return dict(zip((flow.PROMPT, flow.NEGATIVE), (torch.tensor(pair)[:, None, None] for pair in pairs), strict=True))


# ------------------------------------------------------------------ formulas


def test_names_and_parameters_are_those_of_the_table():
    assert list(flow.METHODS) == list(METHODS)


def test_cfg_zero_by_hand():
    """α = ⟨(4, 0), (2, 2)⟩ / 8 = 1: as cfg; and ⟨(3, 1), (1, 1)⟩ / 2 = 2; sample by sample."""
    given = velocities(([4.0, 0.0], [2.0, 2.0]), ([3.0, 1.0], [1.0, 1.0]))
    guided, kept = guidance("cfg_zero").combine(given, 2.0, None)
    torch.testing.assert_close(guided.flatten(1), torch.tensor([[8.0, -4.0], [5.0, -1.0]]))
    assert kept is None


def test_apg_by_hand():
    """pos (3, 0), neg (0, −4): the update (3, 4) has 3 along pos and 4 across it."""
    given = velocities(([3.0, 0.0], [0.0, -4.0]))
    found = {
        text: guidance(f"apg:{text}").combine(given, 2.0, None)[0].flatten().tolist()
        for text in ("eta=0,threshold=0", "eta=0.5,threshold=0", "eta=1,threshold=0", "eta=1,threshold=2.5")
    }
    assert found == {
        "eta=0,threshold=0": [3.0, 8.0],
        "eta=0.5,threshold=0": [6.0, 8.0],
        "eta=1,threshold=0": [9.0, 8.0],  # cfg
        "eta=1,threshold=2.5": [6.0, 4.0],  # half of the update, whose length is 5
    }


def test_apg_averages_what_was_not_cut():
    given, method = velocities(([3.0, 0.0], [0.0, -4.0])), guidance("apg:eta=1,threshold=2.5,momentum=-0.5")
    first, average = method.combine(given, 2.0, None)
    assert average.flatten().tolist() == [3.0, 4.0]
    second, average = method.combine(given, 2.0, average)
    assert average.flatten().tolist() == [1.5, 2.0]
    assert (first.flatten().tolist(), second.flatten().tolist()) == ([6.0, 4.0], [6.0, 4.0])
    assert guidance("apg:momentum=0").combine(given, 2.0, None)[1] is None


def test_slg_by_hand():
    given = velocities(([3.0, 0.0], [0.0, -4.0])) | {flow.SKIPPED: torch.tensor([[[[1.0, 1.0]]]])}
    guided, _ = guidance("slg:scale=2").combine(given, 2.0, None)
    assert guided.flatten().tolist() == [3 + 6 + 4, 0 + 8 - 2]


def test_every_method_is_limited():
    given = velocities(([3.0, 4.0], [0.0, -4.0])) | {flow.SKIPPED: torch.zeros(1, 1, 1, 2)}
    for name in METHODS:
        guided, _ = guidance(name)._replace(normalization=0.5).combine(given, 2.0, None)
        assert abs(float(guided.norm()) - 2.5) < 1e-5, name


def test_levels_at_their_edges():
    """What 8 and 30 levels evaluate; diffusers' ends are excluded, and computed from the product."""
    zero, skip = guidance("cfg_zero:zero_init_steps=2"), guidance("slg")
    assert [len(zero.branches(1.0, k, 8)) for k in range(4)] == [0, 0, 2, 2]
    assert [k for k in range(30) if flow.SKIPPED in skip.branches(1.0, k, 30)] == [1, 2, 3, 4, 5]
    assert not any(flow.SKIPPED in skip.branches(1.0, k, 8) for k in range(8))
    assert all(guidance(name).branches(0.0, 0, 8) == (flow.PROMPT,) for name in METHODS)


# ------------------------------------------------------------------ what may be asked for


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("apg", "apg:eta=0,threshold=15,momentum=0"),
        ("apg:momentum=1e-3", "apg:eta=0,threshold=15,momentum=0.001"),
        ("slg:layers=9+0+9", "slg:layers=0+9,scale=2.8,start=0.01,stop=0.2"),
        ("cfg", "cfg"),
    ],
)
def test_a_method_is_written_whole(text, told):
    found = GuidanceMethod.parse(text).describe()
    assert found == told
    assert GuidanceMethod.parse(found).describe() == told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cgf", "'cgf' is not known; did you mean 'cfg'"),
        ("", "'' is not known; known: cfg, cfg_zero, apg, slg"),
        ("cfg:", "'' is not a parameter of cfg; known: none"),
        ("apg:eta", "eta '' should be a number from 0 to 1"),
        ("apg:eta=nan", "eta 'nan' should be a number from 0 to 1"),
        ("apg:etta=1", "'etta' is not a parameter of apg; did you mean 'eta'"),
        ("apg:eta=0,eta=1", "names a parameter twice"),
        ("apg:momentum=1", "from -0.99 to 0.99"),
        ("cfg_zero:zero_init_steps=1.5", "'1.5' should be a whole number from 0 to 1000"),
        ("slg:layers=7,8", "'8' is not a parameter of slg"),
        ("slg:layers=-1", "whole numbers, such as 7+8+9, each from 0 to 999"),
        ("slg:start=0.5", "start 0.5 must be below the stop 0.2"),
    ],
)
def test_what_is_not_a_method_is_one_line(text, words):
    with pytest.raises(RequestError) as caught:
        Request(guidance_method=text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fields == ("guidance_method",)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"guidance_method": "apg", "guidance": 0}, "apg has no effect at guidance 0"),
        ({"guidance_method": "apg"}, "apg has no effect at guidance 0"),  # Turbo's default
        ({"guidance_method": "slg", "guidance": 2, "steps": 30}, "skips layer 9, and the DiT has 2"),
        ({"guidance_method": "slg:layers=1", "guidance": 2, "steps": 8}, "skips layers in no step"),
        ({"guidance_method": "cfg_zero:zero_init_steps=8", "guidance": 2, "steps": 8}, "every step to zero"),
        (
            {"guidance_method": "cfg_zero:zero_init_steps=4", "guidance": 2, "steps": 8, "hires": 2, "strength": 0.5},
            "zero",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused_before_anything_is_loaded(pipe, more, words):
    with pytest.raises(RequestError, match=words) as caught:
        pipe.prepare(Request(**SIZE, **more))
    assert "guidance_method" in caught.value.fields
    if "hires" not in more and more.get("guidance"):
        noise = flow.start_noise(1, 16, 6, 8)
        with pytest.raises(RequestError, match=words):
            pipe.denoise(
                pipe.encode(["a"]), noise, more.get("steps", 8), guidance=2.0, guidance_method=more["guidance_method"]
            )


def test_cfg_may_be_named_without_guidance(pipe):
    assert pipe.prepare(Request(**SIZE, guidance=0, guidance_method="cfg")).request.guidance_method == "cfg"


def test_metadata_hold_every_value(pipe):
    job = pipe.prepare(Request(**SIZE, guidance=2, guidance_method="apg:eta=0.5"))
    assert pipe.metadata(job, 0)["request"]["guidance_method"] == "apg:eta=0.5,threshold=15,momentum=0"


# ------------------------------------------------------------------ runs


def finished(events) -> tuple[list[bytes], list[RenderState]]:
    """The pictures, and the state after each step, as a file would keep it."""
    state, states, images = RenderState(), [], []
    for event in events:
        if state.update(event) and event.stage == "denoise":
            states.append(state.snapshot())
        if event.image is not None:
            images.append(event.image.tobytes())
    return images, states


@pytest.mark.parametrize("method", [AVERAGED, "cfg_zero", SKIP])
@pytest.mark.parametrize("more", [{}, {"sampler": "heun", "hires": 1.5, "strength": 0.7}], ids=str)
def test_the_same_bits_from_every_step_on(pipe, tmp_path, method, more):
    """In a batch and alone, in both passes; guidance ends before the run does, and its average stays."""
    given = {**SIZE, "images": 2, "steps": 4, "guidance": 3.0, "guidance_method": method, "cfg_truncation": 0.6, **more}
    job = pipe.prepare(Request(**given))
    images, states = finished(pipe.run(job))
    assert len(states) == job.count * sum(4 - begin for begin in job.begins)
    for i, state in enumerate(states[:-1]):
        save_state(tmp_path / f"{i}", state, job.to_dict())
        again, plain = load_state(tmp_path / f"{i}")
        if state.step and method.startswith("apg"):
            assert flow.AVERAGE in again.carried
        assert finished(pipe.run(zimage.Job.from_dict(json.loads(json.dumps(plain))), again))[0] == images, i


@pytest.mark.parametrize("method", [AVERAGED, "cfg_zero", SKIP])
def test_the_same_bits_alone_and_in_a_batch(pipe, method):
    together = {**SIZE, "steps": 3, "guidance": 3.0, "guidance_method": method, "images": 3}
    images, _ = finished(pipe.run(Request(**together)))
    for k in range(3):
        alone = {**together, "images": 1, "seed": 1 + k}
        assert finished(pipe.run(Request(**alone)))[0] == [images[k]]


def test_one_batch_averages_sample_by_sample(pipe):
    """Bits of a batch may differ; more than rounding they may not."""
    captions, noise = pipe.encode(["a cat", "a dog"]), torch.cat([flow.start_noise(s, 16, 6, 8) for s in (1, 2)])
    negative = pipe.encode([""]) * 2
    how = {"steps": 4, "guidance": 4.0, "guidance_method": AVERAGED}
    both = pipe.denoise(captions, noise, negative=negative, **how)
    for k in range(2):
        one = pipe.denoise(captions[k : k + 1], noise[k : k + 1], negative=negative[:1], **how)
        torch.testing.assert_close(both[k : k + 1], one, rtol=0, atol=1e-4)


def test_a_state_of_another_method_is_refused(pipe):
    given = {**SIZE, "steps": 3, "guidance": 3.0}
    jobs = {name: pipe.prepare(Request(**given, guidance_method=name)) for name in (AVERAGED, "cfg")}
    for name, other in ((AVERAGED, "cfg"), ("cfg", AVERAGED)):
        _, states = finished(pipe.run(jobs[name]))
        with pytest.raises(RequestError, match="that of another render"):
            pipe.run(jobs[other], states[0])
