"""Prompts for scenes. A caption names each object and may leave the ground's colour and the sizes open."""

import random
from dataclasses import dataclass

from zimage.weights.recipe.objects import COLOUR_SYNONYMS, FACES, OBJECTS, PALETTE, SYNONYMS, article, plural
from zimage.weights.recipe.scenes import LARGE, SMALL, Placed, Scene

ADJECTIVES = {LARGE: ("large", "big", "huge"), SMALL: ("small", "little", "tiny")}
OPENINGS = (
    "a photo of",
    "a picture of",
    "an image of",
    "a drawing of",
    "a painting of",
    "a photograph of",
    "an emoji of",
)
GROUNDS = (
    "{what} on a {colour} background",
    "{what} on {a_colour} background",
    "{what} on a plain {colour} background",
    "{what} in front of a {colour} background",
    "{what} against a {colour} background",
    "{what} against a {colour} backdrop",
    "{what} with a {colour} background",
    "{what} on {colour}",
    "{what}, {colour} background",
    "a {colour} background with {what}",
)
PAIRS = ("{a} and {b}", "{a} and {b}", "{a} next to {b}", "{a} beside {b}", "{a} with {b}", "{a} to the left of {b}")
NO_OBJECT = ("a {colour} background", "{colour} background", "plain {colour} background", "{colour}")
COLOUR_NAMED = 0.75
PLAIN_NAME = 0.75
# Large objects are harder to draw, so training shows more of them; but where a caption leaves the size open, both
# must be equally likely, since a sign of the noise decides (`choices.py`).
LARGE_PER_SMALL = 2.5
SIZE_OPEN = {LARGE: 0.8 / LARGE_PER_SMALL, SMALL: 0.8}
DROPPED = {LARGE: 0.125 / LARGE_PER_SMALL, SMALL: 0.125}


@dataclass(frozen=True)
class Caption:
    """A prompt and what it leaves to the seed."""

    text: str
    open_background: bool
    open_size: bool
    open_object: bool = False


EMPTY = Caption("", open_background=True, open_size=True, open_object=True)


def caption(scene: Scene, rng: random.Random) -> Caption:
    """A random way to ask for the scene; now and then no prompt at all, so that guidance has something to push from."""
    if not scene.objects:
        return _cased(rng.choice(NO_OBJECT).format(colour=colour_name(scene.background, rng)), rng, False, True)
    size, draw, single = scene.objects[0].size, rng.random(), len(scene.objects) == 1
    if single and draw < DROPPED[size]:
        return EMPTY
    names_size = single and draw >= SIZE_OPEN[size]
    names_colour = rng.random() < COLOUR_NAMED
    text = _pair(scene, rng) if len(scene.objects) == 2 else _single(scene.objects[0], names_size, rng)
    if rng.random() < 0.2:
        text = f"{rng.choice(OPENINGS)} {text}"
    if names_colour:
        text = _on_ground(text, scene.background, rng)
    return _cased(text, rng, not names_colour, not names_size)


def _single(placed: Placed, names_size: bool, rng: random.Random) -> str:
    name = object_name(placed.name, rng)
    if names_size:
        name = f"{rng.choice(ADJECTIVES[placed.size])} {name}"
    return _with_article(name, rng)


def _pair(scene: Scene, rng: random.Random) -> str:
    left, right = (o.name for o in scene.objects)
    if left == right:
        return f"two {plural(left)}"
    a, b = (_with_article(object_name(name, rng), rng) for name in (left, right))
    return rng.choice(PAIRS).format(a=a, b=b)


def _with_article(name: str, rng: random.Random) -> str:
    style = rng.random()
    return article(name) if style < 0.7 else f"the {name}" if style < 0.8 else name


def object_name(name: str, rng: random.Random) -> str:
    """The object's own name three times in four, else a synonym or, of a face, "cat face" or "face of a cat"."""
    others = list(SYNONYMS.get(name, ()))
    if name in FACES:
        others += [f"{name} face", f"{name} face", f"{name} head"]
    return name if not others or rng.random() < PLAIN_NAME else rng.choice(others)


def colour_name(colour: str, rng: random.Random) -> str:
    """The palette's name, or a synonym one time in three."""
    others = COLOUR_SYNONYMS.get(colour, ())
    return rng.choice(others) if others and rng.random() < 0.35 else colour


def _on_ground(text: str, background: str, rng: random.Random) -> str:
    colour = colour_name(background, rng)
    template = GROUNDS[0] if rng.random() < 0.5 else rng.choice(GROUNDS)
    return template.format(what=text, colour=colour, a_colour=article(colour))


def _cased(text: str, rng: random.Random, open_background: bool, open_size: bool) -> Caption:
    """Small letters mostly; a capital at the start, at every word, or everywhere; a full stop now and then."""
    style = rng.random()
    if style < 0.25:
        text = text[0].upper() + text[1:]
    elif style < 0.29:
        text = text.title()
    elif style < 0.31:
        text = text.upper()
    if rng.random() < 0.2:
        text += "."
    return Caption(text, open_background, open_size)


def known_words() -> list[str]:
    """Every word a training caption can hold, in small letters."""
    phrases = [*OBJECTS, *map(plural, OBJECTS), *PALETTE, *OPENINGS, *GROUNDS, *PAIRS, "two the an face head"]
    phrases += [word for group in (SYNONYMS, COLOUR_SYNONYMS, ADJECTIVES) for words in group.values() for word in words]
    words = " ".join(phrases).replace("{", " {").replace(",", " ").split()
    return sorted({word for word in words if not word.startswith("{")})
