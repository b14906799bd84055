"""Settings that other programs wrote into a picture, as far as they are settings here."""

from dataclasses import dataclass, field

from zimage.errors import RequestError, one_line
from zimage.pictures.image import nearest_side
from zimage.settings.declared import Request
from zimage.settings.fields import Plain
from zimage.settings.names import named

CFG = "cfg"  # other programs' guidance, which counts from 1
MOST_HIRES = 8  # as the field says
NAMES = {"prompt": "prompt", "steps": "steps", "seed": "seed", "guidance": "CFG", "width": "size"}  # what one expects
MORE = {"negative": "negative prompt", "sampler": "sampler", "schedule": "schedule"}


@dataclass(frozen=True)
class Found:
    """What was found, unchecked: `values` by our settings' names (but for CFG), each of the type that it is said to be.

    `sampler` and `schedule` are that program's words. `by_picture`: it was rendered from another picture.
    """

    form: str
    values: dict[str, Plain] = field(default_factory=dict)
    sampler: str = ""
    schedule: str = ""
    loras: tuple[str, ...] = ()
    by_picture: bool = False


def taken(name: str, found: Found) -> tuple[dict[str, Plain], str]:
    """The settings that can be taken, and a line on them and on what is missing. Raises RequestError."""
    how = named(found.sampler, found.schedule)
    request, remarks = _checked(name, {**found.values, **how.values})
    if request.get("guidance") == 0 and request.pop("negative", ""):
        remarks.append("at CFG 1 the negative prompt has no effect")
    if "hires" not in request:
        request.pop("strength", None)
    request = {key: value for key, value in request.items() if value != ""}
    here = [title for key, title in {**NAMES, **MORE}.items() if key in request]
    missing = [title for key, title in NAMES.items() if key not in request]
    remarks += [f"its {kind} {word} is not known here, pass --{kind}" for kind, word in how.unknown.items()]
    parts = [f"{', '.join(here) or 'nothing'} taken from {found.form}", *remarks, *_left(found)]
    if missing:
        parts.insert(1, f"not found: {', '.join(missing)}")
    return request, one_line(f"{name} was saved by another program: {'; '.join(parts)}")


def _checked(name: str, values: dict[str, Plain]) -> tuple[dict[str, Plain], list[str]]:
    """Those of the values that the fields accept, and remarks on other numbers; a text at fault is an error."""
    values, remarks, request = _in_our_terms(values), [], {}
    for key, value in values.items():
        try:
            request[key] = Request.check_one(key, value)
        except RequestError as error:
            if isinstance(value, str):
                raise error.with_text(f"{name}: its {error}") from None
            remarks.append(str(error))
    sides = [(side, request[side]) for side in ("width", "height") if side in request]
    if len(sides) == 1:
        del request[sides[0][0]]
    return request, remarks


def _in_our_terms(values: dict[str, Plain]) -> dict[str, Plain]:
    """CFG as guidance, and sides at the nearest multiple."""
    ours = {key: value for key, value in values.items() if key != CFG}
    if CFG in values:
        ours["guidance"] = guidance_of(values[CFG])
    return ours | {side: nearest_side(ours[side]) for side in ("width", "height") if ours.get(side, 0) > 0}


def guidance_of(cfg: float) -> float:
    """Guidance counts from 0, and other programs' CFG from 1; below that it is off as well."""
    return max(round(cfg - 1, 6), 0.0)


def _left(found: Found) -> list[str]:
    """What was used there and is not set here."""
    said = []
    if found.loras:
        said.append(f"its LoRAs are not loaded: {', '.join(found.loras[:8])}; pass them with --lora")
    if found.by_picture:
        said.append("it was made from a picture: pass that with --image")
    return said
