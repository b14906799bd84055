"""CLIP against transformers', on random weights: vectors, tokens, and pixels of pictures of many sizes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from zimage.experiments.metrics.clip_folder import load_clip

transformers = pytest.importorskip("transformers", reason="the extra parity is not installed")

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
PROMPTS = (
    "a cat",
    "A Café, naïve  façade\n– 42nd street's “OPEN” sign!",
    "日本語 и кириллица 🐱",
    "",
    "word " * 100,
)
SIZES = ((128, 128), (100, 57), (33, 250), (16, 16), (224, 301))


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def both(request, tmp_path_factory):
    """Ours, loaded from the folder that the reference has written, and the reference."""
    folder = tmp_path_factory.mktemp("clip")
    transformers.set_seed(1)
    shape = {**SHAPE, "hidden_act": request.param}
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>", "wo", "wor", "word</w>"]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    config = transformers.CLIPConfig(
        text_config={
            **shape,
            "vocab_size": len(ids),
            "max_position_embeddings": 32,
            "eos_token_id": len(ids) - 1,
            "bos_token_id": len(ids) - 2,
        },
        vision_config={**shape, "hidden_size": 64, "image_size": 64, "patch_size": 16},
        projection_dim=40,
    )
    reference = transformers.CLIPModel(config).eval()
    random = torch.Generator().manual_seed(1)
    for weight in reference.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=random) / max(weight.shape[-1:] or [1]) ** 0.5
    reference.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(ids))
    merges = ["c a", "ca t</w>", "w o", "wo r", "wor d</w>"]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = transformers.CLIPTokenizer(ids, [tuple(m.split()) for m in merges], model_max_length=32)
    return load_clip(folder, torch.device("cpu")), reference, tokenizer


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_texts(both, prompt):
    ours, reference, tokenizer = both
    inputs = tokenizer(prompt, truncation=True, max_length=32, return_tensors="pt")
    assert ours.tokens(prompt) == inputs.input_ids[0].tolist()
    expected = reference.get_text_features(**inputs).pooler_output[0]
    expected = expected / expected.norm()
    assert (ours.text_vector(prompt) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures(both, size):
    ours, reference, _ = both
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))
    pixels = processor(picture, return_tensors="pt").pixel_values
    assert (ours.pixels(picture) - pixels[0]).abs().max() <= TOLERANCE
    expected = reference.get_image_features(pixels).pooler_output[0]
    expected = expected / expected.norm()
    assert (ours.model.picture_vector(pixels[0]) - expected).abs().max() <= TOLERANCE


def test_scores(both):
    ours, reference, tokenizer = both
    random = np.random.default_rng(2)
    for prompt in PROMPTS[:3]:
        picture = Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8))
        inputs = tokenizer(prompt, truncation=True, max_length=32, return_tensors="pt")
        logits = reference(**inputs, pixel_values=ours.pixels(picture)[None]).logits_per_image
        assert abs(ours.score(picture, prompt) - (logits / reference.logit_scale.exp()).item()) <= TOLERANCE
