"""`tokens` and `encode`: how long a prompt is, and its caption as a file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage.cli import terminal
from zimage.cli.options import PATH, Command, GroupedCommand, options_of
from zimage.cli.prompts import prompt_argument
from zimage.cli.settings import configured, load_pipeline, resolve_options
from zimage.cli.target import check_output
from zimage.errors import RequestError
from zimage.settings.declared import LoadSettings, TextSettings
from zimage.settings.fields import Plain

if TYPE_CHECKING:
    from zimage.pipeline import ZImage


def text_command(command: Command) -> Command:
    """A decorator for commands that turn a prompt into text, tokens or a caption."""
    return options_of(TextSettings)(options_of(LoadSettings)(configured(command)))


@click.command(cls=GroupedCommand)
@prompt_argument
@text_command
@click.option("--show", is_flag=True, help="Also print the formatted text and its tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def tokens(prompt: str, show: bool, as_json: bool, **options: object) -> None:
    """Count the tokens of PROMPT as the model reads it. Says what happens to those beyond the trained length."""
    pipe, text = _opened(options)
    count = pipe.count_tokens(prompt, **text)
    ids = pipe.tokenize(prompt, **text)
    pieces = [pipe.model.tokenizer.decode([i]) for i in ids]
    if as_json:
        facts = {"tokens": count.tokens, "limit": count.limit, "outcome": count.outcome}
        terminal.out_json({**facts, "ids": ids, "pieces": pieces} if show else facts)
        return
    terminal.out(count.outcome)
    if show:
        terminal.out(pipe.model.tokenizer.decode(ids))  # a character may take several tokens
        terminal.out(" ".join(f"{piece!r}:{i}" for piece, i in zip(pieces, ids, strict=True)))


@click.command(cls=GroupedCommand)
@prompt_argument
@click.option("-o", "--output", required=True, type=PATH, help="File to write (.safetensors).")
@text_command
def encode(prompt: str, output: Path, **options: object) -> None:
    """Save the caption of PROMPT for `gen --embeddings`."""
    check_output(output, "output")
    if output.suffix != ".safetensors":
        raise RequestError(f"output {output.name!r} should end in .safetensors")
    pipe, text = _opened(options)
    request = {"prompt": prompt, **pipe.texts.filled(TextSettings.from_mapping(text)).to_mapping()}
    from zimage.text.embeddings import save_embeddings

    (caption,) = pipe.encode(prompt, **text)
    if output.exists():
        terminal.note(f"replacing {output}")
    save_embeddings(output, caption, request, pipe.captions_from.fingerprint)
    terminal.saved(os.fspath(output))
    terminal.note(f"{len(caption)} tokens × {caption.shape[1]}, {str(caption.dtype).removeprefix('torch.')}")


def _opened(options: Mapping[str, object]) -> tuple["ZImage", dict[str, Plain]]:
    """The pipeline and the text settings that the options ask for."""
    resolved = resolve_options(options)
    pipe, text = load_pipeline(resolved), resolved.of(TextSettings)
    with resolved.naming_sources():
        pipe.texts.filled(TextSettings.from_mapping(text))
    return pipe, text
