"""Samplers and schedules by the names of other programs."""

import itertools

import pytest

from zimage.settings.names import SAMPLER_NAMES, SCHEDULE_NAMES, named
from zimage.settings.sampling import SAMPLERS, SCHEDULES

TABLES = {"sampler": (SAMPLER_NAMES, SAMPLERS), "schedule": (SCHEDULE_NAMES, SCHEDULES)}
THEIRS = {  # of each program: sampler, schedule → ours
    "A1111": [
        ("Euler a", "Automatic", "euler_ancestral", None),
        ("DPM++ 2M", "Automatic", "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE", "Exponential", "dpmpp_2m_sde", "exponential"),
        ("DPM++ 2M SDE Karras", "", "dpmpp_2m_sde", "karras"),
        ("UniPC", "SGM Uniform", "unipc", "simple"),
        ("DDIM", "KL Optimal", "euler", "kl_optimal"),
        ("k_euler_a", "", "euler_ancestral", None),
    ],
    "Forge": [
        ("Res Multistep", "Linear Quadratic", "res_multistep", "linear_quadratic"),
        ("ER SDE", "Beta", "er_sde", "beta_shifted"),
    ],
    "ComfyUI": [
        ("res_multistep", "simple", "res_multistep", "simple"),
        ("uni_pc_bh2", "sgm_uniform", "unipc", "simple"),
        ("dpmpp_2m_sde_gpu", "normal", "dpmpp_2m_sde", "normal"),
    ],
    "diffusers": [
        ("FlowMatchEulerDiscreteScheduler", "", "euler", None),
        ("FlowMatchHeunDiscreteScheduler", "", "heun", None),
        ("FlowMatchLCMScheduler", "", "lcm", None),
        ("DPMSolverMultistepScheduler", "", "dpmpp_2m", None),
        ("UniPCMultistepScheduler", "", "unipc", None),
    ],
    "stable-diffusion.cpp": [("dpm++2m karras", "", "dpmpp_2m", "karras"), ("euler_a", "", "euler_ancestral", None)],
    "Draw Things": [("Euler A Trailing", "", "euler_ancestral", "simple")],
    "nobody": [("", "", None, None), ("", "Automatic", None, None), ("", "beta", None, "beta_shifted")],
}


@pytest.mark.parametrize(("program", "row"), [(name, row) for name, rows in THEIRS.items() for row in rows])
def test_names_of_other_programs(program, row):
    sampler, schedule, *ours = row
    found = named(sampler, schedule)
    assert [found.values.get(kind) for kind in TABLES] == ours
    assert found.unknown == {}


@pytest.mark.parametrize(
    ("sampler", "schedule", "values", "unknown"),
    [
        ("DPM++ SDE", "Automatic", {}, {"sampler": "DPM++ SDE"}),
        ("DPM++ 2M AYS", "", {}, {"sampler": "DPM++ 2M AYS"}),
        ("Euler", "beta57", {"sampler": "euler"}, {"schedule": "beta57"}),
        ("dpmpp_2m_sde_heun", "simple", {"schedule": "simple"}, {"sampler": "dpmpp_2m_sde_heun"}),
        ("karras", "", {}, {"sampler": "karras"}),
    ],
)
def test_what_we_lack_is_told(sampler, schedule, values, unknown):
    """A neighbour's name is no match: `dpmpp_2m_sde_heun` draws otherwise than `dpmpp_2m_sde`."""
    assert named(sampler, schedule) == (values, unknown)


@pytest.mark.parametrize("kind", TABLES)
def test_every_row_has_names_that_no_other_has(kind):
    table, offered = TABLES[kind]
    assert tuple(table) == offered, "all that is offered, in its order"
    words = {(ours, word) for ours, names in table.items() for word in (ours, names.label, *names.others)}
    for ours, word in words - {("beta", "beta")}:  # which is theirs for another one
        alone = named(word) if kind == "sampler" else named("", word)
        assert alone.values == {kind: ours}


def test_both_as_one_are_taken_apart():
    """As an older web UI writes them, whatever the two are."""
    for (ours, sampler), (theirs, schedule) in itertools.product(SAMPLER_NAMES.items(), SCHEDULE_NAMES.items()):
        assert named(f"{sampler.label} {schedule.label}") == ({"sampler": ours, "schedule": theirs}, {})


def test_long_words_are_compared_at_once():
    assert named("euler " * 100_000, "_" * 1_000_000).values == {}
