"""`python -m zimage.templates.count TOKENIZER_FOLDER`: count anew how many tokens each shipped template adds.

The folder is the `tokenizer/` of a model whose counts are wanted; those stored are of Qwen3's, which Z-Image uses.
"""

import json
import os
import sys
from pathlib import Path

import click

from zimage.errors import ZImageError
from zimage.formats.atomic import beside
from zimage.templates import FOLDER
from zimage.text.templates import TOKEN_COUNTS, Templates, count_added_tokens
from zimage.text.tokenizer import Tokenizer


def counts(folder: Path) -> dict[str, int]:
    """Name → added tokens, by name, with the tokenizer in `folder`."""
    encode = Tokenizer.load(folder).encode
    shipped = Templates.open().list(hidden=True)
    return {t.name: count_added_tokens(t, encode) for t in sorted(shipped, key=lambda t: t.name)}


def write(counts: dict[str, int], path: Path) -> None:
    """One line each, so that a change shows as what it is; whole, or not at all."""
    with beside(path) as partial:
        partial.write_text(json.dumps(counts, indent=0) + "\n", encoding="utf-8")
        os.replace(partial, path)


@click.command()
@click.argument("tokenizer_folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=FOLDER / TOKEN_COUNTS, help="File to write.")
def main(tokenizer_folder: Path, output: Path) -> None:
    """Write how many tokens each shipped template adds with the tokenizer in TOKENIZER_FOLDER."""
    try:
        found = counts(tokenizer_folder)
        write(found, output)
    except (ZImageError, OSError) as error:
        sys.exit(f"error: {error}")
    click.echo(f"{output}: {len(found)} templates, {sum(found.values()):,} tokens in all")


if __name__ == "__main__":
    main(prog_name="python -m zimage.templates.count")
