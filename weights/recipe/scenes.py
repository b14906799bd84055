"""Pictures of the training set: one or two emoji on a flat ground, at places that fall on the DiT's token grid.

A token covers 16 × 16 px (8× VAE, 2 × 2 patches). Each distinct (object, size, place on that grid) is one pattern to
learn, and the number of patterns decides how long training takes; so sizes and places are few and every place is a
whole number of tokens away from every other.
"""

import itertools
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from zimage.weights.recipe.objects import OBJECTS, PALETTE

SIDE = 128  # px
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"  # Debian package fonts-noto-color-emoji
FONT_PX = 109  # the only size the font's bitmaps have

LARGE, SMALL, TINY = 84, 54, 40  # px of the longer side; a single object is large or small, a pair small or tiny
SIZE_WORDS = {LARGE: "large", SMALL: "small", TINY: "tiny"}
PAIR_SIZES = (SMALL, TINY)
LARGE_PLACES = ((64, 64),)  # centres, px
# Small objects stand where the members of a pair stand, so both learn the same patterns.
PAIR_X, PAIR_Y = (32, 96), (48, 80)
SMALL_PLACES = tuple(itertools.product(PAIR_X, PAIR_Y))
HELD_OUT_SEED = 7
LABEL_SIZE, LABEL_LINES, LABEL_COLUMNS = 12, 2, 22  # px, and letters in a line below a picture of a sheet


@dataclass(frozen=True)
class Placed:
    name: str
    size: int
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """One object, or two from left to right, on a ground of one colour."""

    objects: tuple[Placed, ...]
    background: str


@cache
def held_out() -> frozenset[tuple[str, str]]:
    """(object, background) combinations that no stage of training sees: one colour per object, all colours equally."""
    names = random.Random(HELD_OUT_SEED).sample(list(OBJECTS), len(OBJECTS))
    return frozenset(zip(names, itertools.cycle(PALETTE)))


def is_held_out(scene: Scene) -> bool:
    return any((o.name, scene.background) in held_out() for o in scene.objects)


@cache
def sprite(name: str, size: int) -> Image.Image:
    """The emoji cropped to its ink, longer side `size` px, alpha premultiplied ("RGBa")."""
    font = ImageFont.truetype(FONT, FONT_PX)
    canvas = Image.new("RGBA", (2 * FONT_PX, 2 * FONT_PX))
    ImageDraw.Draw(canvas).text((20, 20), OBJECTS[name], font=font, embedded_color=True)
    ink = canvas.crop(canvas.getchannel("A").getbbox())
    scale = size / max(ink.size)
    # Premultiplied, or the colour of transparent pixels would bleed into the rim.
    return ink.convert("RGBa").resize([round(side * scale) for side in ink.size], Image.Resampling.LANCZOS)


@cache
def layer(placed: Placed) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied colour (128, 128, 3) and transparency (128, 128, 1) of one placed object, 0…1."""
    ink = sprite(placed.name, placed.size)
    canvas = Image.new("RGBa", (SIDE, SIDE))
    canvas.paste(ink, (placed.x - ink.width // 2, placed.y - ink.height // 2))
    array = np.asarray(canvas, dtype=np.float32) / 255
    return array[..., :3], 1 - array[..., 3:]


def draw(scene: Scene) -> Tensor:
    """The scene as (3, 128, 128) in [−1, 1]."""
    picture = np.broadcast_to(np.asarray(PALETTE[scene.background], dtype=np.float32) / 255, (SIDE, SIDE, 3))
    for placed in scene.objects:
        colour, clear = layer(placed)
        picture = colour + picture * clear
    return torch.from_numpy(picture * 2 - 1).permute(2, 0, 1).float().contiguous()


def single_scenes() -> list[Scene]:
    """Every allowed scene with one object."""
    spots = [(LARGE, x, y) for x, y in LARGE_PLACES] + [(SMALL, x, y) for x, y in SMALL_PLACES]
    scenes = [Scene((Placed(name, *spot),), background) for name in OBJECTS for spot in spots for background in PALETTE]
    return [scene for scene in scenes if not is_held_out(scene)]


def random_pair(rng: random.Random, background: str | None = None) -> Scene:
    """Two objects of one size at one height, one in each half; now and then the same object twice."""
    size, y = rng.choice(PAIR_SIZES), rng.choice(PAIR_Y)
    while True:
        names = rng.sample(list(OBJECTS), 2)
        if rng.random() < 0.04:
            names[1] = names[0]
        pair = tuple(Placed(name, size, x, y) for name, x in zip(names, PAIR_X, strict=True))
        scene = Scene(pair, background or rng.choice(list(PALETTE)))
        if not is_held_out(scene):
            return scene


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [−1, 1] → PIL."""
    array = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(array.numpy())


def sheet(pictures: list[Tensor], columns: int = 12, gap: int = 4, labels: Sequence[str] = ()) -> Image.Image:
    """A contact sheet, row by row; labels, when given, stand below their pictures."""
    rows = -(-len(pictures) // columns)
    across, down = SIDE + gap, SIDE + gap + (LABEL_LINES * LABEL_SIZE + gap if labels else 0)
    canvas = Image.new("RGB", (columns * across + gap, rows * down + gap), (90, 90, 90))
    write, font = ImageDraw.Draw(canvas), ImageFont.load_default(LABEL_SIZE)
    for i, picture in enumerate(pictures):
        x, y = gap + i % columns * across, gap + i // columns * down
        canvas.paste(to_image(picture), (x, y))
        if labels:
            text = "\n".join(textwrap.wrap(labels[i], LABEL_COLUMNS)[:LABEL_LINES])
            write.multiline_text((x + SIDE / 2, y + SIDE), text, "white", font, anchor="ma", align="center", spacing=1)
    return canvas
