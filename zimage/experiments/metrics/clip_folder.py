"""Folders of CLIP models (OpenAI's, LAION's, PickScore): their tokens and pixels.

FOLDER/config.json, model.safetensors (or shards), vocab.json, merges.txt, preprocessor_config.json
"""

from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from zimage.errors import CheckpointError
from zimage.experiments.metrics.clip import Clip
from zimage.experiments.metrics.likeness import (
    Likeness,
    check_colours,
    check_vocabulary,
    model_folder,
    normalised,
    open_model,
)
from zimage.formats.files import read_file
from zimage.text.tokenizer_file import LONGEST, naming_faults

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# How CLIP splits small letters into words before it merges byte pairs.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def load_clip(given: Path | None, device: torch.device) -> Likeness:
    """Prompts longer than the text model are cut, as in training. Raises as `model_folder` and `open_model` do."""
    folder = model_folder("clip", given)
    model = open_model("clip", folder, Clip.from_config, device)
    check_colours(Clip, folder, MEAN, DEVIATION)
    embeddings, tokenizer = model.text_model.embeddings, read_tokenizer(folder)
    check_vocabulary(folder, tokenizer.get_vocab_size(), embeddings.token_embedding.weight)
    tokens = partial(_tokens, tokenizer, len(embeddings.position_embedding.weight))
    return Likeness(model, tokens, partial(pixels, size=model.vision_model.embeddings.size), device)


def pixels(picture: Image.Image, size: int) -> Tensor:
    """(3, size, size): the shorter side scaled to this size, and the centre cut out."""
    scale = size / min(picture.size)
    width, height = (max(size, int(side * scale)) for side in picture.size)
    scaled = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return normalised(scaled.crop((left, top, left + size, top + size)), MEAN, DEVIATION)


def _tokens(tokenizer: FastTokenizer, limit: int, prompt: str) -> list[int]:
    """Between a beginning and an end, at most `limit` in all."""
    with naming_faults("CLIP's tokenizer failed"):
        ids, known = tokenizer.encode(prompt, add_special_tokens=False).ids, tokenizer.get_vocab()
    return [known[BEGIN], *ids[: limit - 2], known[END]]


def read_tokenizer(folder: Path) -> FastTokenizer:
    """CLIP's tokenizer from `vocab.json` and `merges.txt`. Raises CheckpointError."""
    files = [folder / "vocab.json", folder / "merges.txt"]
    for file in files:
        read_file(file, LONGEST)  # a regular file within limits
    with naming_faults(f"{folder}: the tokenizer cannot be read"):
        fast = FastTokenizer(models.BPE.from_file(*map(str, files), unk_token=END, end_of_word_suffix="</w>"))
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        fast.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
        fast.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if absent := [token for token in (BEGIN, END) if fast.token_to_id(token) is None]:
        raise CheckpointError(f"{folder}: vocab.json has no {absent[0]}, so it is not CLIP's")
    return fast
