"""What a render is asked for and how a model is loaded: one dataclass field per parameter, declared once.

A field's type, default, bounds and help make the command-line flag, the keyword of `ZImage.generate`, the check of the
value and the entry in the PNG's metadata. No torch here: `--help` must be quick.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from zimage.errors import RequestError

SIZE_MULTIPLE = 16
MAX_SIDE = 16_384
MAX_SEED = 2**63 - 1
SDPA = ("sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math")
ATTENTIONS = ("auto", *SDPA, "flash3", "flash2", "xformers", "sage")
TILE_MODES = ("exact", "blend", "off")
MAX_LORA_SCALE = 100.0
BLEND_TILE = 512  # px of a blended tile's side, unless another is named
TILE = {"minimum": SIZE_MULTIPLE, "maximum": MAX_SIDE, "multiple": SIZE_MULTIPLE}
SIDE = {"minimum": SIZE_MULTIPLE, "maximum": MAX_SIDE, "multiple": SIZE_MULTIPLE}


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    multiple: int | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A run setting: a dataclass field that knows its help text, its bounds, its flag and the name of its value."""
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "multiple": multiple, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag, "metavar": metavar, **bounds})


class Settings:
    """What settings dataclasses share."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """From plain values, as JSON holds them; an unknown name is an error that offers the nearest."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(names)
                raise RequestError(f"there is no setting {key!r}; {hint}")
        return cls(**values)


@dataclass(frozen=True)
class Request(Settings):
    """One call of the pipeline. None means: what the checkpoint's kind asks for (`ZImage.resolve` fills it in).

    `prompt` may be a list; `seed` a single number, one per prompt, or one per image. Raises RequestError by the
    field's name.
    """

    prompt: str | list[str] = setting(dataclasses.MISSING, "What to draw.")
    negative: str | None = setting(None, "What to steer away from; needs --guidance above 0. Default: empty text.")
    width: int | None = setting(None, "Width in pixels. Default: the checkpoint's.", **SIDE)
    height: int | None = setting(None, "Height in pixels. Default: the checkpoint's.", **SIDE)
    steps: int | None = setting(
        None, "Denoising steps, each one model evaluation. Default: 8 (Turbo) or 30 (Base).", minimum=1, maximum=1000
    )
    seed: int | list[int] | None = setting(
        None,
        "Seed of the noise; image k of a prompt uses seed + k. Default: drawn and reported.",
        minimum=0,
        maximum=MAX_SEED,
    )
    guidance: float | None = setting(
        None, "Classifier-free guidance, counted from 0 (off). Default: 0 (Turbo) or 4 (Base).", minimum=0, maximum=100
    )
    shift: float | None = setting(
        None, "Shift of the noise schedule. Default: from the checkpoint's scheduler config.", above=0, maximum=100
    )
    cfg_truncation: float = setting(1.0, "Guidance is off on steps where 1 − sigma is past this.", minimum=0, maximum=1)
    cfg_normalization: float = setting(
        0.0, "Scale a guided velocity back to this many times the unguided length; 0: off.", minimum=0, maximum=100
    )
    images: int = setting(1, "Images per prompt.", flag="-n", minimum=1, maximum=10_000)
    batch_size: int = setting(
        1,
        "Images denoised together. Above 1 the bits depend on the batch; helps on large GPUs only.",
        minimum=1,
        maximum=1024,
    )
    tile_mode: str | None = setting(
        None,
        "How the picture is cut for decoding: exact strips, blended tiles or not at all. "
        "Default: exact where the whole would take more than 3 GB or does not fit in memory, else off.",
        choices=TILE_MODES,
    )
    tile_size: int | None = setting(
        None, "Height of exact strips or side of blended tiles in pixels. Default: by the map; blend: 512.", **TILE
    )
    tile_overlap: int = setting(64, "Overlap of blended tiles in pixels.", minimum=0, maximum=MAX_SIDE)

    def __post_init__(self):
        check_fields(self)
        if self.tile_mode == "blend" and self.tile_overlap >= (self.tile_size or BLEND_TILE):
            raise RequestError(
                f"tile_overlap {self.tile_overlap} must be below the tile_size {self.tile_size or BLEND_TILE}"
            )
        if not self.prompts:
            raise RequestError("prompt: the list is empty; give at least one prompt")
        if self.negative is not None and self.guidance == 0:
            raise RequestError("negative: it has no effect at guidance 0; give a guidance above 0 or leave it out")
        if isinstance(self.seed, list) and len(self.seed) not in (len(self.prompts), self.count):
            raise RequestError(
                f"seed: {len(self.seed)} seeds were given; give one, one per prompt ({len(self.prompts)}) "
                f"or one per image ({self.count})"
            )

    @property
    def prompts(self) -> list[str]:
        return self.prompt if isinstance(self.prompt, list) else [self.prompt]

    @property
    def count(self) -> int:
        """Images in all."""
        return len(self.prompts) * self.images

    @property
    def seeds(self) -> list[int]:
        """One seed per image, prompt by prompt; needs a resolved request."""
        given = self.seed if isinstance(self.seed, list) else [self.seed] * len(self.prompts)
        if len(given) == self.count:
            return given
        return [(seed + k) % (MAX_SEED + 1) for seed in given for k in range(self.images)]


