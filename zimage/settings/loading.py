"""How a model is loaded, each parameter declared once as those of a request are."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from zimage.errors import RequestError, quoted
from zimage.settings.conditions import split_number
from zimage.settings.declared import MAX_TIMEOUT
from zimage.settings.environment import ENCODER_TOKEN
from zimage.settings.fields import Plain, Settings, check_fields, fields, setting

SDPA = ("sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math")
ATTENTIONS = ("auto", *SDPA, "flash3", "flash2", "xformers", "sage")
DTYPES = ("bf16", "fp16", "float16", "fp32")
PRECISIONS = ("bf16", "int8", "fp8")
VARIANTS = ("turbo", "base")
RESIDENCIES = ("auto", "keep", "stage")
VISION_MODES = ("full", "tower")
MAX_LORA_SCALE = 100.0
LORA_PARTS = ("text_encoder",)
ENCODER_TIMEOUT = 120.0  # seconds
ENCODER_FORMS = ("zimage", "hidden_states")


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
        "LoRA file (.safetensors), or a folder with one, and its scale, else 1 or what a distilled adapter that is "
        "recognised asks for, with its steps and guidance; repeat it to add several. Default: none.",
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


def split_lora(text: str) -> tuple[str, float | None]:
    """PATH or PATH:SCALE → (path, scale if there is one): the last colon counts if a number follows.

    What is the name of an existing file or folder as a whole has no scale. Raises RequestError.
    """
    return (text, None) if os.path.exists(os.path.expanduser(text)) else split_scale(text)


def split_scale(text: str) -> tuple[str, float | None]:
    """The same, whatever files there are."""
    name, scale = split_number(text)
    if scale is not None:
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


def absolute_paths(loading: Mapping[str, Plain]) -> dict[str, Plain]:
    """Settings of loading whose paths mean the same wherever a process runs."""
    paths = {field.name for field, _ in fields(LoadSettings) if field.metadata["path"]} & loading.keys()
    return {**loading, **{name: _absolute(loading[name]) for name in paths}}


def _absolute(path: Plain) -> Plain:
    if isinstance(path, list):
        return [_absolute(one) for one in path]
    return path if path is None or path.startswith("~") else os.path.abspath(path)
