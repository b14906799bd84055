"""Units of the web UI's ControlNet extension (`alwayson_scripts.controlnet.args`), translated to our `control`.

    model "NAME [hash]" → NAME, weight → scale, guidance_start/_end → control_start/_end, module "canny" → its edges

A control file of Z-Image takes pictures that are drawn already (edges, depth, poses); of the preprocessors of that
extension there is canny alone. Another one is refused: without it the picture would be another one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zimage.errors import SHOWN, RequestError, one_line, quoted
from zimage.settings.fields import Plain, Settings, check_fields, setting

SCRIPTS, CONTROLNET = "alwayson_scripts", "controlnet"
NO_MODULE, CANNY = "none", "canny"
MODULES = (NO_MODULE, CANNY)
MOST_UNITS = 10
# Values that ask for nothing, of fields that have no meaning here, beside None, false, zero and empty ones.
NOTHING: dict[str, tuple[Plain, ...]] = {
    "resize_mode": (1, "Crop and Resize", "Inner Fit (Scale to Fit)"),
    "control_mode": ("Balanced",),
    "processor_res": (-1, 64, 512),
    "threshold_a": (-1, 64, 100),
    "threshold_b": (-1, 64, 200),
    "hr_option": ("Both",),
    "input_mode": ("simple",),
    "is_ui": (True,),
    "pixel_perfect": (True,),
    "low_vram": (True,),
    "lowvram": (True,),
    "save_detected_map": (True,),
}


@dataclass(frozen=True)
class Unit(Settings):
    """The fields of a unit that mean something here. Raises RequestError."""

    enabled: bool = setting(True, "Whether it is used.")
    image: str | None = setting(None, "The control picture: base64 or a data URL. Default: the picture to start from.")
    model: str = setting("None", "A control file of this server, by its name.", longest=300)
    module: str = setting(NO_MODULE, "What makes the control picture: none, or canny.", longest=100)
    weight: float = setting(1.0, "How much it counts.", minimum=-100, maximum=100)
    guidance_start: float = setting(0.0, "The share of the steps after which it begins.", minimum=0, maximum=1)
    guidance_end: float = setting(1.0, "The share of the steps after which it ends.", minimum=0, maximum=1)

    def __post_init__(self):
        check_fields(self)
        if self.module.lower() not in MODULES:
            raise RequestError(f"module {quoted(self.module)} is not here; known: {', '.join(MODULES)}")
        if self.model in ("", "None"):
            raise RequestError("model: a control file is needed; GET /controlnet/model_list has them")

    @property
    def name(self) -> str:
        """Its model without the hash that the extension puts behind it."""
        return self.model.rpartition(" [")[0] or self.model


def controls(scripts: Plain, started: str | None) -> tuple[dict[str, Plain], list[str]]:
    """Our values for `alwayson_scripts`, and what of it was left out. `started`: the picture that img2img begins with.

    Raises RequestError.
    """
    if not isinstance(scripts, dict):
        raise _fault("it should be an object")
    units, ignored = [], []
    for name, script in scripts.items():
        args = script.get("args") if isinstance(script, dict) else None
        if name.lower() != CONTROLNET:
            ignored += [one_line(f"{SCRIPTS}.{name}", SHOWN)] if args else []
        elif not isinstance(args, list) or not all(isinstance(unit, dict) for unit in args):
            raise _fault(f"{CONTROLNET}.args should be a list of objects")
        else:
            units += args
    if len(units) > MOST_UNITS:
        raise _fault(f"{len(units)} units are too many; at most {MOST_UNITS} can be used")
    wanted = [_unit(index, unit, started) for index, unit in enumerate(units) if unit.get("enabled", True)]
    ignored += [one_line(name, SHOWN) for unit in units for name in _unused(unit)]
    return _together(wanted) if wanted else {}, list(dict.fromkeys(ignored))


def _unit(index: int, sent: Mapping[str, Plain], started: str | None) -> Unit:
    """A unit, which has a picture."""
    image = sent.get("image") or sent.get("input_image") or started
    image = image.get("image") if isinstance(image, dict) else image
    known = {name: value for name, value in sent.items() if name in Unit.names() and value is not None}
    try:
        if image is None:
            raise RequestError("image: a control picture is needed")
        return Unit.from_mapping({**known, "image": image})
    except RequestError as error:
        raise _fault(f"unit {index}: {error}") from None


def _together(units: Sequence[Unit]) -> dict[str, Plain]:
    """What is one for a whole request has to be the same of all units."""
    entries = [{"model": unit.name, "picture": unit.image, "scale": unit.weight} for unit in units]
    for name in ("guidance_start", "guidance_end", "module"):
        if len({getattr(unit, name) for unit in units}) > 1:
            raise _fault(f"{name} has to be the same for all units")
    first = units[0]
    values: dict[str, Plain] = {"control": entries}
    values |= {"control_start": first.guidance_start} if first.guidance_start > 0 else {}
    values |= {"control_end": first.guidance_end} if first.guidance_end < 1 else {}
    values |= {"control_preprocess": CANNY} if first.module.lower() == CANNY else {}
    return values


def _unused(unit: Mapping[str, Plain]) -> list[str]:
    """Fields without a meaning here that were meant to do something."""
    others = sorted(unit.keys() - {*Unit.names(), "input_image"})
    return [f"{CONTROLNET}.{name}" for name in others if unit[name] and unit[name] not in NOTHING.get(name, ())]


def _fault(text: str) -> RequestError:
    return RequestError(f"{SCRIPTS}: {text}", fields=(SCRIPTS,))
