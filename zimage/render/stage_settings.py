"""What the denoise stage is given by itself, without a request: keywords that are fields of one, and seeds, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

from zimage.errors import RequestError, quoted
from zimage.settings.declared import STRENGTH, Request
from zimage.settings.fields import nearest
from zimage.settings.sampling import MAX_SEED, SamplingSettings

OF_RUNS = ("steps", "shift", "guidance", "sampler", "schedule", "variety", "nag", "guidance_method")
OF_GUIDANCE = ("cfg_truncation", "cfg_normalization")
SAY = {"control_start": "start", "control_end": "end", "control_flow": "kind"}  # as Steering calls them


def run_settings(settings: Mapping[str, Any]) -> tuple[SamplingSettings, float, dict[str, Any]]:
    """What `denoise` was given as fields of Request: how latents are drawn, the strength, and what Steering takes."""
    known = (*OF_RUNS, *OF_GUIDANCE, "strength", *SAY)
    for name in settings:
        if name not in known:
            raise RequestError(f"there is no setting {quoted(name)} of denoise; {nearest(name, known)}", fields=(name,))
    given = {name: Request.check_one(name, value) for name, value in settings.items() if value is not None}
    drawn = SamplingSettings(**{name: value for name, value in given.items() if name in (*OF_RUNS, *OF_GUIDANCE)})
    return drawn, given.get("strength", STRENGTH), {SAY[name]: given[name] for name in SAY if name in given}


def check_seeds(seeds: object, count: int) -> None:
    """Raise RequestError unless they are those of `count` images."""
    found = list(seeds) if isinstance(seeds, Sequence) else []
    if len(found) != count or not all(type(seed) is int and 0 <= seed <= MAX_SEED for seed in found):
        text = f"seeds: pass one for each of {count} images, whole numbers from 0 to {MAX_SEED}"
        raise RequestError(text, fields=("seeds", "sampler", "variety"))
