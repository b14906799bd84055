"""Folders of SigLIP models: read whole, or refused by what is wrong. Numbers are compared in `test_parity_siglip`."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import randomised

from zimage.errors import CheckpointError, ConfigError, RequestError
from zimage.experiments.metrics.siglip import Siglip
from zimage.experiments.metrics.siglip_folder import canonical, load_siglip

STACK = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {
    "model_type": "siglip",
    "text_config": {**STACK, "vocab_size": 40, "max_position_embeddings": 9},
    "vision_config": {**STACK, "image_size": 32, "patch_size": 8},
}


class Pieces:
    """A vocabulary of letters: a is 2, b is 3 …"""

    def __init__(self, model_proto: bytes):
        if model_proto != b"letters":
            raise RuntimeError("could not parse ModelProto")

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 95 for letter in text if letter.isalpha()]

    def eos_id(self) -> int:
        return 1

    def get_piece_size(self) -> int:
        return 28


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as SigLIP models are published, with random weights and a vocabulary of letters."""
    monkeypatch.setitem(sys.modules, "sentencepiece", type(sys)("sentencepiece"))
    monkeypatch.setattr(sys.modules["sentencepiece"], "SentencePieceProcessor", Pieces, raising=False)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "spiece.model").write_bytes(b"letters")
    state = randomised(Siglip.from_config(CONFIG), 1).state_dict()
    scalars = {"logit_scale": torch.tensor([4.6]), "logit_bias": torch.tensor([-10.0])}
    save_file({**state, **scalars}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_score_is_a_cosine_that_depends_on_picture_and_prompt(folder):
    siglip = load_siglip(folder, torch.device("cpu"))
    random = np.random.default_rng(1)
    pictures = [Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)) for _ in range(2)]
    scores = {siglip.score(picture, prompt) for picture in pictures for prompt in ("a cat", "dog")}
    assert len(scores) == 4
    assert all(-1 <= score <= 1 for score in scores)


def test_prompts_fill_all_positions_and_keep_their_end(folder):
    siglip = load_siglip(folder, torch.device("cpu"))
    assert siglip.tokens("Ab!") == [2, 3, *[1] * 7]
    assert siglip.tokens("z" * 20) == [*[27] * 8, 1]


def test_texts_in_the_form_of_the_training():
    assert canonical('  A "Fox",\n\treads —  ok? ') == "a fox reads — ok"


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("change", "kind", "fault"),
    [
        (lambda f: edit(f, model_type="siglip2"), ConfigError, "model_type = 'siglip2' is not implemented"),
        (lambda f: edit(f, vision_config={**STACK, "vision_use_head": False}), ConfigError, "vision_use_head"),
        (lambda f: edit(f, vision_config={**STACK, "image_size": 64}), CheckpointError, "model.safetensors|shape|fit"),
        (lambda f: (f / "spiece.model").unlink(), CheckpointError, "spiece.model is missing"),
        (lambda f: (f / "spiece.model").write_bytes(b"x"), CheckpointError, "is not a vocabulary of SentencePiece"),
        (
            lambda f: (f / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.5]}'),
            ConfigError,
            "image_mean",
        ),
    ],
    ids=range(6),
)
def test_folders_that_do_not_fit_are_refused(folder, change, kind, fault):
    change(folder)
    with pytest.raises(kind, match=fault):
        load_siglip(folder, torch.device("cpu"))


def test_without_the_package_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(RequestError, match=r"pip install .*\[metrics\]"):
        load_siglip(folder, torch.device("cpu"))
