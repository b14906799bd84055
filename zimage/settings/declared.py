"""What a render is asked for: one dataclass field per parameter, declared once.

A field's type, default, bounds, group and help make the command-line flag, the key in TOML files, the keyword of
`ZImage.generate`, the check of the value and the entry in the PNG's metadata. What a field is: `settings.fields`.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

from zimage.errors import RequestError, quoted
from zimage.settings.captions import LONGEST_TEXT, TEXT_PARTS
from zimage.settings.conditions import Control
from zimage.settings.fields import Attachment, Conditions, either, setting
from zimage.settings.sampling import MAX_SEED, RANDOM_SEED, SamplingSettings, is_open, split_variation


class Bounds(TypedDict):
    """Bounds that several fields share."""

    minimum: int
    maximum: int
    multiple: int


SIZE_MULTIPLE = 16
MAX_SIDE = 16_384
MAX_ASPECT = 16  # times that one side may be as long as the other, where only proportions are asked for
SIDE: Bounds = {"minimum": SIZE_MULTIPLE, "maximum": MAX_SIDE, "multiple": SIZE_MULTIPLE}
TILE_MODES = ("exact", "blend", "off")
BLEND_TILE = 512  # px of a blended tile's side, unless another is named
TILE_OVERLAP = 64  # px
STRENGTH = 0.6
MASK_ALPHA = "alpha"  # as a mask: the transparent pixels of the image
MAX_BLUR = 512  # px
CONTROL_FLOWS = ("publisher", "diffusers")
CONTROL_PREPROCESS = ("canny",)
MAX_TIMEOUT = 86_400  # seconds


@dataclass(frozen=True)
class Request(SamplingSettings):
    """One call of the pipeline. None means: what the checkpoint's kind asks for (`ZImage.prepare` fills it in).

    `prompt` may be a list; `seed` a single number, one per prompt, or one per image. `image`, `mask` and `embeddings`
    are paths or objects: PIL pictures, and a tensor (L, caption width). Raises RequestError with the fields at fault.
    """

    prompt: str | list[str] = setting("", "What to draw.", group="Text", per_call=True, longest=LONGEST_TEXT)
    negative: str | None = setting(
        None,
        "What to steer away from; needs --guidance above 0 or --nag above 1. Default: an empty prompt.",
        group="Text",
        longest=LONGEST_TEXT,
    )
    embeddings: Attachment = setting(
        None,
        "Caption embeddings saved by `encode`, in place of a prompt.",
        group="Text",
        metavar="FILE",
        attachment=True,
    )
    width: int | None = setting(
        None, "Width in pixels. Default: the image's, else the checkpoint's.", group="Picture", **SIDE
    )
    height: int | None = setting(
        None, "Height in pixels. Default: the image's, else the checkpoint's.", group="Picture", **SIDE
    )
    aspect: str | None = setting(
        None,
        "Proportions of the picture, such as 3:2, in place of width and height; its area is that of the checkpoint's "
        "usual square.",
        group="Picture",
        metavar="WIDTH:HEIGHT",
        longest=40,
    )
    image: Attachment = setting(
        None, "Picture to start from, instead of pure noise.", group="Picture", metavar="FILE", attachment=True
    )
    strength: float | None = setting(
        None,
        "How much to change the image, or the first pass of --hires; 1 starts from pure noise. "
        f"Default: {STRENGTH}, with a mask or --extend 1.",
        group="Picture",
        above=0,
        maximum=1,
    )
    mask: Attachment = setting(
        None,
        "Mask of the image: white areas are repainted, grey ones as by that --strength. "
        f"'{MASK_ALPHA}': the image's transparent areas.",
        group="Picture",
        metavar="FILE",
        attachment=True,
    )
    mask_invert: bool = setting(False, "Repaint the black areas of the mask instead of the white.", group="Picture")
    mask_blur: float | None = setting(
        None,
        "Blur the mask by this standard deviation in pixels. Default: not at all.",
        group="Picture",
        metavar="PX",
        minimum=0,
        maximum=MAX_BLUR,
    )
    mask_crop: int | None = setting(
        None,
        "Render only the masked region and this many pixels around it, at full size. Default: the whole picture.",
        group="Picture",
        metavar="PX",
        minimum=0,
        maximum=MAX_SIDE,
    )
    extend: str | None = setting(
        None,
        "Extend the image by these many pixels, which are painted too.",
        group="Picture",
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        per_call=True,
        longest=100,
    )
    paste: bool = setting(
        True,
        "Keep the image's own pixels outside the mask, up to a soft edge; without, the mask is cut at one half and the "
        "whole picture passes through the VAE.",
        group="Picture",
    )
    hires: float | None = setting(
        None,
        "Render at the size divided by this first, then enlarge and refine. Default: one pass.",
        group="Picture",
        above=1,
        maximum=8,
    )
    control: Conditions = setting(
        None,
        "ControlNet, a picture that it follows, and the scale of its hints; repeat it to add several. "
        "Default: none, and a scale of 0.75.",
        group="Picture",
        metavar=Control.FORM,
        condition=Control,
    )
    control_start: float = setting(
        0.0,
        "Apply ControlNets from this fraction of the steps on; a step counts if it lies wholly between "
        "--control-start and --control-end.",
        group="Picture",
        minimum=0,
        maximum=1,
    )
    control_end: float = setting(
        1.0, "Apply ControlNets up to this fraction of the steps.", group="Picture", minimum=0, maximum=1
    )
    control_flow: str | None = setting(
        None,
        "Where ControlNets of version 2 and later add their hints in the noise refiner: to the DiT's own stream, as "
        "their publisher does, or to a copy, as diffusers does, which also inpaints from noise alone. "
        "Default: publisher.",
        group="Picture",
        choices=CONTROL_FLOWS,
    )
    control_preprocess: str | None = setting(
        None,
        "Make control pictures first: canny draws the edges of each. Default: use them as they are.",
        group="Picture",
        choices=CONTROL_PREPROCESS,
    )
    images: int = setting(1, "Images per prompt.", group="Picture", flag="-n", minimum=1, maximum=10_000)
    tile_mode: str | None = setting(
        None,
        "Decode in exact strips, in blended tiles, or whole (off). "
        "Default: exact where the whole would take more than 3 GB or does not fit in memory, else off.",
        group="Decoding",
        choices=TILE_MODES,
    )
    tile_size: int | None = setting(
        None,
        "Height of exact strips or side of blended tiles in pixels. "
        f"Default: chosen for each layer; blend: {BLEND_TILE}.",
        group="Decoding",
        **SIDE,
    )
    tile_overlap: int = setting(
        TILE_OVERLAP, "Overlap of blended tiles in pixels.", group="Decoding", minimum=0, maximum=MAX_SIDE
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_sources()
        self._check_aspect()
        tile = self.tile_size or BLEND_TILE
        if self.tile_mode == "blend" and self.tile_overlap >= tile:
            text = f"tile_overlap {self.tile_overlap} must be below the tile_size {tile}"
            raise RequestError(text, fields=("tile_overlap", "tile_size"))
        if not self.prompts:
            raise RequestError("prompt: the list is empty; pass at least one prompt", fields=("prompt",))
        if self.negative is not None and self.guidance == 0 and self.nag == 1:
            text = "negative: it has no effect at guidance 0; pass a guidance above 0 or a nag above 1, or leave it out"
            raise RequestError(text, fields=("negative", "guidance", "nag"))
        if isinstance(self.seed, list) and len(self.seed) not in (len(self.prompts), self.count):
            text = f"pass one seed, one per prompt ({len(self.prompts)}) or one per image ({self.count})"
            raise RequestError(f"seed: the list has {len(self.seed)}; {text}", fields=("seed", "prompt", "images"))

    def _check_aspect(self) -> None:
        if self.aspect is None:
            return
        split_aspect(self.aspect)
        if sides := [name for name in ("width", "height") if getattr(self, name) is not None]:
            told = f"{' and '.join(sides)} {'are' if len(sides) > 1 else 'is'} set too"
            text = f"aspect: {told}; pass either the proportions or the sides"
            raise RequestError(text, fields=("aspect", *sides))

    def _check_sources(self) -> None:
        """What a picture may be made of, and what goes with what."""
        if self.mask is not None and self.image is None:
            text = "mask: it has no effect without an image; pass the image that it belongs to"
            raise RequestError(text, fields=("mask", "image"))
        self._check_masking()
        if self.strength is not None and self.image is None and self.hires is None:
            text = "strength: it has no effect without an image or hires; pass one of them or leave it out"
            raise RequestError(text, fields=("strength", "image", "hires"))
        if self.hires is not None and self.image is not None:
            text = "hires: it does not work with an image to start from; pass only one of them"
            raise RequestError(text, fields=("hires", "image"))
        self._check_control()
        if self.embeddings is not None and self.prompt:
            text = "embeddings: they replace the prompt; pass only one of them"
            raise RequestError(text, fields=("embeddings", "prompt"))
        parts = [name for name in (*TEXT_PARTS, "weights_in_prompt") if getattr(self, name)]
        if self.embeddings is not None and parts:
            text = f"embeddings: they contain the whole text; leave out {', '.join(parts)}"
            raise RequestError(text, fields=("embeddings", *parts))

    def _check_control(self) -> None:
        """How ControlNets are used, which says nothing where there are none."""
        idle = {"control_start": 0.0, "control_end": 1.0, "control_flow": None, "control_preprocess": None}
        unused = [name for name, default in idle.items() if getattr(self, name) != default]
        if unused and not self.control:
            text = f"{unused[0]}: it has no effect without a control file; pass control or leave it out"
            raise RequestError(text, fields=(unused[0], "control"))
        if self.control_start >= self.control_end:
            text = f"control_start {self.control_start:g} must be below the control_end {self.control_end:g}"
            raise RequestError(text, fields=("control_start", "control_end"))

    def _check_masking(self) -> None:
        """What goes with a mask, or with an image that is extended."""
        if self.extend is not None:
            split_margins(self.extend)
        if self.extend is not None and self.image is None:
            text = "extend: it has no effect without an image; pass the image to extend"
            raise RequestError(text, fields=("extend", "image"))
        if self.mask_invert and self.mask is None:
            raise RequestError("mask_invert: it has no effect without a mask", fields=("mask_invert", "mask"))
        for name in ("mask_blur", "mask_crop"):
            if getattr(self, name) is not None and self.mask is None and self.extend is None:
                text = f"{name}: it has no effect without a mask or extend; pass one of them or leave it out"
                raise RequestError(text, fields=(name, "mask", "extend"))
        if self.mask_crop is not None and not self.paste:
            text = "mask_crop: the region that it renders is pasted back; leave it out, or paste on"
            raise RequestError(text, fields=("mask_crop", "paste"))

    @property
    def prompts(self) -> list[str]:
        return self.prompt if isinstance(self.prompt, list) else [self.prompt]

    @property
    def count(self) -> int:
        """Images in all."""
        return len(self.prompts) * self.images

    @property
    def seeds(self) -> list[int]:
        """One seed per image, prompt by prompt; needs a request with a seed. Variations of one seed all have that."""
        known = [seed for seed in self.chosen_seeds if seed is not None]
        if len(known) < self.count:
            raise RequestError("seed: it is still open; prepare the request first", fields=("seed",))
        return known

    @property
    def chosen_seeds(self) -> list[int | None]:
        """One seed per image, prompt by prompt, None where a random one is wanted."""
        seeds = self.seed if isinstance(self.seed, list) else [self.seed] * len(self.prompts)
        later = 1 if self.variation is None else 0
        if len(seeds) != self.count:
            return [_later(seed, k * later) for seed in seeds for k in range(self.images)]
        return [_later(seed, 0) for seed in seeds]

    @property
    def variations(self) -> list[tuple[int, float]]:
        """The other seed of each image, which may be open, and its weight, prompt by prompt; with a variation."""
        seed, weight = split_variation(self.variation or "0:0")
        seeds = [either(_later(seed, k), RANDOM_SEED) for k in range(self.images)]
        return [(seed, weight) for _ in self.prompts for seed in seeds]

    def single(self, index: int) -> dict[str, Any]:
        """What makes a request for one of the images of this one; without a seed where that is open."""
        own = {"prompt": self.prompts[index // self.images], "seed": self.chosen_seeds[index], "images": 1}
        return own if self.variation is None else {**own, "variation": "{}:{}".format(*self.variations[index])}


def _later(seed: int | None, k: int) -> int | None:
    """The seed of image k of a prompt, where its first is chosen."""
    return None if seed is None or is_open(seed) else (seed + k) % (MAX_SEED + 1)


def split_aspect(text: str) -> float:
    """WIDTH:HEIGHT → width over height. Raises RequestError unless both are numbers above 0, of like size."""
    try:
        width, height = map(float, text.split(":"))
        ratio = width / height if min(width, height) > 0 else 0.0
    except ValueError:
        ratio = 0.0
    if not 1 / MAX_ASPECT <= ratio <= MAX_ASPECT:
        told = f"should be WIDTH:HEIGHT, such as 3:2, up to {MAX_ASPECT}:1 and 1:{MAX_ASPECT}"
        raise RequestError(f"aspect {quoted(text)} {told}", fields=("aspect",))
    return ratio


def split_margins(text: str) -> tuple[int, int, int, int]:
    """LEFT,TOP,RIGHT,BOTTOM → pixels. Raises RequestError unless one is above 0 and none below, or above MAX_SIDE."""
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdecimal() and len(number) < 10 for number in numbers):
        told = "should be four numbers of pixels, LEFT,TOP,RIGHT,BOTTOM, such as 0,0,256,0"
        raise RequestError(f"extend {quoted(text)} {told}", fields=("extend",))
    left, top, right, bottom = (int(number) for number in numbers)
    if not 0 < max(left, top, right, bottom) <= MAX_SIDE:
        told = f"should extend one side at least, and none by more than {MAX_SIDE:,} px"
        raise RequestError(f"extend {quoted(text)} {told}", fields=("extend",))
    return left, top, right, bottom
