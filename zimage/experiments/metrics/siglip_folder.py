"""Folders of SigLIP models: their tokens and pixels. The only file that needs sentencepiece.

FOLDER/config.json, model.safetensors (or shards), spiece.model, preprocessor_config.json
"""

import re
import string
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zimage.errors import CheckpointError, RequestError, install_hint
from zimage.experiments.metrics.likeness import (
    Likeness,
    check_colours,
    check_vocabulary,
    model_folder,
    normalised,
    open_model,
)
from zimage.experiments.metrics.siglip import Siglip
from zimage.formats.files import read_file

MEAN = DEVIATION = (0.5, 0.5, 0.5)
LONGEST = 16 << 20  # bytes of a vocabulary; the published one has 0.8 MB
WITHOUT_MARKS = str.maketrans("", "", string.punctuation)


def load_siglip(given: Path | None, device: torch.device) -> Likeness:
    """Prompts longer than the text model are cut, as in training. Raises as `model_folder` and `open_model` do."""
    folder = model_folder("siglip", given)
    model = open_model("siglip", folder, Siglip.from_config, device)
    check_colours(Siglip, folder, MEAN, DEVIATION)
    embeddings, pieces = model.text_model.embeddings, read_pieces(folder / "spiece.model")
    check_vocabulary(folder, pieces.get_piece_size(), embeddings.token_embedding.weight)
    tokens = partial(_tokens, pieces, len(embeddings.position_embedding.weight))
    return Likeness(model, tokens, partial(pixels, size=model.vision_model.embeddings.size), device)


def pixels(picture: Image.Image, size: int) -> Tensor:
    """(3, size, size): the picture stretched to a square."""
    return normalised(picture.resize((size, size), Image.Resampling.BICUBIC), MEAN, DEVIATION)


def canonical(prompt: str) -> str:
    """Small letters, without punctuation (ASCII's), with single spaces: as the training texts were brought in form."""
    return re.sub(r"\s+", " ", prompt.lower().translate(WITHOUT_MARKS)).strip()


def _tokens(pieces: Any, limit: int, prompt: str) -> list[int]:
    """The text's tokens, and the end so often that there are `limit` in all, once at least."""
    ids = pieces.encode(canonical(prompt))[: limit - 1]
    return [*ids, *[pieces.eos_id()] * (limit - len(ids))]


def read_pieces(file: Path) -> Any:
    """SentencePiece's model in a file. Raises RequestError without the package, CheckpointError for another file."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        text = f"the metric siglip needs sentencepiece ({error}): {install_hint('metrics')}"
        raise RequestError(text, fields=("metric",)) from None
    content = read_file(file, LONGEST)
    try:
        pieces = SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise CheckpointError(f"{file} is not a vocabulary of SentencePiece") from error
    if pieces.eos_id() < 0:
        raise CheckpointError(f"{file} has no token for a text's end, so it is not SigLIP's")
    return pieces
