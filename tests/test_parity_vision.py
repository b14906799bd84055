"""Ring 2: Qwen3-VL beside transformers', live, on random weights: pixels, tower, text stack, positions, key list."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QWEN, VISION, relative_error
from torch import Tensor

from zimage.text import Qwen3, Qwen3VL
from zimage.text.sight import positions
from zimage.text.vision_input import PixelLimits, Pixels, pixels_of

pytest.importorskip("transformers")
import references

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5  # fp32, of the largest value
BF16_RATIO = 1.1  # our RMS error against float64 over the reference's own
LEVELS = 1  # of 256, by which a pixel may differ
SEEDS = range(8)
LIMITS = PixelLimits(64 * 64, 160 * 160)
PAD = VISION["image_token_id"]
# (width, height): every shape from 1 × 20 to 20 × 1 within the limits, below and above them, in odd sizes.
STRIPS = [(int(base * ratio**0.5), int(base / ratio**0.5)) for base in (23, 97, 311)
          for ratio in (1 / 20, 1 / 9, 1 / 4, 3 / 7, 0.77, 1, 1.31, 9 / 4, 4, 9, 20)]  # fmt: skip
SIZES = [*STRIPS, (1, 20), (20, 1), (1, 1), (7, 3), (33, 64), (64, 33), (159, 161), (640, 32), (32, 640), (47, 48),
         (5, 500), (1000, 5)]  # fmt: skip


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours and noise: both change where pixels lie elsewhere."""
    generator = np.random.default_rng([seed, width, height])
    down, across = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(across / (5 + 3 * c) + down / (9 - 2 * c)) for c in range(3)]
    noise = generator.normal(0, 20, (height, width, 3))
    return Image.fromarray((np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8))


def ours_like(reference) -> Qwen3VL:
    """Our module with the reference's weights, strictly loaded, in its dtype."""
    model = Qwen3VL.from_config({**VISION, "text_config": reference.config.text_config.to_dict()})
    model.load_state_dict({key: value for key, value in reference.state_dict().items() if key != "lm_head.weight"})
    return model.to(reference.dtype).eval().requires_grad_(False)


def looked(seed: int, sizes: list[tuple[int, int]]) -> tuple[list[Pixels], dict]:
    """Pictures as we read them, and as the reference does."""
    pictures = [picture(*size, seed=seed + i) for i, size in enumerate(sizes)]
    return [pixels_of(p, LIMITS) for p in pictures], references.vision_inputs(pictures, 64 * 64, 160 * 160)


