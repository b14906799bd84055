"""The model card of the demo checkpoint: `README.md` in its folder, its figures taken from `scores.json`."""

import json
from pathlib import Path

from zimage.weights.recipe.captions import ADJECTIVES
from zimage.weights.recipe.objects import COLOUR_SYNONYMS, FACES, OBJECTS, PALETTE, SYNONYMS
from zimage.weights.recipe.scenes import LARGE, SMALL, TINY

COLUMNS = ("n", "background", "object", "size", "gap", "clean", "all right")
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The bundled demo model

The exact Z-Image architecture (Qwen3 text encoder, single-stream DiT, 16-channel AutoencoderKL) at small size:
{parameters:.1f} million parameters, {megabytes:.1f} MB in bf16. It draws 128 × 128 px scenes of one emoji, or of two
side by side, on a flat ground, from an English prompt, in 8 steps without guidance. It exists so that every stage of
this library can be run, tested and timed with trained weights and no download. It is a toy: it knows the words below
and nothing else.

The folder has the published layout and loads in diffusers' `ZImagePipeline` as well.

## What it knows
- **{n_objects} objects**: {objects}.
- **{n_colours} backgrounds**: {colours}.
- **Sizes of a single object**: {large}; {small}. The members of a pair share one of two sizes, which no word names.
- **Other words for the same things**: {synonyms}. Animals drawn as faces ({faces})
  also answer to "cat face", "cat head".
- **Two objects**: "a cat and a dog" puts the first on the left, the second on the right; also "next to", "beside",
  "with", "to the left of"; "two cats" works.
- Capitals, a full stop, articles, "a photo of …", "a picture of …" and the like make no difference.

What the prompt leaves open is decided by the seed: the background when no colour is named, the size of a single
object, the corner in which a small one stands, the size of a pair and its height; of an empty prompt, the object too.

## Scores
8 steps, guidance 0, weights in bf16, computed in {dtype}. "Held out" are combinations of object and background that no
stage of training saw (one colour per object). "Object" counts each member of a pair; "clean" means near enough to a
true scene, on a palette colour, pairs with a gap; "all right" is everything at once.

{table}

The first row is the scorer's own ceiling: true scenes passed through the autoencoder.
Two seeds of an open prompt give different pictures in {differ:.1%} of all cases.
Choices taken by open prompts: {freedom}.

    {command}

## Data and training
Scenes are drawn by the recipe (`weights/recipe/`, which a clone holds and a wheel does not): emoji of the font at
their native 109 px, resized to {large_px} px
(large, centred), {small_px} px (small, or one of a pair) or {tiny_px} px (one of a pair), on one of ten flat colours,
with captions from templates. Training took {vae_minutes:.0f} minutes for the autoencoder, in fp32, and
{dit_minutes:.0f} minutes for the DiT with its text encoder ({dit_steps:,} steps of {batch} scenes, in {compute}), on
two cores of a shared CPU. Autoencoder: {psnr}.

    {steps}

## Limits
- Other objects, colours, counts, actions, styles and languages: not known. Unknown words are ignored or mislead.
- 128 × 128 px only; other sizes run, but nothing was trained there.
- Which choice the seed makes was tied to the noise in training (`weights/recipe/choices.py`), so the demo decides
  more cleanly at few steps than a model trained in the ordinary way would.
- Details are soft: the autoencoder was trained for minutes.
{limits}
## Licence and attribution
Weights: Apache-2.0. They reproduce artwork of **Noto Color Emoji**, © Google Inc., licensed under the SIL Open Font
License 1.1 (Debian package `fonts-noto-color-emoji`, https://github.com/googlefonts/noto-emoji); the font itself is not
included. "Noto" is a trademark of Google Inc.
"""
COMMAND = "python -m zimage.weights.recipe score --dtype {dtype} --report weights/demo/scores.json"
STEPS = "\n    ".join(
    f"python -m zimage.weights.recipe {step}"
    for step in (
        "tokenizer --work DIR",
        "vae --work DIR --minutes {vae_minutes:.1f}",
        "dit --work DIR --minutes {dit_minutes:.1f}",
        "export --work DIR",
    )
)


def write_card(folder: Path, limits: tuple[str, ...] = ()) -> None:
    """Fill the card of `folder` from its scores.json, training.json and weights."""
    scores = json.loads((folder / "scores.json").read_text())
    training = json.loads((folder / "training.json").read_text())
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    weights = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    text = CARD.format(
        parameters=weights / 2e6,
        megabytes=size / 1e6,
        table=table(scores),
        dtype=scores["dtype"],
        differ=scores["freedom"]["two seeds differ"],
        freedom=freedom(scores["freedom"]),
        command=COMMAND.format(dtype=scores["dtype"]),
        steps=STEPS.format(**training),
        limits="".join(f"- {limit}\n" for limit in limits),
        **training,
        **words(),
    )
    (folder / "README.md").write_text(text)


def words() -> dict:
    """The vocabulary as running text."""
    groups = (SYNONYMS, COLOUR_SYNONYMS)
    return {
        "n_objects": len(OBJECTS),
        "objects": ", ".join(OBJECTS),
        "n_colours": len(PALETTE),
        "colours": ", ".join(PALETTE),
        "large": "/".join(ADJECTIVES[LARGE]),
        "small": "/".join(ADJECTIVES[SMALL]),
        "large_px": LARGE,
        "small_px": SMALL,
        "tiny_px": TINY,
        "faces": ", ".join(FACES),
        "synonyms": ", ".join(f"{' or '.join(ws)} ({name})" for group in groups for name, ws in group.items()),
    }


def table(scores: dict) -> str:
    rows = {"*ceiling*": scores["scorer's ceiling"], **scores["groups"]}
    lines = ["| group | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        cells = [str(row["n"])] + [f"{row[column]:.3f}" for column in COLUMNS[1:]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def freedom(counts: dict) -> str:
    parts = [
        f"{name}: " + ", ".join(f"{choice} {n}" for choice, n in choices.items())
        for name, choices in counts.items()
        if isinstance(choices, dict)
    ]
    return "; ".join(parts)
