"""What a render is asked for and how a model is loaded: one dataclass field per parameter, declared once.

A field's type, default, bounds, group and help make the command-line flag, the key in TOML files, the keyword of
`ZImage.generate`, the check of the value and the entry in the PNG's metadata. What a field is: `settings.fields`.
"""

from dataclasses import dataclass
from typing import Any

from zimage.errors import RequestError
from zimage.settings.fields import Settings, Weights, check_fields, setting

SIZE_MULTIPLE = 16
MAX_SIDE = 16_384
MAX_SEED = 2**63 - 1
SDPA = ("sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math")
ATTENTIONS = ("auto", *SDPA, "flash3", "flash2", "xformers", "sage")
TILE_MODES = ("exact", "blend", "off")
MAX_LORA_SCALE = 100.0
BLEND_TILE = 512  # px of a blended tile's side, unless another is named
TILE = {"minimum": SIZE_MULTIPLE, "maximum": MAX_SIDE, "multiple": SIZE_MULTIPLE}
LONG_PROMPTS = ("none", "truncate", "interpolate", "pool", "attention_pool")
HIDDEN_LAYER = -2  # what the model was trained with: the output of the last layer but one, without a norm
STRENGTH = 0.6
TEXT_PARTS = ("template", "system_prompt", "thinking_content", "assistant_content")
SIDE = {"minimum": SIZE_MULTIPLE, "maximum": MAX_SIDE, "multiple": SIZE_MULTIPLE}


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """How a prompt becomes a caption. None means: what the template says, else nothing.

    Raises RequestError by the field's name.
    """

    template: str | None = setting(None, "Template whose parts are used where none is given here.", group="Text")
    system_prompt: str | None = setting(None, "Text of a system turn before the prompt.", group="Text")
    thinking_content: str | None = setting(None, "What the model is made to have thought.", group="Text")
    assistant_content: str | None = setting(None, "What the model is made to have answered.", group="Text")
    force_think_block: bool | None = setting(
        None, "Write a think block, empty or not, or none at all. Default: one where there is content.", group="Text"
    )
    strip_quotes: bool = setting(False, 'Remove " from all parts; the model paints quoted text.', group="Text")
    hidden_layer: int | None = setting(
        None,
        "Layer of the text encoder to take, counted from the end; the tokens' own embeddings come first. Default: -2.",
        group="Text",
        minimum=-1000,
        maximum=-1,
    )
    layer_weights: Weights | None = setting(
        None, "Blend of several layers instead, by weights.", group="Text", metavar="LAYER:WEIGHT,…"
    )
    long_prompt: str = setting(
        "none",
        "What happens to captions past the trained length: none keeps all of it (with a warning), the others shorten.",
        group="Text",
        choices=LONG_PROMPTS,
    )

    def __post_init__(self):
        check_fields(self)
        if self.layer_weights is not None and self.hidden_layer is not None:
            raise RequestError(
                "layer_weights: hidden_layer is given too; give one of them", fields=("layer_weights", "hidden_layer")
            )
        if self.force_think_block is False and self.thinking_content:
            raise RequestError(
                "thinking_content: it needs a think block, and force_think_block is off",
                fields=("thinking_content", "force_think_block"),
            )

    @property
    def layers(self) -> Weights:
        """Each layer that the caption is made of, with its weight."""
        return self.layer_weights or {HIDDEN_LAYER if self.hidden_layer is None else self.hidden_layer: 1.0}