def text_with(counts: tuple[int, ...], seed: int) -> Tensor:
    """Ids (1, L) of pictures with text before, between and behind them, sometimes none before the first."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for count in counts:
        length = int(torch.randint(2, 9, (1,), generator=generator)) if ids or seed % 2 else 0
        ids += [*torch.randint(PAD, (length,), generator=generator).tolist(), *[PAD] * count]
    return torch.tensor([[*ids, *torch.randint(PAD, (5,), generator=generator).tolist()]])


def test_there_are_enough_pictures():
    assert len(set(SIZES)) >= 40
    assert min(w / h for w, h in SIZES) <= 1 / 20
    assert max(w / h for w, h in SIZES) >= 20


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels(size):
    """Grid and pixels, patch by patch; both moments of a patch hold the picture."""
    (ours,), theirs = looked(1, [size])
    assert [1, *ours.grid] == theirs["image_grid_thw"][0].tolist()
    levels = ((theirs["pixel_values"] + 1) * 127.5).unflatten(1, (3, 2, 16, 16))
    for moment in levels.unbind(2):
        assert (ours.levels.float() - moment).abs().max() <= LEVELS
        assert (ours.levels - moment.round()).abs().max() == 0  # it resamples by Pillow too


LARGE = [(1, 1), (31, 16), (1000, 1300), (4096, 4096), (5000, 4000), (80, 15_000), (20_000, 101)]


@pytest.mark.parametrize("size", LARGE, ids=str)
@pytest.mark.parametrize("most", [65_536, 1_003_520, 16_777_216])
def test_sizes_at_published_limits(size, most):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    width, height = size
    assert PixelLimits(4096, most).size(*size)[::-1] == smart_resize(height, width, 32, 4096, most)


# ------------------------------------------------------------------ fp32


def test_tower_and_every_merger():
    """Each picture by itself, and all of them at once: the same bits."""
    reference = references.vision(seed=11)
    ours = ours_like(reference)
    pixels, inputs = looked(12, SIZES)
    theirs, sight = references.seen(reference, inputs), ours.look(pixels)
    counts = [rows * columns for rows, columns in sight.grids]
    assert [h * w // 4 for _, h, w in inputs["image_grid_thw"].tolist()] == counts
    pairs = [(sight.tokens, theirs.tokens), *zip(sight.deepstack, theirs.deepstack, strict=True)]
    assert len(pairs) == 4
    for mine, other in pairs:
        for i, (a, b) in enumerate(zip(mine.split(counts), other.split(counts), strict=True)):
            assert relative_error(a, b) <= TOLERANCE, SIZES[i]
    for i, pixel in enumerate(pixels):
        alone = ours.look([pixel])
        for one, all_of_them in zip((alone.tokens, *alone.deepstack), (sight.tokens, *sight.deepstack), strict=True):
            assert torch.equal(one, all_of_them.split(counts)[i])


def texts(seed: int):
    """Every picture once, alone or with up to three others: (pixels, the reference's inputs, ids)."""
    for first, count in ((0, 1), (1, 1), (2, 2), (4, 3), (7, 4), (11, 4), (15, 4), (19, 4), (23, 4), (27, 4), (31, 4),
                         (35, 4), (39, 4), (43, 2)):  # fmt: skip
        pixels, inputs = looked(seed, SIZES[first : first + count])
        counts = tuple(p.grid[0] * p.grid[1] // 4 for p in pixels)
        yield pixels, inputs, text_with(counts, seed + first)


def test_every_hidden_state_and_position():
    """The VL model's own text stack, on texts with one to four pictures."""
    reference = references.vision(seed=13)
    ours, met = ours_like(reference), 0
    for pixels, inputs, ids in texts(14):
        sight, met = ours.look(pixels), met + len(pixels)
        place, _ = reference.model.get_rope_index(ids, (ids == PAD).int(), inputs["image_grid_thw"])
        assert torch.equal(positions(ids[0], sight.grids, PAD), place[:, 0])
        states, theirs = list(ours.text.hidden_states(ids, sight=sight)), references.seen(reference, inputs, ids).states
        assert len(states) == len(theirs) == VISION["text_config"]["num_hidden_layers"] + 1
        for i, pair in enumerate(zip(states, theirs, strict=True)):
            assert relative_error(*pair) <= TOLERANCE, f"hidden state {i}"
    assert met == len(SIZES)


def test_qwen3_itself_reads_what_the_tower_sees():
    """The Z-Image text encoder in the text stack's place: its weights, its θ, and the published sections."""
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    reference = references.vision(seed=15, num_hidden_layers=4, rope_theta=1_000_000.0, rope_scaling=rope)
    tower, encoder = ours_like_tower(reference), Qwen3.from_config(QWEN).eval().requires_grad_(False)
    encoder.model.load_state_dict(reference.model.language_model.state_dict())
    for pixels, inputs, ids in list(texts(16))[:6]:
        states = encoder.hidden_states(ids, sight=tower.look(pixels))
        for i, pair in enumerate(zip(states, references.seen(reference, inputs, ids).states, strict=True)):
            assert relative_error(*pair) <= TOLERANCE, f"hidden state {i}"


def ours_like_tower(reference) -> Qwen3VL:
    """The vision tower alone."""
    model = Qwen3VL.from_config({key: value for key, value in VISION.items() if key != "text_config"})
    state = reference.state_dict()
    model.load_state_dict({key: value for key, value in state.items() if key.startswith("model.visual.")})
    assert model.text is None
    return model.eval().requires_grad_(False)


def test_text_without_pictures():
    """Its text stack on plain text is Qwen3 with another θ."""
    reference = references.vision(seed=17)
    ids = torch.randint(PAD, (2, 40), generator=torch.Generator().manual_seed(18))
    ours = list(ours_like(reference).text.hidden_states(ids))
    with torch.no_grad():
        theirs = reference.model(input_ids=ids, output_hidden_states=True).hidden_states
    for pair in zip(ours, theirs, strict=True):
        assert relative_error(*pair) <= TOLERANCE


# ------------------------------------------------------------------ bf16


@pytest.mark.parametrize("part", ["tokens", "deepstack", "text"])
@torch.no_grad()
def test_bf16_is_no_less_exact_than_the_reference(part):
    """RMS error against the reference in float64 (same bf16 weights and pixels), over eight models."""

    def result(tokens, deepstack, states):
        return {"tokens": tokens, "deepstack": torch.cat(list(deepstack)), "text": states and states[-2]}[part]

    squares = torch.zeros(2, dtype=torch.float64)
    for seed in SEEDS:
        reference, (pixels, inputs) = references.vision(seed), looked(seed, SIZES[seed : seed + 30 : 7])
        ids = text_with(tuple(p.grid[0] * p.grid[1] // 4 for p in pixels), seed) if part == "text" else None
        # Rounded once for both, so that the pixels are the same.
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16().double()
        truth = result(*references.seen(reference.double(), inputs, ids))
        reference.bfloat16()
        theirs, model = result(*references.seen(reference, inputs, ids)), ours_like(reference)
        sight = model.look(pixels)
        states = list(model.text.hidden_states(ids, sight=sight)) if ids is not None else []
        ours = result(sight.tokens, sight.deepstack, states)
        squares += torch.stack([(x.double() - truth).square().mean() for x in (ours, theirs)])
    ratio = float((squares[0] / squares[1]).sqrt())
    print(f"{part}: {ratio:.3f} of the reference's own error")
    assert ratio <= BF16_RATIO, f"{part}: our bf16 RMS error is {ratio:.3f} times the reference's own"


# ------------------------------------------------------------------ full-size keys, without weights


def published() -> dict:
    """The config of Qwen3-VL-4B-Instruct, as its folder has it."""
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text = {
        **{"attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "rope_scaling": rope},
        **{"intermediate_size": 9728, "max_position_embeddings": 262_144, "model_type": "qwen3_vl_text"},
        **{"num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6},
        **{"rope_theta": 5_000_000, "tie_word_embeddings": True, "vocab_size": 151_936},
    }
    vision = {
        **{"deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "in_channels": 3},
        **{"hidden_size": 1024, "intermediate_size": 4096, "model_type": "qwen3_vl", "num_heads": 16, "patch_size": 16},
        **{"num_position_embeddings": 2304, "out_hidden_size": 2560, "spatial_merge_size": 2},
        **{"temporal_patch_size": 2},
    }
    ids = {"image_token_id": 151_655, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653}
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": True, **ids}


def test_full_size_keys_and_shapes():
    """The published keys load strictly into ours: none missing, unexpected or misshapen."""
    transformers = references.transformers
    with torch.device("meta"):
        reference = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**published()))
        ours = Qwen3VL.from_config(published())
    state = {key: value for key, value in reference.state_dict().items() if key != "lm_head.weight"}
    assert len(state) == 713
    assert sum(key.startswith("model.visual.") for key in state) == 315
    ours.load_state_dict(state, strict=True, assign=True)


def test_randomised_weights_hide_nothing():
    for name, weight in references.vision(seed=1).named_parameters():
        assert weight.std() > 0.01, name
