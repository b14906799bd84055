"""`templates`: what prompt templates there are, and what is in them."""

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import click

from zimage.cli import terminal
from zimage.cli.options import PATH, Command, Group
from zimage.cli.progress import counted
from zimage.errors import RequestError
from zimage.settings.fields import Plain
from zimage.text.templates import Template, Templates, count_added_tokens, user_folder

MARKS = {"shipped": "", "own": "own", "override": "own, overrides shipped"}


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def templates(ctx: click.Context) -> None:
    """List, show and search the prompt templates. They say how a picture looks, not what it shows.

    \b
    zimage templates list                        all of them, by category
    zimage templates list --category lettering   those of one category
    zimage templates search film grain           those that contain these words
    zimage templates show NAME                   one in full
    """
    if ctx.invoked_subcommand is None:
        terminal.out(ctx.get_help())


def _shared(command: Command) -> Command:
    """The options that every subcommand has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print as JSON."),
        click.option("--model", type=PATH, help="Count tokens with the tokenizer of this model folder."),
        click.option(
            "--templates",
            "folder",
            type=PATH,
            help="Folder with your own templates, which override shipped ones of the same name. "
            "Default: ZIMAGE_TEMPLATES, else zimage/templates in the config folder.",
        ),
    ):
        command = option(command)
    return command


@templates.command("list")
@click.option("--category", metavar="NAME", help="List only this category; rewriter lists the rewriters.")
@click.option("--all", "everything", is_flag=True, help="Include the rewriters.")
@_shared
def list_command(category: str | None, everything: bool, as_json: bool, **options: Path | None) -> None:
    """List templates, with the number of tokens that each adds to a prompt."""
    shelf = _Shelf(**options)
    found = shelf.templates.list(category, everything)
    if as_json:
        terminal.out_json([shelf.facts(t) for t in found])
        return
    for _, members in groupby(found, key=lambda t: t.category):
        heading, *rows = shelf.rows(list(members), found)
        terminal.out(heading, bold=True)
        terminal.out("\n".join(rows) + "\n")
    _note(f"{counted(len(found), 'template')} in {counted(len({t.category for t in found}), 'category')}; ", found)


@templates.command()
@click.argument("name")
@_shared
def show(name: str, as_json: bool, **options: Path | None) -> None:
    """Show the template NAME in full."""
    shelf = _Shelf(**options)
    facts = shelf.facts(shelf.templates.get(name))
    if as_json:
        terminal.out_json(facts)
        return
    for line, is_heading in _description(facts):
        terminal.out(line, bold=is_heading)


@templates.command()
@click.argument("words", nargs=-1, required=True)
@_shared
def search(words: tuple[str, ...], as_json: bool, **options: Path | None) -> None:
    """Find the templates that contain the most of WORDS, best first.

    Each word matches the beginning of a word in the name, category, description or text.
    """
    shelf = _Shelf(**options)
    found = shelf.templates.search(words)
    if as_json:
        terminal.out_json([shelf.facts(t) for t in found])
        return
    for row in shelf.hits(found):
        terminal.out(row)
    _note(f"{counted(len(found), 'template')} with the most of these words; " if found else "no match; ", found)


class _Shelf:
    """The templates of one call, with what is told of each."""

    def __init__(self, folder: Path | None, model: Path | None):
        self.templates = Templates.open(folder or user_folder())
        self._encode = _encoder(model) if model else None

    def tokens(self, template: Template) -> int | None:
        """By the model's tokenizer if one was named, else as stored for those that ship."""
        if self._encode:
            return count_added_tokens(template, self._encode)
        return self.templates.stored_count(template.name)

    def facts(self, template: Template) -> dict[str, Plain]:
        """All there is to know of a template, as plain values."""
        own = {"tokens": self.tokens(template), "origin": self.templates.origin(template.name)}
        return {**vars(template), "path": str(template.path), **own}

    def rows(self, shown: Sequence[Template], all_shown: Sequence[Template]) -> list[str]:
        """Name, tokens and description under a heading, in columns as wide as all that is shown needs."""
        width = max(len(t.name) for t in all_shown)
        heading = f"{shown[0].category:{width + 1}} tokens"
        return [heading, *(_cut(f"  {t.name:{width}}{self._end(t, '')}") for t in shown)]

    def hits(self, found: Sequence[Template]) -> list[str]:
        """The same with the category in place of a heading."""
        width = max((len(t.name) for t in found), default=0)
        category = max((len(t.category) for t in found), default=0)
        return [_cut(f"{t.name:{width}}  {t.category:{category}}{self._end(t, ' tokens')}") for t in found]

    def _end(self, template: Template, unit: str) -> str:
        tokens, mark = self.tokens(template), MARKS[self.templates.origin(template.name)]
        count = f"{'-' if tokens is None else tokens:>6}{unit}"
        return f"{count}  [{mark}] {template.description}" if mark else f"{count}  {template.description}"


def _description(facts: dict[str, Plain]) -> Iterator[tuple[str, bool]]:
    """What `show` prints of a template's facts, and whether it is a heading."""
    yield from ((line, False) for line in _facts_lines(facts))
    for part in ("system_prompt", "thinking_content", "assistant_content"):
        if facts[part]:
            yield f"\n{part.replace('_', ' ')}", True
            yield _wrapped(facts[part]), False


def _facts_lines(facts: dict[str, Plain]) -> Iterator[str]:
    counted = facts["tokens"] is not None
    yield f"name         {facts['name']}"
    yield f"category     {facts['category']}"
    yield f"description  {facts['description']}"
    yield f"tokens       {facts['tokens'] if counted else '- (not counted: pass --model)'}"
    yield f"written for  {facts['model']}"
    if facts["add_think_block"] is not None:
        yield f"think block  {'on' if facts['add_think_block'] else 'off'}"
    yield f"file         {facts['path']} ({MARKS[facts['origin']] or 'shipped'})"


def _wrapped(text: str) -> str:
    """`text` wrapped between words to the width of the terminal; unchanged when output is not a terminal."""
    width = _width()
    return text if width is None else "\n".join(textwrap.fill(line, min(width, 100)) for line in text.split("\n"))


def _encoder(model: Path) -> Callable[[str], list[int]]:
    from zimage.text.tokenizer import Tokenizer

    if not model.exists():
        raise RequestError(f"model {model} does not exist; pass a model folder or a tokenizer folder")
    folder = model if model.is_dir() else model.parent
    return Tokenizer.load(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder).encode


def _note(text: str, found: Sequence[Template]) -> None:
    """How many there are and where to go on, beside the list: not in a pipe that reads it."""
    example = found[0].name if found else ""
    terminal.note(text + (f"zimage templates show {example}" if found else "zimage templates list shows all"))


def _cut(text: str) -> str:
    """`text` in the width of the terminal; whole where there is none."""
    width = _width()
    if width is None or _cells(text) <= width:
        return text
    while _cells(text) > width - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def _width() -> int | None:
    """Columns of the terminal, or those that the environment's COLUMNS asks for; None in a pipe."""
    wanted = terminal.is_terminal(sys.stdout) or "COLUMNS" in os.environ
    return shutil.get_terminal_size().columns if wanted else None


def _cells(text: str) -> int:
    """Columns that a text takes: Chinese and Japanese signs take two."""
    return sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)
