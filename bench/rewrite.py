"""Writing with the text encoder: a token's time after the prompt, and memory over what it needs."""

from pathlib import Path

import click

from bench.options import DTYPE, FOLDER, JSON, PAIRS, sides_of
from bench.pairs import alternate, report
from bench.weights import TEXT_ENCODER, write_part


@click.command()
@FOLDER
@click.option("--against", type=click.Choice(["transformers", "none"]), default="transformers", show_default=True)
@PAIRS
@DTYPE
@JSON
@click.option("--prompt-tokens", default=100, show_default=True)
@click.option("--tokens", default=32, show_default=True, help="Tokens written, the likeliest each time.")
@click.option("--layers", default=36, show_default=True, help="Fewer make a smaller encoder at full width.")
def rewrite(
    folder: Path, against: str, pairs: int, dtype: str, as_json: bool, prompt_tokens: int, tokens: int, layers: int
) -> None:
    """Tokens written after a prompt; FOLDER gets a random text encoder (8.0 GB) when it has none.

    `memory_ratio` is the peak above what importing takes, over the weights and the keys and values of all tokens.
    """
    write_part(folder, "text_encoder", {**TEXT_ENCODER, "num_hidden_layers": layers})
    arguments = {"folder": str(folder), "dtype": dtype, "prompt_tokens": prompt_tokens, "tokens": tokens}
    runs = alternate(sides_of(against, arguments, {}), "rewrite", pairs)
    report(runs, {**arguments, "folder": None, "layers": layers}, as_json)
