"""The vision model of a pipeline: found, opened in its mode, and checked against the model that its captions are for.

`full`: the vision model's own text stack reads what its tower sees. `tower`: the text encoder reads it, so that only
the tower is loaded, whatever else its files hold.
"""

import copy
from pathlib import Path

from zimage.errors import CheckpointError, ConfigError, RequestError
from zimage.formats.hub_cache import snapshot
from zimage.loading.files import Component, ModelFiles
from zimage.loading.finding import component_folder
from zimage.loading.registry import DIT, TEXT_ENCODER, VISION, VISION_TOWER
from zimage.settings.loading import LoadSettings
from zimage.settings.paths import user_path
from zimage.text.chat import IMAGE_PAD
from zimage.text.qwen3_vl import Qwen3VLConfig

SOURCE = "Qwen/Qwen3-VL-4B-Instruct"
WHERE = f"the folder of {SOURCE} (`hf download {SOURCE}`)"


def with_vision(model: ModelFiles, settings: LoadSettings) -> ModelFiles:
    """The model with the vision model that the settings name, if they do.

    Raises CheckpointError, ConfigError or RequestError where there is none, or where it does not fit the model.
    """
    if not settings.vision_model:
        return model
    path = _found(user_path(settings.vision_model, "vision_model"))
    try:
        component = _opened(path, settings.vision_mode)
        _check(model, component, settings)
    except ConfigError as error:
        raise ConfigError(f"vision_model: {error}; pass {WHERE}", fields=("vision_model",)) from None
    except CheckpointError as error:
        raise CheckpointError(f"vision_model: {error}", fields=("vision_model",)) from None
    seeing = copy.copy(model)
    seeing.components = {**model.components, component.name: component}
    return seeing


def vision_of(model: ModelFiles) -> Component | None:
    """The model's vision component, if it has one."""
    return next((model.components[name] for name in (VISION, VISION_TOWER) if name in model.components), None)


def mode_of(vision: Component) -> str:
    """What reads the pictures that it sees: "full" or "tower"."""
    return "tower" if config_of(vision).text is None else "full"


def config_of(vision: Component) -> Qwen3VLConfig:
    config = vision.skeleton.config
    assert isinstance(config, Qwen3VLConfig)
    return config


def caption_width(model: ModelFiles) -> int:
    """That of the captions which a model takes, or makes where it has no DiT."""
    dit = model.config(DIT)
    width: int = dit.cap_feat_dim if dit else model.config(TEXT_ENCODER).hidden_size
    return width


def _found(path: Path) -> Path:
    try:
        found = component_folder(snapshot(path), VISION)
    except CheckpointError:
        raise _absent(path, "is neither a folder nor a file") from None
    if not found.exists():
        raise _absent(path, "holds no vision model")
    return found


def _absent(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"vision_model {str(path)!r} {what}; pass {WHERE}", fields=("vision_model",))


def _opened(path: Path, mode: str | None) -> Component:
    component = Component.open(VISION_TOWER if mode == "tower" else VISION, path)
    if mode == "full" and mode_of(component) != mode:
        text = (
            f"vision_mode: full needs a text stack, and {path} holds the vision tower alone; use tower, or pass {WHERE}"
        )
        raise RequestError(text, fields=("vision_mode", "vision_model"))
    return component


def _check(model: ModelFiles, vision: Component, settings: LoadSettings) -> None:
    """Raise an error unless a vision model's captions are as the DiT takes them, and its texts as the tokenizer's."""
    config = config_of(vision)
    config.pixel_limits(vision.checkpoint.origin)
    if config.text:
        _check_equal("captions", config.text.hidden_size, "the model's", caption_width(model))
        if model.tokenizer.vocab_size > config.text.vocab_size:
            found = f"{model.tokenizer.vocab_size} entries exceed its {config.text.vocab_size}"
            raise CheckpointError(f"the tokenizer's {found}")
    elif settings.encoder_url:
        text = "its files hold the vision tower alone, for which the text encoder reads, and that is on another machine"
        raise RequestError(f"vision_model: {text}; pass {WHERE}", fields=("vision_model", "encoder_url"))
    else:
        width = model.config(TEXT_ENCODER).hidden_size
        _check_equal("image tokens", config.vision.out_hidden_size, "the text encoder's", width)
    if (pad := model.tokenizer.id_of(IMAGE_PAD)) != config.image_token_id:
        raise CheckpointError(f"its pictures are token {config.image_token_id}, and the tokenizer has {pad} for them")


def _check_equal(what: str, ours: int, whose: str, theirs: int) -> None:
    if ours != theirs:
        raise CheckpointError(f"its {what} are {ours} wide, and {whose} {theirs}; Z-Image takes those of {SOURCE}")
