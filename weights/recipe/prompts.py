"""The prompts the demo model is scored on, drawn deterministically, with what each must show."""

import random
from dataclasses import dataclass

from zimage.weights.recipe.objects import OBJECTS, PALETTE, article
from zimage.weights.recipe.scenes import held_out

SEED = 2026
SHOWN = (
    "a cat face on a blue background", "a banana", "a banana", "a small fox on a green background",
    "a large fox on a green background", "an owl, white background", "a cat and a dog on a yellow background",
    "a dog and a cat on a yellow background", "two cats", "a robot next to a ghost",
    "a rocket beside the moon, black background", "a house and a tree on an orange background",
    "A photo of a pizza.", "a dragon on a red background", "a sunflower, pink background",
    "a tiny penguin", "a guitar with a crown", "a lion to the left of an elephant",
)  # fmt: skip
"""What the contact sheet shows; repeated prompts show what the seed decides."""


@dataclass(frozen=True)
class Trial:
    """A prompt and the scene it asks for; None is left to the seed."""

    group: str
    prompt: str
    objects: tuple[str, ...]
    background: str | None
    size: str | None = None
    seed: int = 0


def on(what: str, colour: str) -> str:
    return f"{what} on {article(colour)} background"


def both(left: str, right: str) -> str:
    return f"{article(left)} and {article(right)}"


def scored_trials() -> list[Trial]:
    """Singles on seen and held-out colours, single objects of a named size, pairs seen and held out."""
    rng = random.Random(SEED)
    held = dict(sorted(held_out()))  # a set's own order is another in every process
    seen = {name: rng.choice([c for c in PALETTE if c != held[name]]) for name in OBJECTS}
    trials = [Trial("single, seen", on(article(n), c), (n,), c) for n, c in seen.items()]
    trials += [Trial("single, held out", on(article(n), c), (n,), c) for n, c in held.items()]
    for name in rng.sample(list(OBJECTS), 40):
        size, colour = rng.choice(("large", "small")), rng.choice([c for c in PALETTE if c != held[name]])
        trials.append(Trial("single, size named", on(f"a {size} {name}", colour), (name,), colour, size))
    trials += [pair_trial(rng, held, wanted=False) for _ in range(60)]
    trials += [pair_trial(rng, held, wanted=True) for _ in range(40)]
    return number(trials)


def pair_trial(rng: random.Random, held: dict[str, str], wanted: bool) -> Trial:
    """A pair of which a member is (`wanted`), or none is, held out on the background."""
    while True:
        left, right = rng.sample(list(OBJECTS), 2)
        colour = held[rng.choice((left, right))] if wanted else rng.choice(list(PALETTE))
        if (colour in (held[left], held[right])) == wanted:
            return Trial(
                f"pair, {'held out' if wanted else 'seen'}", on(both(left, right), colour), (left, right), colour
            )


def open_trials(prompts: int = 48, seeds: int = 4) -> list[Trial]:
    """Prompts without colour and size, each at several seeds."""
    rng = random.Random(SEED + 1)
    singles = [(name,) for name in rng.sample(list(OBJECTS), prompts * 2 // 3)]
    pairs = [tuple(rng.sample(list(OBJECTS), 2)) for _ in range(prompts - len(singles))]
    trials = []
    for objects in singles + pairs:
        prompt = article(objects[0]) if len(objects) == 1 else both(*objects)
        kind = "open, single" if len(objects) == 1 else "open, pair"
        trials += [Trial(kind, prompt, objects, None, None, rng.randrange(10**6)) for _ in range(seeds)]
    return trials


def free_trials() -> list[Trial]:
    """Written by hand: case, punctuation, synonyms, orders of words."""
    rows = [
        ("a cat face on a blue background", "cat", "blue"),
        ("A cat face on a blue background.", "cat", "blue"),
        ("A CAT ON A RED BACKGROUND", "cat", "red"),
        ("Dog on green", "dog", "green"),
        ("a photo of a bunny on a violet background", "rabbit", "purple"),
        ("a picture of the moon on black", "moon", "black"),
        ("grey background with a rocket", "rocket", "gray"),
        ("an elephant against a pink backdrop", "elephant", "pink"),
        ("A drawing of a donut, yellow background", "doughnut", "yellow"),
        ("burger on a plain white background.", "hamburger", "white"),
        ("a big tiger on an orange background", "tiger", "orange"),
        ("a tiny owl on a gray background", "owl", "gray"),
        ("the happy face in front of a red background", "happy face", "red"),
        ("face of a fox on a green background", "fox", "green"),
        ("a puppy face on a blue background", "dog", "blue"),
        ("An Image Of A Rose On A White Background", "rose", "white"),
        ("an apple on a blue background", "red apple", "blue"),
        ("a bike on a yellow background", "bicycle", "yellow"),
        ("two cats on a red background", "cat cat", "red"),
        ("two foxes on a gray background", "fox fox", "gray"),
        ("A cat and a dog on a yellow background.", "cat dog", "yellow"),
        ("a dog and a cat on a yellow background", "dog cat", "yellow"),
        ("a photo of a lion next to a tiger on a white background", "lion tiger", "white"),
        ("Pizza and hamburger on purple", "pizza hamburger", "purple"),
        ("a bee with a sunflower on a blue background", "bee sunflower", "blue"),
        ("a car to the left of a bus, green background", "car bus", "green"),
        ("a ghost beside a pumpkin on a black background", "ghost pumpkin", "black"),
        ("a star and the moon", "star moon", None),
        ("a pig face and a cow face on a pink background", "pig cow", "pink"),
        ("a pink background with a robot and an alien", "robot alien", "pink"),
    ]
    return number([Trial("free wording", p, tuple(split_names(names)), colour) for p, names, colour in rows])


def split_names(names: str) -> list[str]:
    return [names] if names in OBJECTS else names.split()


def number(trials: list[Trial]) -> list[Trial]:
    """Give each trial a seed of its own."""
    return [Trial(t.group, t.prompt, t.objects, t.background, t.size, seed) for seed, t in enumerate(trials)]
