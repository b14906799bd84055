"""The evaluations that a job tells are those that happen, in every kind of run; and where they are told."""

import itertools
import json
from collections.abc import Iterator

import pytest
from PIL import Image

from zimage.cli import main
from zimage.dit import ZImageDiT
from zimage.settings.declared import Request
from zimage.settings.sampling import SAMPLERS

SIZE = {"prompt": "a cat", "width": 64, "height": 48, "seed": 1, "steps": 5}
GREY = (
    Image.linear_gradient("L").resize((64, 48)).point(lambda level: level // 2)
)  # repainted late, and by half at most
THIN = Image.new("L", (64, 48))
THIN.putpixel((3, 3), 255)  # white in no latent: of a mask that is not pasted, only the last step is left
PICTURE = Image.new("RGB", (64, 48), "red")
KINDS = {
    "from noise": {},
    "from a picture": {"image": PICTURE, "strength": 0.5},
    "behind a mask by value": {"image": PICTURE, "mask": GREY, "strength": 0.9},
    "behind a thin mask": {"image": PICTURE, "mask": THIN, "strength": 0.9, "paste": False},
    "in two passes": {"hires": 2.0, "strength": 0.5},
    "on noise levels of one's own": {"sigmas": "0.9,0.5,0.3,0", "steps": None},
}
GUIDED = {"guidance": 2.0}
GUIDANCE = {
    "none": {},
    "cfg": GUIDED,
    "truncated": {**GUIDED, "cfg_truncation": 0.4},
    "cfg_zero": {**GUIDED, "guidance_method": "cfg_zero"},
    "slg": {**GUIDED, "guidance_method": "slg:layers=1,start=0,stop=1", "cfg_truncation": 0.8},
}
LAST_ONLY = ("behind a thin mask",)  # one step, of which neither method leaves anything


def cases() -> Iterator[tuple[str, str, str]]:
    for sampler, kind, guided in itertools.product(SAMPLERS, KINDS, GUIDANCE):
        if not (kind in LAST_ONLY and guided in ("cfg_zero", "slg")):
            yield sampler, kind, guided


@pytest.fixture
def calls(monkeypatch):
    """Images of each evaluation; what comes out of one costs nothing."""
    found: list[int] = []

    def velocity(dit, latents, *rest, **more):
        found.append(len(latents))
        return 0.3 * latents + 0.1

    monkeypatch.setattr(ZImageDiT, "velocity", velocity)
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_told_is_what_happens(pipe, calls, sampler):
    for which, kind, guided in cases():
        if which != sampler:
            continue
        job = pipe.prepare(Request(**{**SIZE, **KINDS[kind], **GUIDANCE[guided], "sampler": sampler}))
        calls.clear()
        for event in pipe.run(job):
            if event.stage == "decode":
                break
        assert len(calls) == job.evaluations > 0, (kind, guided)


def test_every_picture_takes_as_many_also_in_a_batch(pipe, calls):
    for together, expected in ((1, [1] * 30), (2, [2] * 10 + [1] * 10)):
        job = pipe.prepare(Request(**SIZE, **GUIDED, images=3, batch_size=together))
        calls.clear()
        list(pipe.run(job))
        assert job.evaluations == 10
        assert calls == expected


# ------------------------------------------------------------------ where it is told


ARGUMENTS = ["a cat", "--device", "cpu", "--width", "64", "--height", "48", "--seed", "1", "--steps", "3"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "3 steps, "),
        (["--sampler", "heun"], "3 steps (5 evaluations), "),
        (["--guidance", "2"], "(6 evaluations)"),
    ],
)
def test_the_first_line_tells_them_where_they_are_not_the_steps(tiny_folder, calls, tmp_path, capsys, more, words):
    assert main(["gen", *ARGUMENTS, "--model", str(tiny_folder), "-o", str(tmp_path), *more]) == 0
    assert words in capsys.readouterr().err


def test_the_plan_tells_them(tiny_folder, calls, tmp_path, capsys):
    given = [*ARGUMENTS, "--model", str(tiny_folder), "-o", str(tmp_path), "--guidance", "2", "--cfg-truncation", "0.4"]
    assert main(["gen", *given, "-v"]) == 0
    assert "evaluations   5 of the DiT for each picture, in 3 steps" in capsys.readouterr().err
    assert main(["info", str(tiny_folder), "--plan", "--device", "cpu"]) == 0
    assert "evaluations   8 of the DiT for each picture, in 8 steps" in capsys.readouterr().out
    assert main(["info", str(tiny_folder), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["evaluations"] == 8
