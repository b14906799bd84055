"""Presets: what other programs draw with by default, under their names, so that pictures can be compared.

A preset fills in what is left open: what the request says ranks above it, what an adapter or the kind of the checkpoint
would ask for below. Guidance counts from 0 here; the programs count CFG, from 1. A settings file may define others.
"""

from collections.abc import Collection, Mapping

from zimage.errors import RequestError, quoted
from zimage.settings.fields import Plain, nearest

TURBO, BASE = "turbo", "base"
KINDS = {TURBO: "Turbo", BASE: "Base"}
LEVELS = ("steps", "schedule", "shift")  # what noise levels come from; `sigmas` replace these
Values = Mapping[str, Plain]

# Name → kind of checkpoint → values; a kind that is absent is not what the preset is for. Sources:
# turbo-4    half the usual steps; in a blind test of 24 pairs nobody saw a difference
# comfyui    its templates image_z_image_turbo and image_z_image ("steps: 30~50, cfg: 3~5"; the graph has cfg 4)
# forge      Forge Neo's preset `zit`, which has CFG 1 and no values for Base but the sampler's
# diffusers  the model cards of Z-Image-Turbo (9 steps there, the last of which did nothing) and Z-Image
PRESETS: Mapping[str, Mapping[str, Values]] = {
    "turbo-4": {TURBO: {"steps": 4}},
    "comfyui": {
        TURBO: {"sampler": "res_multistep", "schedule": "simple", "steps": 8, "shift": 3.0, "guidance": 0.0},
        BASE: {"sampler": "res_multistep", "schedule": "simple", "steps": 30, "shift": 3.0, "guidance": 3.0},
    },
    "forge": {
        TURBO: {"sampler": "euler", "schedule": "beta_shifted", "steps": 9, "shift": 9.0, "guidance": 0.0},
        BASE: {"sampler": "euler", "schedule": "beta_shifted", "shift": 9.0},
    },
    "diffusers": {
        TURBO: {"sampler": "euler", "schedule": "simple", "steps": 8, "shift": 3.0, "guidance": 0.0},
        BASE: {"sampler": "euler", "schedule": "simple", "steps": 50, "shift": 6.0, "guidance": 4.0},
    },
}


def preset_values(name: str | None, kind: str) -> Values:
    """What a preset says for a kind of checkpoint. Raises RequestError for a kind that it is not for."""
    if name is None:
        return {}
    if kind not in PRESETS[name]:
        others = " and ".join(KINDS[one] for one in PRESETS[name])
        text = f"preset {name} is for {others} checkpoints, and this one is {KINDS[kind]}; pass the settings themselves"
        raise RequestError(text, fields=("preset",))
    return PRESETS[name][kind]


def decided(names: Collection[str]) -> set[str]:
    """The settings that a preset of these names decides: with any source of noise levels, exact ones too."""
    return {*names, *(("sigmas",) if set(LEVELS) & set(names) else ())}


def names_of(preset: str) -> set[str]:
    """The settings that one of the presets here fills in, of any kind of checkpoint."""
    return {name for values in PRESETS[preset].values() for name in values}


def check_preset(name: str, own: Collection[str] = ()) -> None:
    """Raise RequestError for a name that is neither that of a preset here nor one's own."""
    if name not in PRESETS and name not in own:
        told = nearest(name, [*PRESETS, *own])
        raise RequestError(f"there is no preset {quoted(name)}; {told}", fields=("preset",))