@dataclass(frozen=True)
class LoadSettings(Settings):
    """How a model is loaded. Raises RequestError by the field's name."""

    model: str | None = setting(
        None, "Model folder in the published layout, or an all-in-one file. Default: the bundled demo model."
    )
    dit: str | None = setting(None, "DiT from a loose file (safetensors or GGUF) or component folder.")
    text_encoder: str | None = setting(None, "Text encoder from a loose file or component folder.")
    vae: str | None = setting(None, "VAE from a loose file or component folder.")
    tokenizer: str | None = setting(None, "Folder with tokenizer.json. Default: the model's, or beside the encoder.")
    variant: str | None = setting(
        None, "What loose files are: turbo (shift 3) or base (shift 6).", choices=("turbo", "base")
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps.")
    text_encoder_device: str | None = setting(None, "Where the text encoder runs. Default: as --device.")
    dit_device: str | None = setting(None, "Where the DiT runs. Default: as --device.")
    vae_device: str | None = setting(None, "Where the VAE runs. Default: as --device.")
    dtype: str | None = setting(
        None, "Default: bf16 on GPUs and on CPUs that compute in it, else fp32.", choices=("bf16", "fp32")
    )
    attention: str | None = setting(
        None,
        "Attention backend; sage is lossy. Default: the environment's ZIMAGE_ATTENTION, else auto.",
        choices=ATTENTIONS,
    )
    precision: str = setting(
        "bf16",
        "Matrix products of the DiT: bf16 (as --dtype says), int8 or fp8, with scales per token and channel.",
        choices=("bf16", "int8", "fp8"),
    )
    compile: bool = setting(False, "Compile the DiT's blocks: some seconds once, then quicker steps.")
    residency: str = setting(
        "auto",
        "keep all weights in memory between stages, load each stage in its turn, or decide by the memory there is.",
        choices=("auto", "keep", "stage"),
    )
    lora: list[str] | None = setting(
        None, "LoRA file (.safetensors) and its scale, else 1; several add up. Default: none.", metavar="PATH[:SCALE]"
    )
    memory: float | None = setting(
        None,
        "GB (10⁹ bytes) a render may take on its device; on the CPU the whole process. What does not fit is loaded "
        "stage by stage, decoded in strips, streamed block by block. Default: by the free memory.",
        above=0,
        maximum=1_000_000,
    )

    def __post_init__(self):
        check_fields(self)
        for text in self.lora or []:
            split_lora(text)


def split_lora(text: str) -> tuple[str, float]:
    """PATH or PATH:SCALE → (path, scale): the last colon counts if a number follows. Raises RequestError."""
    path, _, last = text.rpartition(":")
    try:
        scale = float(last)
    except ValueError:
        path = ""
    if not path:
        return text, 1.0
    check_lora_scale(scale)
    return path, scale


def check_lora_scale(scale: Any) -> None:
    """Raise RequestError unless `scale` is a number that may be meant."""
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise RequestError(f"lora scale {scale!r} is a {type(scale).__name__}; it should be a number")
    if not abs(scale) <= MAX_LORA_SCALE:  # nor NaN
        raise RequestError(f"lora scale {scale} should lie between -{MAX_LORA_SCALE:g} and {MAX_LORA_SCALE:g}")


def fields(cls: type) -> list[tuple[dataclasses.Field, tuple[type, ...]]]:
    """Each field with the plain types that its value, or each in its list of values, may have."""
    hints = typing.get_type_hints(cls)
    return [(field, _scalar_types(hints[field.name])) for field in dataclasses.fields(cls)]


def list_fields(cls: type) -> dict[str, bool]:
    """The fields that take a list → whether they also take a single value without one."""
    hints = typing.get_type_hints(cls)
    return {name: _takes_one(hint) for name, hint in hints.items() if _list_types(hint)}


def check_fields(settings: Any) -> None:
    """Raise RequestError unless every value has its field's type and lies within its bounds."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        _check(field, hints[field.name], getattr(settings, field.name))


def _check(field: dataclasses.Field, accepted: Any, value: Any) -> None:
    if value is None:
        if types.NoneType not in _members(accepted):
            raise RequestError(f"{field.name}: a value is needed")
        return
    many = isinstance(value, list) and bool(_list_types(accepted))
    if not many and not _takes_one(accepted):
        raise RequestError(f"{field.name} {value!r} is a {type(value).__name__}; it should be a list")
    for item in value if many else [value]:
        _check_scalar(field, _scalar_types(accepted), item)


def _scalar_types(accepted: Any) -> tuple[type, ...]:
    """The types of a single value; where only lists are accepted, of what is in them."""
    plain = tuple(m for m in _members(accepted) if m is not types.NoneType and typing.get_origin(m) is None)
    return plain or _list_types(accepted)


def _list_types(accepted: Any) -> tuple[type, ...]:
    """The types of what a list may hold; none where no list is accepted."""
    return next((typing.get_args(m) for m in _members(accepted) if typing.get_origin(m) is list), ())


def _takes_one(accepted: Any) -> bool:
    return any(m is not types.NoneType and typing.get_origin(m) is None for m in _members(accepted))


def _members(accepted: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(accepted) in (typing.Union, types.UnionType)
    return typing.get_args(accepted) if is_union else (accepted,)


def _check_scalar(field: dataclasses.Field, accepted: tuple[type, ...], value: Any) -> None:
    name, m = field.name, field.metadata
    numbers = (int, float) if float in accepted else accepted
    if not isinstance(value, numbers) or (isinstance(value, bool) and bool not in accepted):
        kind = " or ".join(t.__name__ for t in accepted)
        raise RequestError(f"{name} {value!r} is a {type(value).__name__}; it should be of type {kind}")
    if m["choices"] and value not in m["choices"]:
        raise RequestError(f"{name} {value!r} is not known; use {', '.join(m['choices'])}")
    if isinstance(value, str):
        if not value.isascii() and value != value.encode(errors="ignore").decode():
            raise RequestError(f"{name} is not valid text; it must be encoded in UTF-8")
        return
    if isinstance(value, bool):
        return
    if value != value:
        raise RequestError(f"{name} is not a number")
    if m["minimum"] is not None and value < m["minimum"]:
        raise RequestError(f"{name} {value} is too small; the least is {m['minimum']}")
    if m["above"] is not None and value <= m["above"]:
        raise RequestError(f"{name} {value} is too small; it must be above {m['above']}")
    if m["maximum"] is not None and value > m["maximum"]:
        raise RequestError(f"{name} {value} is too large; the most is {m['maximum']}")
    if m["multiple"] and value % m["multiple"]:
        down = value // m["multiple"] * m["multiple"]
        raise RequestError(
            f"{name} {value} is not a multiple of {m['multiple']}; nearest {down} or {down + m['multiple']}"
        )