@dataclass(frozen=True)
class Request(TextSettings):
    """One call of the pipeline. None means: what the checkpoint's kind asks for (`ZImage.resolve` fills it in).

    `prompt` may be a list; `seed` a single number, one per prompt, or one per image. `image`, `mask` and `embeddings`
    are paths or objects: PIL pictures, and a tensor (L, caption width). Raises RequestError by the field's name.
    """

    prompt: str | list[str] = setting("", "What to draw.", group="Text", per_call=True)
    negative: str | None = setting(
        None, "What to steer away from; needs --guidance above 0. Default: empty text.", group="Text"
    )
    embeddings: Any = setting(
        None,
        "Caption embeddings saved by `encode`, in the place of a prompt.",
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
        "Denoising steps, each one model evaluation. Default: 8 (Turbo) or 30 (Base).",
        group="Sampling",
        minimum=1,
        maximum=1000,
    )
    seed: int | list[int] | None = setting(
        None,
        "Seed of the noise; image k of a prompt uses seed + k. Default: drawn and reported.",
        group="Sampling",
        minimum=0,
        maximum=MAX_SEED,
    )
    guidance: float | None = setting(
        None,
        "Classifier-free guidance, counted from 0 (off). Default: 0 (Turbo) or 4 (Base).",
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
        1.0, "Guidance is off on steps where 1 − sigma is past this.", group="Sampling", minimum=0, maximum=1
    )
    cfg_normalization: float = setting(
        0.0,
        "Scale a guided velocity back to this many times the unguided length; 0: off.",
        group="Sampling",
        minimum=0,
        maximum=100,
    )
    image: Any = setting(
        None, "Picture to start from instead of pure noise.", group="Picture", metavar="FILE", attachment=True
    )
    strength: float | None = setting(
        None,
        f"How far from the image, or from the first pass of --hires: 1 starts from pure noise. "
        f"Default: {STRENGTH}, with a mask 1.",
        group="Picture",
        above=0,
        maximum=1,
    )
    mask: Any = setting(
        None, "Picture that is white where the image is painted anew.", group="Picture", metavar="FILE", attachment=True
    )
    hires: float | None = setting(
        None,
        "Render first at the size divided by this, then enlarge and refine. Default: in one pass.",
        group="Picture",
        above=1,
        maximum=8,
    )
    images: int = setting(1, "Images per prompt.", group="Picture", flag="-n", minimum=1, maximum=10_000)
    batch_size: int = setting(
        1,
        "Images denoised together. Above 1 the bits depend on the batch; helps on large GPUs only.",
        group="Sampling",
        minimum=1,
        maximum=1024,
    )
    tile_mode: str | None = setting(
        None,
        "How the picture is cut for decoding: exact strips, blended tiles or not at all. "
        "Default: exact where the whole would take more than 3 GB or does not fit in memory, else off.",
        group="Decoding",
        choices=TILE_MODES,
    )
    tile_size: int | None = setting(
        None,
        "Height of exact strips or side of blended tiles in pixels. Default: by the map; blend: 512.",
        group="Decoding",
        **TILE,
    )
    tile_overlap: int = setting(
        64, "Overlap of blended tiles in pixels.", group="Decoding", minimum=0, maximum=MAX_SIDE
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_sources()
        if self.tile_mode == "blend" and self.tile_overlap >= (self.tile_size or BLEND_TILE):
            raise RequestError(
                f"tile_overlap {self.tile_overlap} must be below the tile_size {self.tile_size or BLEND_TILE}",
                fields=("tile_overlap", "tile_size"),
            )
        if not self.prompts:
            raise RequestError("prompt: the list is empty; give at least one prompt", fields=("prompt",))
        if self.negative is not None and self.guidance == 0:
            raise RequestError(
                "negative: it has no effect at guidance 0; give a guidance above 0 or leave it out",
                fields=("negative", "guidance"),
            )
        if isinstance(self.seed, list) and len(self.seed) not in (len(self.prompts), self.count):
            raise RequestError(
                f"seed: {len(self.seed)} seeds were given; give one, one per prompt ({len(self.prompts)}) "
                f"or one per image ({self.count})",
                fields=("seed", "prompt", "images"),
            )

    def _check_sources(self) -> None:
        """What a picture may be made of, and what goes with what."""
        if self.mask is not None and self.image is None:
            raise RequestError(
                "mask: it has no effect without an image; give the image that it belongs to", fields=("mask", "image")
            )
        if self.strength is not None and self.image is None and self.hires is None:
            raise RequestError(
                "strength: it has no effect without an image or hires; give one or leave it out",
                fields=("strength", "image", "hires"),
            )
        if self.hires is not None and self.image is not None:
            raise RequestError(
                "hires: an image to start from is given too; give one of them", fields=("hires", "image")
            )
        if self.embeddings is not None and self.prompt:
            raise RequestError(
                "embeddings: a prompt is given too, which they replace; give one of them",
                fields=("embeddings", "prompt"),
            )
        parts = [name for name in TEXT_PARTS if getattr(self, name)]
        if self.embeddings is not None and parts:
            text = f"embeddings: they hold the whole text; leave out {', '.join(parts)}"
            raise RequestError(text, fields=("embeddings", *parts))

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
        None,
        "Model folder in the published layout, or an all-in-one file. Default: the bundled demo model.",
        group="Model",
        env="ZIMAGE_MODEL",
        path=True,
    )
    dit: str | None = setting(
        None, "DiT from a loose file (safetensors or GGUF) or component folder.", group="Model", path=True
    )
    text_encoder: str | None = setting(
        None, "Text encoder from a loose file or component folder.", group="Model", path=True
    )
    vae: str | None = setting(None, "VAE from a loose file or component folder.", group="Model", path=True)
    tokenizer: str | None = setting(
        None, "Folder with tokenizer.json. Default: the model's, or beside the encoder.", group="Model", path=True
    )
    variant: str | None = setting(
        None, "What loose files are: turbo (shift 3) or base (shift 6).", choices=("turbo", "base"), group="Model"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps.", group="Machine")
    text_encoder_device: str | None = setting(
        None, "Where the text encoder runs. Default: as --device.", group="Machine"
    )
    dit_device: str | None = setting(None, "Where the DiT runs. Default: as --device.", group="Machine")
    vae_device: str | None = setting(None, "Where the VAE runs. Default: as --device.", group="Machine")
    dtype: str | None = setting(
        None,
        "Default: bf16 on GPUs and on CPUs that compute in it, else fp32.",
        choices=("bf16", "fp32"),
        group="Machine",
    )
    attention: str | None = setting(
        None,
        "Attention backend; sage is lossy. Default: auto.",
        choices=ATTENTIONS,
        group="Machine",
        env="ZIMAGE_ATTENTION",
    )
    precision: str = setting(
        "bf16",
        "Matrix products of the DiT: bf16 (as --dtype says), int8 or fp8, with scales per token and channel.",
        choices=("bf16", "int8", "fp8"),
        group="Machine",
    )
    compile: bool = setting(False, "Compile the DiT's blocks: some seconds once, then quicker steps.", group="Machine")
    residency: str = setting(
        "auto",
        "keep all weights in memory between stages, load each stage in its turn, or decide by the memory there is.",
        choices=("auto", "keep", "stage"),
        group="Machine",
    )
    lora: list[str] | None = setting(
        None,
        "LoRA file (.safetensors) and its scale, else 1; several add up. Default: none.",
        metavar="PATH[:SCALE]",
        group="Model",
        path=True,
    )
    memory: float | None = setting(
        None,
        "GB (10⁹ bytes) a render may take on its device; on the CPU the whole process. What does not fit is loaded "
        "stage by stage, decoded in strips, streamed block by block. Default: by the free memory.",
        above=0,
        maximum=1_000_000,
        group="Machine",
    )
    templates: str | None = setting(
        None,
        "Folder with templates of your own, which come before those of the same name that are shipped.",
        group="Text",
        metavar="FOLDER",
        env="ZIMAGE_TEMPLATES",
        path=True,
    )
    cache_entries: int = setting(
        100,
        "Captions kept in memory, so that a prompt is encoded once; 0: none.",
        group="Text",
        minimum=0,
        maximum=1_000_000,
    )
    cache_folder: str | None = setting(
        None, "Folder to keep captions in between runs. Default: none.", group="Text", metavar="FOLDER", path=True
    )

    def __post_init__(self):
        check_fields(self)
        for text in self.lora or []:
            split_lora(text)


@dataclass(frozen=True)
class Sampling(Settings):
    """How the next token of a text is drawn. Raises RequestError by the field's name."""

    temperature: float = setting(
        0.6, "0: always the likeliest token; above, the more the freer.", group="Rewriting", minimum=0, maximum=5
    )
    top_p: float = setting(
        0.95,
        "Draw from the likeliest tokens that together have this probability; 1: off.",
        group="Rewriting",
        above=0,
        maximum=1,
    )
    top_k: int = setting(20, "Draw from this many of the likeliest tokens; 0: off.", group="Rewriting", minimum=0)
    min_p: float = setting(
        0.0,
        "Leave out tokens with less than this part of the likeliest one's probability.",
        group="Rewriting",
        minimum=0,
        maximum=1,
    )
    presence_penalty: float = setting(
        0.0,
        "Taken once from the logit of every token already written: fewer repetitions.",
        group="Rewriting",
        minimum=0,
        maximum=2,
    )

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class RewriteSettings(Sampling):
    """How a prompt is rewritten before it is drawn. Raises RequestError by the field's name."""

    rewriter: str | None = setting(
        None,
        "Rewrite prompts first, by a template of the category rewriter.",
        group="Rewriting",
        flag="--rewrite",
        metavar="NAME",
    )
    rewriter_url: str | None = setting(
        None,
        "Server with OpenAI's chat completions that rewrites, in the place of the model's own text encoder; "
        "its key is the environment's ZIMAGE_REWRITER_KEY.",
        group="Rewriting",
        metavar="URL",
        env="ZIMAGE_REWRITER_URL",
    )
    rewriter_model: str = setting("default", "Name of the server's model.", group="Rewriting")
    rewriter_timeout: float = setting(
        120.0, "Seconds to wait for the server.", group="Rewriting", above=0, maximum=86_400
    )
    rewrite_thinking: bool = setting(
        False, "Let it think before it answers; thoughts are not drawn.", group="Rewriting"
    )
    max_tokens: int = setting(
        512, "Tokens that are written at most, thoughts included.", group="Rewriting", minimum=1, maximum=32_768
    )
    rewrite_seed: int | None = setting(
        None, "Seed of the rewriting. Default: drawn and reported.", group="Rewriting", minimum=0, maximum=MAX_SEED
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rewrite_thinking and self.rewriter_url:
            raise RequestError(
                "rewrite_thinking: the server at the rewriter_url decides that itself; leave it out",
                fields=("rewrite_thinking", "rewriter_url"),
            )


ALL_SETTINGS = (Request, LoadSettings, RewriteSettings)


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
        raise RequestError(f"lora scale {scale!r} is a {type(scale).__name__}; it should be a number", fields=("lora",))
    if not abs(scale) <= MAX_LORA_SCALE:  # nor NaN
        text = f"lora scale {scale} should lie between -{MAX_LORA_SCALE:g} and {MAX_LORA_SCALE:g}"
        raise RequestError(text, fields=("lora",))
