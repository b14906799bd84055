"""A request in the form of AUTOMATIC1111's web UI, translated.

    cfg_scale → guidance + 1, seed −1 → drawn, batch_size × n_iter → images, <lora:NAME:WEIGHT> → LoRAs, hr_* → hires

What that program has and we do not is left out, as its own clients expect of servers like it, and named in a warning.
What would give another picture than the one that was asked for without anybody seeing it is refused.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice

from zimage.errors import SHOWN, RequestError, one_line, quoted
from zimage.pictures.foreign import guidance_of
from zimage.pictures.image import nearest_side
from zimage.pictures.parameters import LORA as TAG
from zimage.serve.asking import ATTACHMENTS, CONDITIONS, LORA, NAMES, lora_names
from zimage.serve.forms.a1111_control import SCRIPTS, controls
from zimage.serve.schema import PROMPT, SMALL_PNG, Schema, own_fields, whole
from zimage.settings.captions import LONGEST_TEXT
from zimage.settings.declared import MAX_SIDE
from zimage.settings.fields import Plain, Settings, check_fields, json_schema, setting
from zimage.settings.names import named
from zimage.settings.serving import ServeSettings

ORIGINAL = 1  # of `inpainting_fill`: what is behind the mask is begun with
CHECKPOINT = "sd_model_checkpoint"
INSTEAD = {  # how clients call what we call otherwise
    "guidance": "cfg_scale",
    "negative": "negative_prompt",
    "hires": "hr_scale",
    "strength": "denoising_strength",
    "sampler": "sampler_name",
    "schedule": "scheduler",
    "image": "init_images",
    "mask_invert": "inpainting_mask_invert",
    "mask_crop": "inpaint_full_res_padding",
    **dict.fromkeys(("control", "control_start", "control_end", "control_preprocess"), SCRIPTS),
}
# Values that ask for nothing, of fields that have no meaning here; besides these none, false, zero and empty ones do.
NOTHING: dict[str, Plain] = {
    "subseed": -1,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "s_noise": 1,
    "resize_mode": 1,
    "inpainting_fill": ORIGINAL,
    "hr_upscaler": "Lanczos",
    "override_settings_restore_afterwards": True,
    "do_not_save_grid": True,
}
HEAVY = ("init_images", SCRIPTS, *ATTACHMENTS, *CONDITIONS)  # what an answer does not repeat
MOST_NAMED = 50  # fields in a warning


@dataclass(frozen=True)
class Fields(Settings):
    """The fields of that form that mean something here, beside those that have one name. Raises RequestError."""

    negative_prompt: str | None = setting(
        None, "What to steer away from; without effect at cfg_scale 1.", longest=LONGEST_TEXT
    )
    cfg_scale: float | None = setting(None, "Guidance + 1; 1 is off.", minimum=0, maximum=101)
    batch_size: int = setting(1, "Pictures: batch_size × n_iter.", minimum=1, maximum=10_000)
    n_iter: int = setting(1, "Pictures: batch_size × n_iter.", minimum=1, maximum=10_000)
    sampler_name: str | None = setting(
        None, "The sampler, by the name in /sdapi/v1/samplers or an alias; others are ignored.", longest=255
    )
    sampler_index: str | None = setting(None, "The same by its older name.", longest=255)
    scheduler: str | None = setting(None, "The schedule, likewise.", longest=255)
    enable_hr: bool = setting(False, "Draw at this size first, then enlarge and refine.")
    hr_scale: float = setting(2.0, "How much larger.", above=0, maximum=8)
    hr_resize_x: int = setting(0, "The width to reach, in place of hr_scale.", minimum=0, maximum=1 << 20)
    hr_resize_y: int = setting(0, "The height to reach, in place of hr_scale.", minimum=0, maximum=1 << 20)
    denoising_strength: float | None = setting(
        None, "How much to change the picture, or the first pass of enable_hr.", minimum=0, maximum=1
    )
    init_images: list[str] | None = setting(None, "The picture to start from: base64 or a data URL.")
    mask: str | None = setting(None, "What of the picture is repainted: base64 or a data URL.")
    mask_blur: float | None = setting(None, "Blur of the mask in pixels.", minimum=0)
    inpainting_mask_invert: int | bool = setting(0, "1: what is black is repainted.", minimum=0, maximum=1)
    inpainting_fill: int = setting(
        ORIGINAL, "What is behind the mask at first: 1, the picture; others are ignored.", minimum=0, maximum=3
    )
    inpaint_full_res: int | bool = setting(0, "1: only the masked region is drawn, at full size.", minimum=0, maximum=1)
    inpaint_full_res_padding: int = setting(0, "Pixels around that region.", minimum=0, maximum=MAX_SIDE)
    send_images: bool = setting(True, "Whether the answer has the pictures.")
    save_images: bool = setting(False, "Pictures are kept in the history anyway.")

    def __post_init__(self):
        check_fields(self)
        if self.init_images and len(self.init_images) > 1:
            text = f"init_images: {len(self.init_images)} pictures; only one can be used"
            raise RequestError(text, fields=("init_images",))


KNOWN = {*Fields.names(), *NAMES}


@dataclass(frozen=True)
class Translated:
    """`values` under our names, as `asked` takes them; `ignored`: what was left out, in words."""

    fields: Fields
    values: dict[str, Plain]
    ignored: list[str]


def translated(sent: Mapping[str, Plain], usual: Mapping[str, Plain], model: str) -> Translated:
    """A body under our names. `usual`: what the server draws where a request says nothing. Raises RequestError."""
    given = {name: _whole(value) for name, value in sent.items() if value is not None}
    check_overrides(given.pop("override_settings", {}), model)
    scripts = given.pop(SCRIPTS, {})
    fields = Fields.from_mapping({name: value for name, value in given.items() if name in Fields.names()})
    own = {name: value for name, value in given.items() if name in NAMES and name not in Fields.names()}
    if isinstance(own.get("seed"), int) and own["seed"] < 0:
        del own["seed"]
    values, ignored = _in_our_terms(fields, given, own, usual)
    controlled, unused = controls(scripts, values.get("image"))
    values |= controlled
    for name in own.keys() & values.keys() - {"prompt", LORA, "width", "height"}:
        raise RequestError(f"{name} is set too; pass only one of them", fields=(name,))  # `named_as` puts theirs before
    return Translated(fields, {**own, **values}, [*ignored, *unused, *shown(given.keys() - KNOWN, given)])


def check_overrides(settings: Plain, model: str) -> list[str]:
    """The settings that are not changed. Raises RequestError where another model is asked for."""
    if not isinstance(settings, dict):
        raise RequestError("override_settings should be an object", fields=("override_settings",))
    wanted = settings.get(CHECKPOINT)
    named = wanted.partition(" [")[0].removesuffix(".safetensors") if isinstance(wanted, str) else wanted
    if named not in (None, "", model):
        text = f"{CHECKPOINT}: {quoted(wanted)} is not loaded; this server has {quoted(model)}"
        raise RequestError(text, fields=(CHECKPOINT,))
    return shown(settings.keys() - {CHECKPOINT}, settings)


def shown(names: Collection[str], values: Mapping[str, Plain]) -> list[str]:
    """Those of the fields without a meaning here that were meant to do something, as a warning names them."""
    asking = (name for name in sorted(names) if values[name] and values[name] != NOTHING.get(name))
    return [one_line(name, SHOWN) for name in islice(asking, MOST_NAMED)]


def bodies(settings: ServeSettings) -> dict[str, Schema]:
    """What the two requests hold, by title. Other fields are ignored."""
    own, theirs = own_fields(settings), json_schema(Fields)["properties"]
    fields = {**{name: own[name] for name in own.keys() - theirs.keys()}, **theirs, "prompt": PROMPT}
    fields["seed"] = {"type": ["integer", "null"], "default": -1, "description": "Seed of the noise; −1 draws one."}
    drawing = {name: field for name, field in fields.items() if name not in ("image", "mask", "init_images")}
    example = {"prompt": "a lighthouse at dusk", "steps": 8, "cfg_scale": 1, "seed": -1}
    return {
        "Txt2Img": whole("Txt2Img", drawing, example=example, others=True),
        "Img2Img": whole("Img2Img", fields, ("init_images",), {**example, "init_images": [SMALL_PNG]}, others=True),
    }


def _in_our_terms(
    fields: Fields, given: Mapping[str, Plain], own: Mapping[str, Plain], usual: Mapping[str, Plain]
) -> tuple[dict[str, Plain], list[str]]:
    sampling, ignored = _sampling(fields)
    values = {**_prompts(fields, own), **sampling}
    if fields.cfg_scale is not None:
        values["guidance"] = guidance_of(fields.cfg_scale)
    chosen = {**usual, **own, **values}
    if values.get("negative") and chosen["guidance"] == 0 and chosen.get("nag", 1) == 1:
        del values["negative"]
        ignored.append("negative_prompt (no effect at cfg_scale 1)")
    if given.keys() & {"batch_size", "n_iter"}:
        values["images"] = fields.batch_size * fields.n_iter
    if fields.enable_hr:
        values |= _enlarged(fields, own.get("width", usual["width"]), own.get("height", usual["height"]))
    if fields.init_images:
        values["image"] = fields.init_images[0]
    if fields.mask is not None and not fields.init_images:
        ignored.append("mask (there is no picture to start from)")
    elif fields.mask is not None:
        masked, unused = _masked(fields)
        values |= masked
        ignored += unused
    if fields.denoising_strength is not None and (fields.enable_hr or fields.init_images):
        values["strength"] = fields.denoising_strength
    return values, ignored


def _masked(fields: Fields) -> tuple[dict[str, Plain], list[str]]:
    """What a mask is and how it is used. All fills are the same where the picture begins with noise alone."""
    values: dict[str, Plain] = {"mask": fields.mask}
    values |= {"mask_invert": True} if fields.inpainting_mask_invert else {}
    values |= {"mask_blur": fields.mask_blur} if fields.mask_blur is not None else {}
    values |= {"mask_crop": fields.inpaint_full_res_padding} if fields.inpaint_full_res else {}
    begins_with_it = fields.denoising_strength not in (None, 1)
    unused = begins_with_it and fields.inpainting_fill != ORIGINAL
    return values, ["inpainting_fill (what is behind the mask is begun with)"] if unused else []


def _prompts(fields: Fields, own: Mapping[str, Plain]) -> dict[str, Plain]:
    """The prompt without its LoRA tags, and the LoRAs that they name."""
    prompt = own.get("prompt", "")
    if not isinstance(prompt, str):
        raise RequestError(f"prompt {quoted(prompt)} should be text", fields=("prompt",))
    values: dict[str, Plain] = {"prompt": prompt}
    if tags := TAG.findall(prompt):
        values["prompt"] = TAG.sub("", prompt).strip()
        values[LORA] = [*lora_names(own.get(LORA)), *(_lora(*tag) for tag in tags)]
    if fields.negative_prompt:
        values["negative"] = fields.negative_prompt
    return values


def _lora(name: str, weight: str) -> str:
    try:
        float(weight or 1)
    except ValueError:
        text = f"prompt: the weight in <lora:{quoted(name)}:{quoted(weight)}> should be a number"
        raise RequestError(text, fields=("prompt",)) from None
    return f"{name}:{weight or 1}"


def _sampling(fields: Fields) -> tuple[dict[str, Plain], list[str]]:
    """The sampler and the schedule, and what is not known: the web UI draws with its own first sampler then."""
    how = named(fields.sampler_name or fields.sampler_index or "", fields.scheduler or "")
    ignored = [f"{INSTEAD[kind]} {one_line(word, 40)} (not known here)" for kind, word in how.unknown.items()]
    return dict(how.values), ignored


def _enlarged(fields: Fields, width: Plain, height: Plain) -> dict[str, Plain]:
    """The size to reach from a first pass of this size, and the factor between them."""
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (width, height)):
        return {"hires": fields.hr_scale}  # the sides are refused by themselves
    factor = fields.hr_scale
    if fields.hr_resize_x or fields.hr_resize_y:
        factor = max(fields.hr_resize_x / width, fields.hr_resize_y / height)
    sides = {"width": fields.hr_resize_x or width * factor, "height": fields.hr_resize_y or height * factor}
    return {**{name: nearest_side(side) for name, side in sides.items()}, "hires": factor}


def _whole(value: Plain) -> Plain:
    """Some clients' numbers are all floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
