"""What a render is asked for: one dataclass field per parameter, declared once.

A field's type, default, bounds, group and help make the command-line flag, the key in TOML files, the keyword of
`ZImage.generate`, the check of the value and the entry in the PNG's metadata. What a field is: `settings.fields`.
"""

from dataclasses import dataclass
from typing import TypedDict

from zimage.errors import RequestError, quoted
from zimage.settings.conditions import Control, Reference
from zimage.settings.fields import Attachment, Conditions, Settings, Weights, check_fields, setting


class Bounds(TypedDict):
    """Bounds that several fields share."""

    minimum: int
    maximum: int
    multiple: int


SIZE_MULTIPLE = 16
MAX_SIDE = 16_384
SIDE: Bounds = {"minimum": SIZE_MULTIPLE, "maximum": MAX_SIDE, "multiple": SIZE_MULTIPLE}
MAX_SEED = 2**63 - 1
TILE_MODES = ("exact", "blend", "off")
BLEND_TILE = 512  # px of a blended tile's side, unless another is named
TILE_OVERLAP = 64  # px
VISION_BLENDS = ("interpolate", "linear", "concat", "style_only", "graduated", "attention_weighted", "adain")
VISION_TOKENS = ("image", "all")
LONG_PROMPTS = ("none", "truncate", "interpolate", "pool", "attention_pool")
TEXT_PARTS = ("template", "system_prompt", "thinking_content", "assistant_content")
LONGEST_TEXT = 100_000  # characters of a prompt or a chat part; some sixty pages
MAX_TEXT_TOKENS = 32_768  # of a whole text: what Qwen3 was trained for, twenty times what the DiT was
HIDDEN_LAYER = -2  # what the model was trained with: the output of the last layer but one, without a norm
STRENGTH = 0.6
MASK_ALPHA = "alpha"  # as a mask: the transparent pixels of the image
MAX_BLUR = 512  # px
CONTROL_FLOWS = ("publisher", "diffusers")
CONTROL_PREPROCESS = ("canny",)
MAX_TIMEOUT = 86_400  # seconds


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """How a prompt becomes a caption. None means: what the template says, else nothing.

    Raises RequestError with the fields at fault.
    """

    template: str | None = setting(None, "Template that supplies the chat parts that no option sets.", group="Text")
    system_prompt: str | None = setting(None, "System message before the prompt.", group="Text", longest=LONGEST_TEXT)
    thinking_content: str | None = setting(
        None, "Content of the think block, as if the model had thought it.", group="Text", longest=LONGEST_TEXT
    )
    assistant_content: str | None = setting(
        None,
        "Assistant message after the prompt, as if the model had written it.",
        group="Text",
        longest=LONGEST_TEXT,
    )
    force_think_block: bool | None = setting(
        None, "Always or never write a think block. Default: only if it has content.", group="Text"
    )
    strip_quotes: bool = setting(False, 'Remove " from all chat parts: the model paints quoted text.', group="Text")
    hidden_layer: int | None = setting(
        None,
        "Layer of the text encoder to use, counted from the end; the first is the token embeddings. "
        f"Default: {HIDDEN_LAYER}.",
        group="Text",
        minimum=-1000,
        maximum=-1,
    )
    layer_weights: Weights | None = setting(
        None, "Weighted blend of several layers, instead of one.", group="Text", metavar="LAYER:WEIGHT,…"
    )
    long_prompt: str = setting(
        "none",
        "How to shorten captions beyond the trained length; 'none' keeps all tokens and warns.",
        group="Text",
        choices=LONG_PROMPTS,
    )

    def __post_init__(self):
        check_fields(self)
        if self.layer_weights is not None and self.hidden_layer is not None:
            text = "layer_weights: hidden_layer is set too; pass only one of them"
            raise RequestError(text, fields=("layer_weights", "hidden_layer"))
        if self.force_think_block is False and self.thinking_content:
            text = "thinking_content: it needs a think block, but force_think_block is off"
            raise RequestError(text, fields=("thinking_content", "force_think_block"))

    @property
    def layers(self) -> Weights:
        """Each layer that the caption is made of, with its weight."""
        return self.layer_weights or {HIDDEN_LAYER if self.hidden_layer is None else self.hidden_layer: 1.0}


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(TextSettings):
    """The same with pictures: how captions of references are made and mixed in. Raises RequestError."""

    reference: Conditions = setting(
        None,
        "Picture that the prompt's caption is mixed with, or what `see` saved of one, and how much of it, from 0 to 1; "
        "repeat it to add several. Default: none, and 0.3 of each.",
        group="References",
        metavar=Reference.FORM,
        condition=Reference,
    )
    vision_blend: str = setting(
        VISION_BLENDS[0],
        "How a reference's caption is mixed with the prompt's: resampled to its length (interpolate), then only in the "
        "last third of the dimensions (style_only), more towards the end (graduated) or sparing what matters "
        "(attention_weighted); at the longer length (linear); behind it (concat; ALPHA is the share of its tokens); or "
        "by mean and deviation alone (adain).",
        group="References",
        choices=VISION_BLENDS,
    )
    vision_layer: int = setting(
        HIDDEN_LAYER,
        "Layer at which references are read, counted from the end; some find -6 or -8 cleaner.",
        group="References",
        minimum=-1000,
        maximum=-1,
    )
    vision_tokens: str = setting(
        VISION_TOKENS[0],
        "Which tokens of a reference are used: its image tokens, or all, including the text around it.",
        group="References",
        choices=VISION_TOKENS,
    )
    vision_text: str = setting(
        "",
        "Text that is read after each reference; needs --vision-tokens all, since image tokens come before it.",
        group="References",
        longest=LONGEST_TEXT,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reference and self.vision_text and self.vision_tokens == VISION_TOKENS[0]:
            text = "vision_text: image tokens come before it and do not see it; pass vision_tokens all, or leave it out"
            raise RequestError(text, fields=("vision_text", "vision_tokens"))


@dataclass(frozen=True)
class Request(CaptionSettings):
    """One call of the pipeline. None means: what the checkpoint's kind asks for (`ZImage.prepare` fills it in).

    `prompt` may be a list; `seed` a single number, one per prompt, or one per image. `image`, `mask` and `embeddings`
    are paths or objects: PIL pictures, and a tensor (L, caption width). Raises RequestError with the fields at fault.
    """

    prompt: str | list[str] = setting("", "What to draw.", group="Text", per_call=True, longest=LONGEST_TEXT)
    negative: str | None = setting(
        None,
        "What to steer away from; needs --guidance above 0. Default: an empty prompt.",
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
    steps: int | None = setting(
        None,
        "Denoising steps, one model evaluation each. Default: 8 (Turbo) or 30 (Base).",
        group="Sampling",
        minimum=1,
        maximum=1000,
    )
    seed: int | list[int] | None = setting(
        None,
        "Seed of the noise; image k of a prompt uses seed + k. Default: random, and reported.",
        group="Sampling",
        minimum=0,
        maximum=MAX_SEED,
    )
    guidance: float | None = setting(
        None,
        "Classifier-free guidance; 0 is off. Default: 0 (Turbo) or 4 (Base).",
        group="Sampling",
        minimum=0,
        maximum=100,
    )
    shift: float | None = setting(
        None,
        "Shift of the noise schedule. Default: from the checkpoint's scheduler config.",
        group="Sampling",
        above=0,
        maximum=100,
    )
    cfg_truncation: float = setting(
        1.0, "Turn guidance off on steps where 1 − sigma exceeds this.", group="Sampling", minimum=0, maximum=1
    )
    cfg_normalization: float = setting(
        0.0,
        "Limit the guided velocity's norm to this multiple of the unguided norm; 0 is off.",
        group="Sampling",
        minimum=0,
        maximum=100,
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
    batch_size: int = setting(
        1,
        "Images denoised together; above 1 the bits depend on the batch. Helps on large GPUs only.",
        group="Sampling",
        minimum=1,
        maximum=1024,
    )
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
        tile = self.tile_size or BLEND_TILE
        if self.tile_mode == "blend" and self.tile_overlap >= tile:
            text = f"tile_overlap {self.tile_overlap} must be below the tile_size {tile}"
            raise RequestError(text, fields=("tile_overlap", "tile_size"))
        if not self.prompts:
            raise RequestError("prompt: the list is empty; pass at least one prompt", fields=("prompt",))
        if self.negative is not None and self.guidance == 0:
            text = "negative: it has no effect at guidance 0; pass a guidance above 0 or leave it out"
            raise RequestError(text, fields=("negative", "guidance"))
        if isinstance(self.seed, list) and len(self.seed) not in (len(self.prompts), self.count):
            text = f"pass one seed, one per prompt ({len(self.prompts)}) or one per image ({self.count})"
            raise RequestError(f"seed: the list has {len(self.seed)}; {text}", fields=("seed", "prompt", "images"))

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
        parts = [name for name in TEXT_PARTS if getattr(self, name)]
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
        """One seed per image, prompt by prompt; needs a request with a seed."""
        if self.seed is None:
            raise RequestError("seed: it is still open; prepare the request first", fields=("seed",))
        seeds = self.seed if isinstance(self.seed, list) else [self.seed] * len(self.prompts)
        if len(seeds) == self.count:
            return seeds
        return [(seed + k) % (MAX_SEED + 1) for seed in seeds for k in range(self.images)]


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
