"""How well a picture fits its prompt by a CLIP model that the user brings: a folder in the layout of `transformers`.

FOLDER/config.json, model.safetensors (or shards), vocab.json, merges.txt, preprocessor_config.json
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from zimage.errors import CheckpointError, RequestError
from zimage.experiments.metrics.clip import Clip
from zimage.formats.checkpoint import Checkpoint
from zimage.formats.files import read_file
from zimage.formats.json_text import read_json
from zimage.loading.weights import check_fit, load_weights
from zimage.nn.config import check_implemented
from zimage.text.tokenizer_file import LONGEST, naming_faults

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# How CLIP splits small letters into words before it merges byte pairs.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the training pictures' channels, from 0 to 1
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
# What a cosine does not need, and 0, 1, 2 … in older files.
UNUSED = ("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


class ClipScore:
    """The cosine of picture and prompt, from −1 to 1. A prompt longer than the text model is cut, as in training."""

    def __init__(self, model: Clip, tokenizer: FastTokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.begin, self.end = (tokenizer.get_vocab()[token] for token in (BEGIN, END))
        self.device = model.text_projection.weight.device
        self.text_vector = functools.lru_cache(maxsize=256)(self._text_vector)

    @classmethod
    def load(cls, folder: Path | None, device: torch.device | str = "cpu") -> "ClipScore":
        """Raises RequestError for what is not a folder, and CheckpointError or ConfigError for what does not fit."""
        if folder is None or not folder.is_dir():
            raise RequestError(f"clip={folder} should name the folder of a CLIP model", fields=("metric",))
        with torch.device("meta"):
            model = Clip.from_config(read_json(folder / "config.json"))
        _check_preprocessing(folder)
        checkpoint = Checkpoint.of_folder(folder, "clip").without(UNUSED.__contains__)
        check_fit(model, checkpoint)
        load_weights(model, checkpoint, torch.float32, torch.device(device))
        return cls(model, read_tokenizer(folder))

    def score(self, picture: Image.Image, prompt: str) -> float:
        vector = self.model.picture_vector(self.pixels(picture))
        return float(vector @ self.text_vector(prompt))

    def pixels(self, picture: Image.Image) -> Tensor:
        """(3, S, S): the shorter side scaled to S, the centre cut out, each channel normalised as in training."""
        size = self.model.vision_model.embeddings.size
        scale = size / min(picture.size)
        width, height = (max(size, int(side * scale)) for side in picture.size)
        scaled = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        cut = np.array(scaled.crop((left, top, left + size, top + size)))
        values = torch.from_numpy(cut).to(self.device).permute(2, 0, 1) / 255
        mean, deviation = (values.new_tensor(of)[:, None, None] for of in (MEAN, DEVIATION))
        return (values - mean) / deviation

    def tokens(self, prompt: str) -> list[int]:
        """Between a beginning and an end, at most as many as the text model has positions."""
        limit = len(self.model.text_model.embeddings.position_embedding.weight)
        with naming_faults("CLIP's tokenizer failed"):
            ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        return [self.begin, *ids[: limit - 2], self.end]

    def _text_vector(self, prompt: str) -> Tensor:
        return self.model.text_vector(torch.tensor(self.tokens(prompt), device=self.device))


def read_tokenizer(folder: Path) -> FastTokenizer:
    """CLIP's tokenizer from `vocab.json` and `merges.txt`. Raises CheckpointError."""
    files = [folder / "vocab.json", folder / "merges.txt"]
    for file in files:
        read_file(file, LONGEST)  # a regular file within limits
    with naming_faults(f"{folder}: the tokenizer cannot be read"):
        bpe = models.BPE.from_file(*map(str, files), unk_token=END, end_of_word_suffix="</w>")
        fast = FastTokenizer(bpe)
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        fast.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
        fast.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if absent := [token for token in (BEGIN, END) if fast.token_to_id(token) is None]:
        raise CheckpointError(f"{folder}: vocab.json has no {absent[0]}, so it is not CLIP's")
    return fast


def _check_preprocessing(folder: Path) -> None:
    """Raise ConfigError where a folder says that pictures are normalised otherwise."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        said: Mapping[str, Any] = read_json(file)
        check_implemented(Clip, said, {"image_mean": (list(MEAN),), "image_std": (list(DEVIATION),)})
