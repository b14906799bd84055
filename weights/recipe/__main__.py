"""`python -m zimage.weights.recipe STEP --work DIR`: the steps that made the demo checkpoint, in order."""

import random
from pathlib import Path

import click
import torch

from zimage.weights import DEMO

WORK = click.option("--work", type=click.Path(path_type=Path), required=True, help="where checkpoints and logs go")
MODEL = click.option("--model", type=click.Path(path_type=Path), default=DEMO, help="checkpoint folder")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@click.group()
@click.option("--threads", default=2, help="CPU threads")
def main(threads: int) -> None:
    """preview, tokenizer, vae, dit, export, score, card, sheet"""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # decayed averages and momenta would run into them


@main.command()
@WORK
def preview(work: Path) -> None:
    """Write sheets of training scenes: objects.png and pairs.png."""
    from zimage.weights.recipe.objects import PALETTE
    from zimage.weights.recipe.scenes import LARGE, draw, random_pair, sheet, single_scenes

    work.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    first = {scene.objects[0].name: scene for scene in single_scenes() if scene.objects[0].size == LARGE}
    sheet([draw(scene) for scene in first.values()]).save(work / "objects.png")
    sheet([draw(random_pair(rng, colour)) for colour in PALETTE for _ in range(3)]).save(work / "pairs.png")


@main.command()
@WORK
def tokenizer(work: Path) -> None:
    """Train the tokenizer on the recipe's captions."""
    from zimage.weights.recipe.tokenizer import save_tokenizer, train_tokenizer

    save_tokenizer(train_tokenizer(), work / "tokenizer")


@main.command()
@WORK
@click.option("--minutes", default=15.0, help="of work, over all calls")
def vae(work: Path, minutes: float) -> None:
    """Train the autoencoder."""
    from zimage.weights.recipe.train_vae import train_vae

    train_vae(work, minutes)


@main.command()
@WORK
@click.option("--minutes", default=75.0, help="of work, over all calls")
def dit(work: Path, minutes: float) -> None:
    """Train the DiT with its text encoder; needs `tokenizer` and `vae`."""
    from zimage.weights.recipe.train_dit import train_dit

    train_dit(work, minutes)


@main.command()
@WORK
@click.option("--to", "folder", type=click.Path(path_type=Path), default=DEMO, help="folder to replace")
def export(work: Path, folder: Path) -> None:
    """Write the weights in the published layout."""
    from zimage.weights.recipe.export import export as write

    write(work, folder)


@main.command()
@MODEL
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32")
@click.option("--steps", default=8)
@click.option("--report", type=click.Path(path_type=Path), help="JSON file to write")
@click.option("--failures", type=click.Path(path_type=Path), help="PNG of the pictures that are wrong")
def score(model: Path, dtype: str, steps: int, report: Path | None, failures: Path | None) -> None:
    """Score a checkpoint folder; the last line is JSON."""
    from zimage.weights.recipe.score import score as run

    run(model, DTYPES[dtype], steps, report, failures)


@main.command()
@MODEL
@click.option("--limit", "limits", multiple=True, help="a further limit to state")
def card(model: Path, limits: tuple[str, ...]) -> None:
    """Write the folder's README.md from its scores.json and training.json."""
    from zimage.weights.recipe.card import write_card

    write_card(model, limits)


@main.command()
@MODEL
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.argument("prompts", nargs=-1)
def sheet(model: Path, output: Path, prompts: tuple[str, ...]) -> None:
    """Render PROMPTS (default: those of the README), one seed each, on one sheet."""
    from zimage.weights.recipe.export import load_folder
    from zimage.weights.recipe.prompts import SHOWN
    from zimage.weights.recipe.sample import render
    from zimage.weights.recipe.scenes import sheet as arrange

    texts = prompts or SHOWN
    arrange(render(*load_folder(model, torch.float32), texts, range(len(texts))), 6, labels=texts).save(output)


if __name__ == "__main__":
    main()
