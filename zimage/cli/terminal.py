"""The one way to a terminal, a pipe or a log: everything that the commands say goes through here.

Names, prompts and answers come from outside and may hold anything: what would steer a terminal is escaped, and so is
what the stream's encoding lacks. A stream may be closed, its reader gone or its disk full: what is said is then lost,
and never what was done.
"""

import contextlib
import io
import json
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import TextIO

import click

from zimage.errors import OutputError, printable
from zimage.settings.fields import Plain

_WIPE = "\r\033[K"
_live = False  # whether a progress line stands on the terminal now


def out(text: str = "", *, bold: bool = False, dim: bool = False, end: str = "\n") -> None:
    """What a command is for, on standard output; a reader that has gone has read enough.

    Raises OutputError where it cannot be written.
    """
    clear()
    shown = _cleaned(text)
    if (bold or dim) and is_terminal(sys.stdout):
        shown = click.style(shown, bold=bold or None, dim=dim or None)
    if problem := _write(sys.stdout, shown + end):
        raise OutputError(f"standard output cannot be written: {problem}")


def out_json(value: Plain) -> None:
    """A value as one line of JSON. Raises OutputError."""
    out(_json(value))


def out_bytes(content: bytes) -> None:
    """A file on standard output, and nothing else.

    Raises BrokenPipeError where its reader has gone, and OutputError where it cannot be written.
    """
    clear()
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except OSError as error:
        _drop(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(f"standard output cannot be written: {error.strerror or error}") from error


def takes_files() -> bool:
    """Whether standard output is open, and takes bytes."""
    return getattr(sys.stdout, "buffer", None) is not None


def saved(text: str) -> None:
    """Names a file that is saved: that is done, also where its name cannot be written."""
    with warned():
        out(text)


@contextlib.contextmanager
def warned() -> Iterator[None]:
    """Results that could not be written are a warning here: what they tell of is saved."""
    try:
        yield
    except OutputError as error:
        note(f"warning: {error}; everything was saved")


def note(text: str) -> None:
    """A line that stays, on standard error, which may be closed."""
    clear()
    _write(sys.stderr, _cleaned(text) + "\n")


def show(text: str) -> None:
    """Replace the progress line."""
    global _live
    _write(sys.stderr, _WIPE + printable(text))
    _live = True


def clear() -> None:
    """Wipe the progress line, if one stands there."""
    global _live
    if _live:
        _write(sys.stderr, _WIPE)
    _live = False


def is_terminal(stream: TextIO | None) -> bool:
    """False for a stream that is closed, too."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def open_streams() -> None:
    """Make the standard streams fit for everything: what an encoding lacks is escaped.

    The numbers of closed ones are taken, lest a file that is opened later gets one, and what others print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


def tell_more() -> None:
    """Show what the library logs as information, too: the whole reasons of its warnings."""
    logging.getLogger("zimage").setLevel(logging.INFO)


class LogHandler(logging.Handler):
    """What the library logs, as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"{record.levelname.lower()}: {record.getMessage()}")


def _json(value: Plain) -> str:
    """Readable where the stream can hold it, else in ASCII: JSON has escapes of its own."""
    text = json.dumps(value, ensure_ascii=False)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeError:
        return json.dumps(value)
    return text if _cleaned(text) == text else json.dumps(value)


def _cleaned(text: str) -> str:
    """Lines that are fit for a terminal; spaces of all kinds stay, since names of files may hold them."""
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or unicodedata.category(c) == "Zs" else printable(c) for c in text)


def _write(stream: TextIO | None, text: str) -> str:
    """Write and flush; returns why it cannot be written, or nothing where nobody reads."""
    if stream is None:
        return ""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        _drop(stream)
    except OSError as error:
        _drop(stream)
        return error.strerror or str(error)
    except ValueError:  # it was closed
        pass
    return ""


def _drop(stream: TextIO) -> None:
    """What the stream still holds, and what comes, goes nowhere; Python would fail on it once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
