"""`tokens`, `encode` and `see`: how long a prompt is, and the captions of prompts and pictures as files."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage.cli import terminal
from zimage.cli.options import PATH, GroupedCommand, options_of
from zimage.cli.prompts import prompt_argument
from zimage.cli.settings import configured, load_pipeline, resolve_options
from zimage.cli.target import check_output
from zimage.errors import RequestError
from zimage.settings.captions import CaptionSettings, TextSettings
from zimage.settings.fields import Plain
from zimage.settings.loading import LoadSettings

if TYPE_CHECKING:
    from torch import Tensor

    from zimage.pipeline import ZImage

ENDING = ".safetensors"
SEEN_AS = {"vision_text": "text", "vision_layer": "layer", "vision_tokens": "tokens"}  # setting → keyword of `see`


@click.command(cls=GroupedCommand)
@prompt_argument
@options_of(TextSettings)
@options_of(LoadSettings)
@configured
@click.option("--show", is_flag=True, help="Also print the formatted text and its tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def tokens(prompt: str, show: bool, as_json: bool, **options: object) -> None:
    """Count the tokens of PROMPT as the model reads it. Says what happens to those beyond the trained length."""
    pipe, text = _opened(options, TextSettings)
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
@options_of(CaptionSettings)
@options_of(LoadSettings)
@configured
def encode(prompt: str, output: Path, **options: object) -> None:
    """Save the caption of PROMPT for `gen --embeddings`. Captions of references are mixed in."""
    _check_output(output)
    pipe, text = _opened(options, CaptionSettings)
    from zimage.render.attached import opened_references

    filled = pipe.texts.filled(CaptionSettings.from_mapping(text))
    filled = replace(filled, reference=opened_references(filled.reference) or None)
    (caption,) = pipe.encode(prompt, **{**text, "reference": filled.reference})
    plain = {name: value for name, value in text.items() if name in TextSettings.names()}
    if note := pipe.describe_references(filled, pipe.count_tokens(prompt, **plain).tokens):
        terminal.note(note)
    _save(output, caption, {"prompt": prompt, **filled.to_mapping()}, pipe.captions_from.fingerprint)


@click.command(cls=GroupedCommand)
@click.argument("picture", type=PATH)
@click.option("-o", "--output", type=PATH, help="File to write (.safetensors). Default: named after the picture.")
@options_of(CaptionSettings, only=tuple(SEEN_AS))
@options_of(LoadSettings)
@configured
def see(picture: Path, output: Path | None, **options: object) -> None:
    """Save what a vision model sees in PICTURE. `gen --reference` then needs the file alone."""
    named, output = output is not None, output or Path(picture.stem + ENDING)
    _check_output(output)
    if output.exists() and not named:
        raise RequestError(f"output: {str(output)!r} exists; pass it with -o to replace it", fields=("output",))
    resolved = resolve_options(options)
    pipe, settings = load_pipeline(resolved), CaptionSettings.from_mapping(resolved.of(CaptionSettings))
    from zimage.render.attached import open_picture
    from zimage.render.seeing import needed

    opened = open_picture(picture)
    caption = pipe.see(opened, **{name: getattr(settings, field) for field, name in SEEN_AS.items()})
    seen_as = {field: getattr(settings, field) for field in SEEN_AS}
    _save(output, caption, {"picture": opened.describe(), **seen_as, "vision": needed(pipe.vision).describe()}, "")


def _check_output(output: Path) -> None:
    check_output(output, "output")
    if output.suffix != ENDING:
        raise RequestError(f"output {output.name!r} should end in {ENDING}")


def _save(output: Path, caption: "Tensor", request: dict[str, Plain], encoder: str) -> None:
    from zimage.text.embeddings import save_embeddings

    if output.exists():
        terminal.note(f"replacing {output}")
    save_embeddings(output, caption, request, encoder)
    terminal.saved(os.fspath(output))
    terminal.note(f"{len(caption)} tokens × {caption.shape[1]}, {str(caption.dtype).removeprefix('torch.')}")


def _opened(options: Mapping[str, object], kind: type[TextSettings]) -> tuple["ZImage", dict[str, Plain]]:
    """The pipeline and the settings of a text, of this kind, that the options ask for."""
    resolved = resolve_options(options)
    pipe, text = load_pipeline(resolved), resolved.of(kind)
    with resolved.naming_sources():
        pipe.texts.filled(kind.from_mapping(text))
    return pipe, text
