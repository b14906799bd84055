"""Samplers and schedules as other programs call them, and ours as these programs would.

A row is one of ours: how AUTOMATIC1111's web UI and Forge write it, and what else it is called: the web UI's aliases,
ComfyUI's inputs, diffusers' classes, stable-diffusion.cpp's options. Names are compared without case, blanks, hyphens
and underscores.

    DPM++ 2M Karras → dpmpp_2m, karras     an older web UI, and stable-diffusion.cpp, write both as one
    DPM++ 2M, Automatic → dpmpp_2m, karras     what the web UI's sampler prefers; most prefer none

Whoever writes a name may mean a variant: ComfyUI's `uni_pc` has another B(h) than `uni_pc_bh2`, its `sgm_uniform`
stands within 0.003 of `simple`, its `karras`, `exponential` and `kl_optimal` run further down, and at eta 0
DDIM's step along a straight path is Euler's. Noise differs anyway, so that no picture is that of another program to the
pixel.
"""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple


class Names(NamedTuple):
    """How others call a sampler or a schedule; `automatic`: the schedule that a sampler has of its own, if any."""

    label: str
    others: tuple[str, ...] = ()
    automatic: str | None = None


SAMPLER_NAMES: Mapping[str, Names] = {
    "euler": Names("Euler", ("k_euler", "ddim", "FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler")),
    "euler_ancestral": Names(
        "Euler a",
        ("k_euler_a", "k_euler_ancestral", "EulerAncestralDiscreteScheduler", "LTXEulerAncestralRFScheduler"),
    ),
    "heun": Names("Heun", ("k_heun", "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler")),
    "lcm": Names("LCM", ("k_lcm", "FlowMatchLCMScheduler", "LCMScheduler")),
    "dpmpp_2m": Names("DPM++ 2M", ("k_dpmpp_2m", "DPMSolverMultistepScheduler"), "karras"),
    "dpmpp_2m_sde": Names("DPM++ 2M SDE", ("k_dpmpp_2m_sde", "dpmpp_2m_sde_gpu"), "exponential"),
    "unipc": Names("UniPC", ("uni_pc_bh2", "UniPCMultistepScheduler")),
    "res_multistep": Names("Res Multistep"),
    "er_sde": Names("ER SDE"),
}
SCHEDULE_NAMES: Mapping[str, Names] = {
    "simple": Names("Simple", ("sgm_uniform", "trailing", "flowmatch")),
    "normal": Names("Normal", ("discrete",)),
    "beta": Names("Beta unshifted"),
    "beta_shifted": Names("Beta", ("beta",)),
    "karras": Names("Karras"),
    "exponential": Names("Exponential"),
    "linear_quadratic": Names("Linear Quadratic"),
    "kl_optimal": Names("KL Optimal"),
}
AUTOMATIC = "automatic"


class Named(NamedTuple):
    """What words of another program are here: values of our settings, and the words that name none of ours."""

    values: dict[str, str]
    unknown: dict[str, str]


def named(sampler: str, schedule: str = "") -> Named:
    """`sampler` and `schedule` for the names of another program; an empty one says nothing."""
    ours, own_schedule = _split(sampler)
    words = {"sampler": sampler, "schedule": schedule or own_schedule}
    known = {"sampler": ours, "schedule": _known(words["schedule"], "schedule")}
    if _key(words["schedule"]) == AUTOMATIC:
        words["schedule"], known["schedule"] = "", SAMPLER_NAMES[ours].automatic if ours else None
    values = {kind: name for kind, name in known.items() if name}
    return Named(values, {kind: word for kind, word in words.items() if word and kind not in values})


def _split(text: str) -> tuple[str | None, str]:
    """Our sampler for a name that may end with a schedule's, and the words of that."""
    words = text.split()
    for count in range(min(len(words), 3)):
        sampler, schedule = " ".join(words[: len(words) - count]), " ".join(words[len(words) - count :])
        if (known := _known(sampler, "sampler")) and (not schedule or _known(schedule, "schedule")):
            return known, schedule
    return None, ""


def _known(text: str, kind: str) -> str | None:
    return _ours(kind).get(_key(text))


@functools.cache
def _ours(kind: str) -> dict[str, str]:
    """Every name as names are compared → ours; where theirs is another one of ours, it is theirs."""
    table = {"sampler": SAMPLER_NAMES, "schedule": SCHEDULE_NAMES}[kind]
    own = {_key(ours): ours for ours in table}
    return own | {_key(word): ours for ours, names in table.items() for word in (names.label, *names.others)}


def _key(text: str) -> str:
    return re.sub(r"[\s_-]+", "", text).lower().replace("dpm++", "dpmpp")
