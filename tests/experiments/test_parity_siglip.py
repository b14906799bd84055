"""SigLIP against transformers', on random weights and a vocabulary made here: vectors, tokens, pixels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from zimage.experiments.metrics.siglip_folder import load_siglip

transformers = pytest.importorskip("transformers", reason="the extra parity is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="the extra metrics is not installed")

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
PROMPTS = (
    "a cat",
    "  A Fox,\n reading   the book (on a bench)!",
    "unknown ж letters é",
    "42nd street's sign: “OPEN”",
    "word " * 100,
)
SIZES = ((128, 128), (100, 57), (33, 250), (16, 16))
CORPUS = """a cat reads a book on the bench . foxes open signs in the street
42 words and letters for unknown things"""


def vocabulary() -> bytes:
    """As SigLIP's: unigrams; an end, no beginning; a space before the first word."""
    made, random = io.BytesIO(), np.random.default_rng(1)
    sentences = [" ".join(random.choice(CORPUS.split(), 12)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=made, vocab_size=60, model_type="unigram",
        pad_id=-1, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours, loaded from the folder that the reference has written, and the reference."""
    folder = tmp_path_factory.mktemp("siglip")
    transformers.set_seed(1)
    (folder / "spiece.model").write_bytes(vocabulary())
    config = transformers.SiglipConfig(
        text_config={**SHAPE, "vocab_size": 80, "max_position_embeddings": 16, "projection_size": 64},
        vision_config={**SHAPE, "hidden_size": 64, "image_size": 64, "patch_size": 16},
    )
    reference = transformers.SiglipModel(config).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(1)
    for weight in reference.parameters():
        weight += 0.2 * torch.randn(weight.shape, generator=random) / max(weight.shape[-1:] or [1]) ** 0.5
    reference.save_pretrained(folder)
    tokenizer = transformers.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16)
    return load_siglip(folder, torch.device("cpu")), reference, tokenizer


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_texts(both, prompt):
    ours, reference, tokenizer = both
    inputs = tokenizer(prompt, truncation=True, padding="max_length", max_length=16, return_tensors="pt")
    assert ours.tokens(prompt) == inputs.input_ids[0].tolist()
    expected = reference.get_text_features(inputs.input_ids).pooler_output[0]
    assert (ours.text_vector(prompt) - expected / expected.norm()).abs().max() <= TOLERANCE


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures(both, size):
    ours, reference, _ = both
    processor = transformers.SiglipImageProcessorPil(size={"height": 64, "width": 64})
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))
    pixels = processor(picture, return_tensors="pt").pixel_values
    assert (ours.pixels(picture) - pixels[0]).abs().max() <= TOLERANCE
    expected = reference.get_image_features(pixels).pooler_output[0]
    assert (ours.model.picture_vector(pixels[0]) - expected / expected.norm()).abs().max() <= TOLERANCE


def test_scores(both):
    ours, reference, tokenizer = both
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8))
    for prompt in PROMPTS[:3]:
        ids = tokenizer(prompt, truncation=True, padding="max_length", max_length=16, return_tensors="pt").input_ids
        logits = reference(input_ids=ids, pixel_values=ours.pixels(picture)[None]).logits_per_image
        expected = (logits - reference.logit_bias) / reference.logit_scale.exp()
        assert abs(ours.score(picture, prompt) - expected.item()) <= TOLERANCE
