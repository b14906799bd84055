"""Other ways to write the usual options: names that people bring from other programs, and values in other terms.

    --num-inference-steps 8     → --steps 8                       another name: the table RENAMED
    --size 832x1216             → --width 832 --height 1216       other terms: the table SPELLINGS
    --cfg 5                     → --guidance 4
    --sampler-name "DPM++ 2M Karras"  → --sampler dpmpp_2m --schedule karras

Each comes with the settings that it stands for, to every command that has them. Names from elsewhere are not shown, and
may be written with underscores.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from zimage.errors import RequestError, quoted
from zimage.settings.fields import Plain
from zimage.settings.names import Named, named
from zimage.settings.profiles import FIELDS

# A setting, and its flags in diffusers and its scripts, AUTOMATIC1111's web UI, stable-diffusion.cpp and mflux.
# stable-diffusion.cpp's `-n` is the negative prompt; ours is the number of images.
RENAMED: Mapping[str, tuple[str, ...]] = {
    "steps": ("--num-inference-steps",),
    "guidance": ("--guidance-scale",),
    "negative": ("--negative-prompt",),
    "images": ("--num-images-per-prompt", "--num-images", "--batch-count", "--n-iter", "-b"),
    "width": ("-W",),
    "height": ("-H",),
    "seed": ("-s",),
    "strength": ("--denoising-strength", "--denoise"),
    "shift": ("--flow-shift",),
    "image": ("--init-img", "--init-image", "--image-path", "-i"),
    "mask": ("--mask-image",),
    "hires": ("--hr-scale",),
    "model": ("-m",),
    "dit": ("--diffusion-model",),
    "text_encoder": ("--llm",),
}
SAMPLER = ("--sampler-name", "--sampler_name", "--sampling-method", "--sampling_method")
SIZE = re.compile(r"\s*([0-9]{1,6})\s*[xX×*]\s*([0-9]{1,6})\s*")


class Spelling(NamedTuple):
    """An option whose value stands for values of the settings `sets`, shown in the help where it has one."""

    flags: tuple[str, ...]
    sets: tuple[str, ...]
    read: Callable[[str], dict[str, Plain]]
    metavar: str
    help: str = ""


class Spelled(click.Option):
    """The option that a spelling becomes; `spell` turns its value into settings, once all options are read."""

    def __init__(self, flags: Sequence[str], spelling: Spelling):
        shown: dict[str, Any] = {"help": spelling.help, "hidden": not spelling.help, "metavar": spelling.metavar}
        super().__init__(flags, expose_value=False, callback=self._keep, **shown)
        self.spelling = spelling

    def _keep(self, ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None and not ctx.resilient_parsing:
            ctx.meta.setdefault(__name__, []).append((self, value))


def names_elsewhere(setting: str) -> list[str]:
    """The flags of other programs for a setting, also with underscores, as options of Python's scripts have them."""
    flags = RENAMED.get(setting, ())
    return list(
        dict.fromkeys([*flags, *(f"--{flag[2:].replace('-', '_')}" for flag in flags if flag.startswith("--"))])
    )


def spell(ctx: click.Context) -> None:
    """Put what spelled options stand for among the values of the options. Raises RequestError where both are there."""
    for option, value in ctx.meta.pop(__name__, []):
        flag = option.opts[0].lstrip("-")
        for name, meant in option.spelling.read(value).items():
            if ctx.params.get(name) not in (None, ()):
                text = f"{flag}: {name} is set too; pass only one of them"
                raise RequestError(text, fields=(name,))
            ctx.params[name] = meant


def _sides(text: str) -> dict[str, Any]:
    found = SIZE.fullmatch(text)
    if found is None:
        told = f"size {quoted(text)} should be WIDTHxHEIGHT in pixels, such as 832x1216"
        raise RequestError(told, fields=("width", "height"))
    return {"width": int(found[1]), "height": int(found[2])}


def _guidance(text: str) -> dict[str, Plain]:
    """Counted from 1, which is off."""
    from zimage.pictures.foreign import guidance_of

    try:
        return {"guidance": guidance_of(float(text))}
    except ValueError:
        raise RequestError(f"cfg {quoted(text)} should be a number, of which 1 is off", fields=("guidance",)) from None


def _sampler(text: str) -> dict[str, Plain]:
    """As other programs write samplers, some with a schedule behind."""
    return _known("sampler", text, named(text))


def _schedule(text: str) -> dict[str, Plain]:
    return _known("schedule", text, named("", text))


def _known(setting: str, text: str, found: Named) -> dict[str, Plain]:
    if found.unknown or not text.strip():
        known = ", ".join(FIELDS[setting].metadata["choices"])
        raise RequestError(f"{setting} {quoted(text)} is not known here; use {known}", fields=(setting,))
    return found.values


SPELLINGS = (
    Spelling(("--size",), ("width", "height"), _sides, "WIDTHxHEIGHT", "Width and height in pixels, in one word."),
    Spelling(("--cfg",), ("guidance",), _guidance, "FLOAT", "Guidance + 1, as other programs count: 1 is off."),
    Spelling(("--cfg-scale", "--cfg_scale"), ("guidance",), _guidance, "FLOAT"),
    Spelling(SAMPLER, ("sampler", "schedule"), _sampler, "NAME"),
    Spelling(("--scheduler",), ("schedule",), _schedule, "NAME"),
)
