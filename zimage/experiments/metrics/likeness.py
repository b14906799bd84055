"""How well a picture fits its prompt, by a model that the user brings: a folder in the layout of `transformers`."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zimage.errors import CheckpointError, RequestError
from zimage.formats.checkpoint import Checkpoint
from zimage.formats.json_text import read_json
from zimage.loading.weights import check_fit, load_weights
from zimage.nn.config import check_implemented

Colour = tuple[float, float, float]
# What a cosine does not need, and 0, 1, 2 … in older files.
UNUSED = (
    "logit_scale",
    "logit_bias",
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
)


class Vectors(Protocol):
    """A model with one space for texts and pictures; both vectors have length 1."""

    def text_vector(self, ids: Tensor) -> Tensor: ...
    def picture_vector(self, pixels: Tensor) -> Tensor: ...


M = TypeVar("M", bound=nn.Module)


class Likeness:
    """The cosine of picture and prompt, from −1 to 1. `tokens` and `pixels` bring both into the model's form."""

    def __init__(
        self,
        model: Vectors,
        tokens: Callable[[str], list[int]],
        pixels: Callable[[Image.Image], Tensor],
        device: torch.device,
    ):
        self.model, self.tokens, self.pixels, self.device = model, tokens, pixels, device
        self.text_vector = functools.lru_cache(maxsize=256)(self._text_vector)

    def score(self, picture: Image.Image, prompt: str) -> float | None:
        """None without a prompt, as where saved embeddings took its place."""
        if not prompt.strip():
            return None
        return float(self.model.picture_vector(self.pixels(picture).to(self.device)) @ self.text_vector(prompt))

    def _text_vector(self, prompt: str) -> Tensor:
        return self.model.text_vector(torch.tensor(self.tokens(prompt), device=self.device))


def model_folder(name: str, given: Path | None) -> Path:
    """What was passed as NAME=PATH. Raises RequestError where it is not a folder."""
    if given is None or not given.is_dir():
        raise RequestError(f"{name}={given} should name the folder of a model", fields=("metric",))
    return given


def open_model(name: str, folder: Path, build: Callable[[Mapping[str, Any]], M], device: torch.device) -> M:
    """A model in fp32 from `config.json` and safetensors. Raises CheckpointError or ConfigError for a misfit."""
    with torch.device("meta"):
        model = build(read_json(folder / "config.json"))
    checkpoint = Checkpoint.of_folder(folder, name).without(UNUSED.__contains__)
    check_fit(model, checkpoint)
    load_weights(model, checkpoint, torch.float32, device)
    return model.requires_grad_(False)


def check_vocabulary(folder: Path, tokens: int, embeddings: Tensor) -> None:
    """Raise CheckpointError where a tokenizer has more tokens than the model has embeddings (tokens, C)."""
    if tokens > len(embeddings):
        raise CheckpointError(f"{folder}: the tokenizer has {tokens:,} tokens, and the model {len(embeddings):,}")


def check_colours(of: type, folder: Path, mean: Colour, deviation: Colour) -> None:
    """Raise ConfigError where a folder says that pictures are normalised otherwise."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        check_implemented(of, read_json(file), {"image_mean": (list(mean),), "image_std": (list(deviation),)})


def normalised(picture: Image.Image, mean: Colour, deviation: Colour) -> Tensor:
    """(3, H, W): levels from 0 to 1, less the mean, over the deviation of the training pictures' channels."""
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    shift, scale = (values.new_tensor(of)[:, None, None] for of in (mean, deviation))
    return (values - shift) / scale
