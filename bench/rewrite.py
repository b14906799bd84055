"""Writing with the text encoder: the time per token, and memory relative to what is needed."""

from pathlib import Path

import click

from bench.options import DEVICE, DTYPE, FOLDER, JSON, PAIRS, sides_of
from bench.pairs import alternate, report
from bench.weights import TEXT_ENCODER, write_component


@click.command()
@FOLDER
@click.option("--against", type=click.Choice(["transformers", "none"]), default="transformers", show_default=True)
@PAIRS
@DEVICE
@DTYPE
@JSON
@click.option("--prompt-tokens", default=100, show_default=True)
@click.option("--tokens", default=32, show_default=True, help="Tokens to write, the most likely one each time.")
@click.option("--layers", default=36, show_default=True, help="Depth of the encoder; its width stays.")
def rewrite(
    folder: Path,
    against: str,
    pairs: int,
    device: str,
    dtype: str,
    as_json: bool,
    prompt_tokens: int,
    tokens: int,
    layers: int,
) -> None:
    """Write tokens after a prompt; a random text encoder (8.0 GB) is written to FOLDER if it has none.

    `memory_ratio` is the peak above what the imports take, divided by the size of the weights and of all tokens' keys
    and values.
    """
    write_component(folder, "text_encoder", {**TEXT_ENCODER, "num_hidden_layers": layers})
    arguments = {
        "folder": str(folder),
        "dtype": dtype,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "device": device,
    }
    runs = alternate(sides_of(against, arguments, {}), "rewrite", pairs)
    report(runs, {**arguments, "folder": None, "layers": layers}, as_json)
