"""What a render is asked for and how a model is loaded: one dataclass field per parameter, declared once.

A field's type, default, bounds, group and help make the command-line flag, the key in TOML files, the keyword of
`ZImage.generate`, the check of the value and the entry in the PNG's metadata. What a field is: `settings.fields`.
"""

import os
from dataclasses import dataclass
from typing import TypedDict

from zimage.errors import RequestError, quoted
from zimage.settings.conditions import Control, Reference, split_number
from zimage.settings.environment import ENCODER_TOKEN, REWRITER_KEY
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
SDPA = ("sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math")
ATTENTIONS = ("auto", *SDPA, "flash3", "flash2", "xformers", "sage")
DTYPES = ("bf16", "fp16", "float16", "fp32")
PRECISIONS = ("bf16", "int8", "fp8")
VARIANTS = ("turbo", "base")
RESIDENCIES = ("auto", "keep", "stage")
TILE_MODES = ("exact", "blend", "off")
BLEND_TILE = 512  # px of a blended tile's side, unless another is named
TILE_OVERLAP = 64  # px
VISION_BLENDS = ("interpolate", "linear", "concat", "style_only", "graduated", "attention_weighted", "adain")
VISION_TOKENS = ("image", "all")
VISION_MODES = ("full", "tower")
LONG_PROMPTS = ("none", "truncate", "interpolate", "pool", "attention_pool")
TEXT_PARTS = ("template", "system_prompt", "thinking_content", "assistant_content")
LONGEST_TEXT = 100_000  # characters of a prompt or a chat part; some sixty pages
MAX_TEXT_TOKENS = 32_768  # of a whole text: what Qwen3 was trained for, twenty times what the DiT was
HIDDEN_LAYER = -2  # what the model was trained with: the output of the last layer but one, without a norm
STRENGTH = 0.6
MASK_ALPHA = "alpha"  # as a mask: the transparent pixels of the image
MAX_BLUR = 512  # px
MAX_LORA_SCALE = 100.0
CONTROL_FLOWS = ("publisher", "diffusers")
CONTROL_PREPROCESS = ("canny",)
LORA_PARTS = ("text_encoder",)
DEFAULT_REWRITER = "rewrite-expand"
MAX_TOKENS = 512
REWRITER_TIMEOUT = 120.0  # seconds
ENCODER_TIMEOUT = 120.0  # seconds
ENCODER_FORMS = ("zimage", "hidden_states")
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
        "What is taken of a reference that is read: its image tokens, or all, the text round it included.",
        group="References",
        choices=VISION_TOKENS,
    )
    vision_text: str = setting(
        "",
        "Text that is read behind each reference. Image tokens come before it, so it shows with --vision-tokens all.",
        group="References",
        longest=LONGEST_TEXT,
    )


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
        "Let ControlNets have a say from this fraction of the steps on; a step counts where it lies wholly between "
        "--control-start and --control-end.",
        group="Picture",
        minimum=0,
        maximum=1,
    )
    control_end: float = setting(
        1.0, "Let them have a say up to this fraction of the steps.", group="Picture", minimum=0, maximum=1
    )
    control_flow: str | None = setting(
        None,
        "Where control files of version 2 and later add along the noise refiner: to the DiT's own stream, as their "
        "publisher does, or to a copy, as diffusers does, which also inpaints from noise alone. Default: publisher.",
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


@dataclass(frozen=True)
class LoadSettings(Settings):
    """How a model is loaded. Raises RequestError with the fields at fault."""

    model: str | None = setting(
        None,
        "Model folder in the published layout, or an all-in-one file. Default: the bundled demo model.",
        group="Model",
        env="ZIMAGE_MODEL",
        path=True,
    )
    dit: str | None = setting(
        None, "DiT as a loose file (safetensors or GGUF) or a component folder.", group="Model", path=True
    )
    text_encoder: str | None = setting(
        None, "Text encoder as a loose file or a component folder.", group="Model", path=True
    )
    vae: str | None = setting(None, "VAE as a loose file or a component folder.", group="Model", path=True)
    tokenizer: str | None = setting(
        None,
        "Folder of a tokenizer, or tokenizer.json. Default: the model's, beside the text encoder, or in its GGUF file.",
        group="Model",
        path=True,
    )
    variant: str | None = setting(
        None, "Kind of the loose files: turbo (shift 3) or base (shift 6).", choices=VARIANTS, group="Model"
    )
    vision_model: str | None = setting(
        None,
        "Model that sees references: the folder of Qwen/Qwen3-VL-4B-Instruct, or its vision tower as a loose file. "
        "Default: none.",
        group="References",
        path=True,
    )
    vision_mode: str | None = setting(
        None,
        "What reads the references that the vision model sees: its own text stack (full), or the text encoder (tower). "
        "Default: full where the vision model's files hold a text stack.",
        choices=VISION_MODES,
        group="References",
    )
    encoder_url: str | None = setting(
        None,
        "Server on another machine, such as `zimage serve --encoder-only`, that encodes prompts and rewrites them; the "
        f"text encoder's weights need not be here. Its token is read from {ENCODER_TOKEN}.",
        group="Encoder",
        metavar="URL",
        env="ZIMAGE_ENCODER_URL",
    )
    encoder_form: str = setting(
        ENCODER_FORMS[0],
        "What the server speaks: zimage, or hidden_states (POST /v1/hidden_states, which encodes only).",
        choices=ENCODER_FORMS,
        group="Encoder",
    )
    encoder_model: str = setting("default", "Name of the model on a server of hidden_states.", group="Encoder")
    encoder_dtype: str | None = setting(
        None,
        "Dtype in which the server's text encoder computes; one that computes in another is refused. Default: that in "
        "which it would compute here.",
        choices=DTYPES,
        group="Encoder",
    )
    encoder_timeout: float = setting(
        ENCODER_TIMEOUT,
        "Seconds to wait for the captions of a prompt, all tries together.",
        group="Encoder",
        above=0,
        maximum=MAX_TIMEOUT,
    )
    device: str = setting("auto", "Device: auto, cpu, cuda, cuda:N or mps.", group="Machine")
    text_encoder_device: str | None = setting(
        None, "Device of the text encoder. Default: as --device.", group="Machine"
    )
    dit_device: str | None = setting(None, "Device of the DiT. Default: as --device.", group="Machine")
    vae_device: str | None = setting(None, "Device of the VAE. Default: as --device.", group="Machine")
    dtype: str | None = setting(
        None,
        "Dtype in which the model computes; with fp16 (float16) the DiT does, and all else in fp32. Default: bf16 "
        "where the device has it, else fp16 on NVIDIA's GPUs and fp32 elsewhere.",
        choices=DTYPES,
        group="Machine",
    )
    attention: str | None = setting(
        None,
        "Attention backend; sage is lossy. Default: auto, PyTorch's own or FlashAttention 3.",
        choices=ATTENTIONS,
        group="Machine",
        env="ZIMAGE_ATTENTION",
    )
    precision: str = setting(
        "bf16",
        "Matrix products of the DiT: bf16 (as --dtype says), or int8 or fp8 with scales per token and channel.",
        choices=PRECISIONS,
        group="Machine",
    )
    compile: bool = setting(
        False, "Compile the DiT's blocks: takes some seconds once, then steps are faster.", group="Machine"
    )
    cuda_graphs: bool = setting(
        False,
        "Replay small pictures and written tokens from CUDA graphs, where launching takes longer than computing: the "
        "demo, up to 512 × 512, rewriting.",
        group="Machine",
    )
    residency: str = setting(
        "auto",
        "Keep all weights in memory between stages, load them stage by stage, or decide by the free memory; on a GPU "
        "some may then stay.",
        choices=RESIDENCIES,
        group="Machine",
    )
    lora: list[str] | None = setting(
        None,
        "LoRA file (.safetensors), or a folder with one, and its scale, else 1; repeat it to add several. "
        "Default: none.",
        metavar="PATH[:SCALE]",
        group="Model",
        path=True,
    )
    lora_skip: str | None = setting(
        None,
        "Leave out this part of LoRA files, which is not implemented, and use the rest. Default: refuse such files.",
        choices=LORA_PARTS,
        group="Model",
    )
    lora_folder: str | None = setting(
        None,
        "Folder in which --from finds the LoRAs of a picture by their content. Default: none.",
        metavar="FOLDER",
        group="Model",
        path=True,
    )
    memory: float | None = setting(
        None,
        "Memory budget in GB (10⁹ bytes): what the process may take on a GPU, the driver's part included, or in the "
        "computer's memory. What does not fit is loaded stage by stage, decoded in strips, streamed block by block. "
        "Default: the free memory.",
        above=0,
        maximum=1_000_000,
        group="Machine",
    )
    templates: str | None = setting(
        None,
        "Folder with your own templates, which override shipped ones of the same name.",
        group="Text",
        metavar="FOLDER",
        env="ZIMAGE_TEMPLATES",
        path=True,
    )
    cache_entries: int = setting(
        100,
        "Captions kept in memory, so that a prompt is encoded only once; 0 is off.",
        group="Text",
        minimum=0,
        maximum=1_000_000,
    )
    cache_folder: str | None = setting(
        None, "Folder that keeps captions between runs. Default: none.", group="Text", metavar="FOLDER", path=True
    )

    def __post_init__(self):
        check_fields(self)
        if self.encoder_url and self.text_encoder_device:
            text = "text_encoder_device: the text encoder is on another machine; leave it out, or the encoder_url"
            raise RequestError(text, fields=("text_encoder_device", "encoder_url"))
        if self.encoder_url and self.vision_mode == "tower":
            text = (
                "vision_mode: with tower the text encoder reads, and it is on another machine; use full, or leave out "
            )
            raise RequestError(text + "the encoder_url", fields=("vision_mode", "encoder_url"))
        for text in self.lora or []:
            split_lora(text)


@dataclass(frozen=True)
class Sampling(Settings):
    """How the next token of a text is drawn. Raises RequestError with the fields at fault."""

    temperature: float = setting(
        0.6, "0 always takes the most likely token; higher values vary more.", group="Rewriting", minimum=0, maximum=5
    )
    top_p: float = setting(
        0.95,
        "Sample from the most likely tokens up to this total probability; 1 is off.",
        group="Rewriting",
        above=0,
        maximum=1,
    )
    top_k: int = setting(20, "Sample from this many of the most likely tokens; 0 is off.", group="Rewriting", minimum=0)
    min_p: float = setting(
        0.0,
        "Drop tokens below this fraction of the most likely token's probability.",
        group="Rewriting",
        minimum=0,
        maximum=1,
    )
    presence_penalty: float = setting(
        0.0,
        "Subtract this once from the logit of every token already written, against repetition.",
        group="Rewriting",
        minimum=0,
        maximum=2,
    )

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class RewriteSettings(Sampling):
    """How a prompt is rewritten before it is drawn. Raises RequestError with the fields at fault."""

    rewriter: str | None = setting(
        None,
        "Rewrite prompts first, with a template of the category rewriter.",
        group="Rewriting",
        flag="--rewrite",
        metavar="NAME",
    )
    rewriter_url: str | None = setting(
        None,
        "Server with OpenAI's chat completions API that rewrites in place of the model's own text encoder; "
        f"its key is read from {REWRITER_KEY}.",
        group="Rewriting",
        metavar="URL",
        env="ZIMAGE_REWRITER_URL",
    )
    rewriter_model: str = setting("default", "Name of the model on the server.", group="Rewriting")
    rewriter_timeout: float = setting(
        REWRITER_TIMEOUT, "Seconds to wait for the server.", group="Rewriting", above=0, maximum=MAX_TIMEOUT
    )
    rewrite_thinking: bool = setting(
        False, "Let the rewriter think before it answers; thoughts are not drawn.", group="Rewriting"
    )
    max_tokens: int = setting(
        MAX_TOKENS, "Maximum number of tokens, thoughts included.", group="Rewriting", minimum=1, maximum=32_768
    )
    rewrite_seed: int | None = setting(
        None, "Seed of the rewriting. Default: random, and reported.", group="Rewriting", minimum=0, maximum=MAX_SEED
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rewrite_thinking and self.rewriter_url:
            text = "rewrite_thinking: the server at the rewriter_url decides this itself; leave it out"
            raise RequestError(text, fields=("rewrite_thinking", "rewriter_url"))


ALL_SETTINGS: tuple[type[Settings], ...] = (Request, LoadSettings, RewriteSettings)


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


def split_lora(text: str) -> tuple[str, float]:
    """PATH or PATH:SCALE → (path, scale): the last colon counts if a number follows. Raises RequestError.

    What is the name of an existing file or folder as a whole has no scale.
    """
    return (text, 1.0) if os.path.exists(os.path.expanduser(text)) else split_scale(text)


def split_scale(text: str) -> tuple[str, float]:
    """The same, whatever files there are."""
    name, scale = split_number(text)
    if scale is None:
        return text, 1.0
    check_lora_scale(scale)
    return name, scale


def check_lora_scale(scale: object) -> None:
    """Raise RequestError unless `scale` is a number within its bounds."""
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        text = f"lora scale {quoted(scale)} is of type {type(scale).__name__}; it should be a number"
        raise RequestError(text, fields=("lora",))
    if not abs(scale) <= MAX_LORA_SCALE:  # nor NaN
        text = f"lora scale {scale} should lie between -{MAX_LORA_SCALE:g} and {MAX_LORA_SCALE:g}"
        raise RequestError(text, fields=("lora",))
