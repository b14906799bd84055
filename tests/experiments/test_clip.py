"""Folders of CLIP models: read whole, or refused by what is wrong. Numbers are compared in `test_parity_clip`."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import randomised

from zimage.errors import CheckpointError, ConfigError, RequestError
from zimage.experiments.metrics.clip import Clip
from zimage.experiments.metrics.clip_folder import BEGIN, END, MEAN, load_clip

STACK = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {
    "model_type": "clip",
    "projection_dim": 12,
    "text_config": {**STACK, "vocab_size": 60, "max_position_embeddings": 9},
    "vision_config": {**STACK, "image_size": 32, "patch_size": 8},
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["ca", "cat</w>"]
MANY = {token: i for i, token in enumerate([BEGIN, END, "c", "a", "t</w>", *WORDS, *map(str, range(10, 73))])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder as CLIP models are published, with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *WORDS, BEGIN, END]
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": list(MEAN)}))
    state = randomised(Clip.from_config(CONFIG), 1).state_dict()
    positions = torch.arange(9)[None]  # files of older versions hold them
    save_file(
        {**state, "logit_scale": torch.tensor(4.6), "text_model.embeddings.position_ids": positions},
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "clip")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8))


def test_a_score_is_a_cosine_that_depends_on_picture_and_prompt(whole):
    clip = load_clip(whole, torch.device("cpu"))
    scores = {(i, prompt): clip.score(picture(i), prompt) for i in (1, 2) for prompt in ("a cat", "dog")}
    assert len(set(scores.values())) == 4
    assert all(-1 <= score <= 1 for score in scores.values())
    assert clip.score(picture(1), "") is None, "saved embeddings have no prompt"
    assert clip.model.text_vector(torch.tensor(clip.tokens("a cat"))).norm() == pytest.approx(1, abs=1e-6)


def test_prompts_are_cut_at_the_positions_and_keep_their_end(whole):
    clip = load_clip(whole, torch.device("cpu"))
    begin, end = 54, 55
    assert clip.tokens("Cat") == [begin, 53, end]
    long = clip.tokens("cat " * 20)
    assert long == [begin, *[53] * 7, end]
    assert clip.score(picture(1), "cat " * 20) == clip.score(picture(1), "cat " * 30)


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("change", "kind", "fault"),
    [
        (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json is missing"),
        (lambda f: edit(f, model_type="siglip"), ConfigError, "model_type = 'siglip' is not implemented"),
        (lambda f: edit(f, projection_dim=13), CheckpointError, "projection"),
        (
            lambda f: edit(f, vision_config={**CONFIG["vision_config"], "patch_size": 64}),
            ConfigError,
            "image_size = 32",
        ),
        (lambda f: edit(f, text_config={**CONFIG["text_config"], "hidden_act": "relu"}), ConfigError, "hidden_act"),
        (lambda f: edit(f, text_config={**CONFIG["text_config"], "num_attention_heads": 3}), ConfigError, "multiple"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "no weights were found"),
        (lambda f: (f / "merges.txt").unlink(), CheckpointError, "merges.txt is missing"),
        (lambda f: (f / "vocab.json").write_text('{"a": 0}'), CheckpointError, "clip"),
        (lambda f: (f / "vocab.json").write_text(json.dumps(MANY)), CheckpointError, "has 70 tokens, and the model 60"),
        (lambda f: (f / "vocab.json").write_text("["), CheckpointError, "the tokenizer cannot be read"),
        (lambda f: (f / "preprocessor_config.json").write_text('{"image_std": [1, 1, 1]}'), ConfigError, "image_std"),
    ],
    ids=range(12),
)
def test_folders_that_do_not_fit_are_refused(copy, change, kind, fault):
    change(copy)
    with pytest.raises(kind, match=fault):
        load_clip(copy, torch.device("cpu"))


def test_a_file_is_not_a_folder(whole):
    with pytest.raises(RequestError, match="should name the folder of a model"):
        load_clip(whole / "config.json", torch.device("cpu"))
