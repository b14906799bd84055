"""The demo's training recipe: what can be checked without training."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from zimage.weights.recipe import captions, choices, muon, objects, prompts, scenes


def test_vocabulary_reaches_the_target_and_keeps_the_trials():
    trial = {"cat", "dog", "fox", "robot", "pizza", "rocket", "red apple", "ice cream", "happy face", "soccer ball"}
    assert len(objects.OBJECTS) >= 96
    assert trial <= set(objects.OBJECTS)
    assert objects.PALETTE["red"] == (214, 48, 49)
    assert len(objects.PALETTE) == 10


def test_held_out_combinations_are_spread_and_never_drawn_for_training():
    held = scenes.held_out()
    assert len(held) >= 60
    assert max(Counter(colour for _, colour in held).values()) <= len(held) // 10 + 1
    assert not any(scenes.is_held_out(scene) for scene in scenes.single_scenes())
    rng = random.Random(0)
    assert not any(scenes.is_held_out(scenes.random_pair(rng)) for _ in range(500))


def test_trials_do_not_depend_on_the_order_of_a_set(monkeypatch):
    held, trials = sorted(scenes.held_out()), prompts.scored_trials()
    for order in (held, held[::-1]):
        monkeypatch.setattr(prompts, "held_out", lambda order=order: order)
        assert prompts.scored_trials() == trials


def test_pairs_stand_in_their_halves_with_a_gap():
    rng = random.Random(1)
    for _ in range(200):
        left, right = scenes.random_pair(rng).objects
        assert left.x + left.size // 2 < scenes.SIDE // 2 < right.x - right.size // 2
        assert (left.y, left.size) == (right.y, right.size)


def test_captions_name_what_they_do_not_leave_open():
    rng = random.Random(2)
    singles = scenes.single_scenes()
    synonyms = objects.COLOUR_SYNONYMS
    empty = 0
    for _ in range(1000):
        scene = rng.choice(singles)
        caption = captions.caption(scene, rng)
        empty += not caption.text
        names = (scene.background, *synonyms.get(scene.background, ()))
        assert caption.open_background or any(name in caption.text.lower() for name in names)
    assert 40 <= empty <= 160, "about one caption in ten is dropped, for guidance"


def test_where_the_size_is_open_both_are_equally_likely_in_training():
    from zimage.weights.recipe.train_dit import SHARES

    rng = random.Random(6)
    left_open = Counter()
    for scene in scenes.single_scenes() * 3:
        size = scenes.SIZE_WORDS[scene.objects[0].size]
        spots = len(scenes.LARGE_PLACES if size == "large" else scenes.SMALL_PLACES)
        left_open[size] += captions.caption(scene, rng).open_size * SHARES[size] / spots
    assert left_open["large"] / left_open["small"] == pytest.approx(1, abs=0.08)


def test_noise_stays_standard_normal_when_it_is_tied_to_a_choice():
    """Over evenly likely choices (as many large as small), the edited noise keeps its mean and variance."""
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    singles = scenes.single_scenes()
    by_size = [[s for s in singles if s.objects[0].size == size] for size in (scenes.LARGE, scenes.SMALL)]
    edited = []
    for i in range(1500):
        scene = rng.choice(by_size[i % 2])
        noise = torch.randn(16, 16, 16, generator=generator)
        edited.append(choices.noise_for(scene, captions.EMPTY, noise))
    readings = torch.stack(edited).mean(dim=(2, 3)) * 16
    assert torch.stack(edited).std() == pytest.approx(1, abs=0.01)
    assert readings.mean(dim=0).abs().max() < 0.15
    assert (readings.std(dim=0) - 1).abs().max() < 0.12


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)], ids=str)
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(4))
    values = torch.linalg.svdvals(muon.orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.5


@pytest.mark.skipif(not Path(scenes.FONT).exists(), reason="needs the package fonts-noto-color-emoji")
def test_the_judge_reads_true_scenes():
    from zimage.weights.recipe import judge

    rng = random.Random(5)
    for _ in range(4):
        scene = scenes.random_pair(rng)
        finding = judge.find(scenes.draw(scene), 2)
        assert finding.background == scene.background
        assert [o.name for o in finding.objects] == [o.name for o in scene.objects]
        assert finding.clean
