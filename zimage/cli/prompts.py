"""Prompts from files and standard input: UTF-8 within limits, also from pipes, which are read as they come."""

import io
import sys
from pathlib import Path
from typing import BinaryIO

import click

from zimage.errors import RequestError

LONGEST = 16 << 20  # bytes of a file of prompts


def one_prompt(arguments: tuple[str, ...]) -> str:
    """The prompt that words make, quoted or not, or standard input for a lone -. Raises RequestError."""
    if arguments == ("-",):
        return standard_input()
    if "-" in arguments:
        raise RequestError("- reads the prompt from standard input; pass it alone")
    return " ".join(arguments)


def given_prompts(
    arguments: tuple[str, ...], file: Path | None, each: bool, named: tuple[str, ...] = ()
) -> str | list[str] | None:
    """The prompts of a command that takes several: those of a file, one per argument, or words that make one.

    `named` are those of --prompt. None where there are none. Raises RequestError.
    """
    if bool(arguments) + bool(file) + bool(named) > 1:
        raise RequestError("pass prompts as arguments or with --file, not both" + (", nor --prompt" if named else ""))
    if file:
        return file_prompts(file)
    if named:
        return list(named) if len(named) > 1 else one_prompt(named)
    if not arguments:
        return None
    apart = each or all(len(argument.split()) > 1 for argument in arguments)
    several = apart and len(arguments) > 1 and "-" not in arguments
    return list(arguments) if several else one_prompt(arguments)


# The prompts of programs in which they are an option, beside the argument of ours.
named_prompts = click.option("-p", "--prompt", "named_prompts", multiple=True, hidden=True)
# The argument of commands that take one prompt.
prompt_argument = click.argument("prompt", nargs=-1, required=True, callback=lambda _, __, words: one_prompt(words))


def file_prompts(path: Path) -> list[str]:
    """The prompts in a file, one per line. Raises RequestError."""
    try:
        with path.open("rb") as stream:
            text = _text(str(path), stream)
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]


def standard_input() -> str:
    """All of standard input as one prompt, whatever encoding the terminal is set to. Raises RequestError."""
    if sys.stdin is None or sys.stdin.closed:
        raise RequestError("standard input is closed; pass the prompt as an argument")
    try:
        stream = sys.stdin.buffer if hasattr(sys.stdin, "buffer") else io.BytesIO(sys.stdin.read().encode())
        return _text("standard input", stream).strip()
    except OSError as error:
        raise RequestError(f"standard input cannot be read: {error.strerror or error}") from None


def _text(name: str, stream: BinaryIO) -> str:
    content = stream.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise RequestError(f"{name} has more than {LONGEST:,} bytes of prompts")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise RequestError(f"{name} is not UTF-8: byte 0x{byte:02x} at {error.start:,}; save it as UTF-8") from None
