"""Every error a user can cause. Each message says what was wrong and what would be right, on one line."""

import reprlib
from collections.abc import Iterable
from typing import Self

LONGEST = 2000  # characters of an error
SHOWN = 80  # characters of a value in one
JOINERS = "\u200c\u200d"  # not printable by themselves, and part of words and emoji


def printable(text: str) -> str:
    """Text that may be anything, fit for a terminal: what would steer it, or cannot be shown, is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in JOINERS else " " if c.isspace() else _escaped(c) for c in text)


def one_line(text: str, longest: int = LONGEST) -> str:
    """Printable text on one line; of a longer one the middle is left out, since both ends of an error tell most."""
    line = text if text.isprintable() else " ".join(printable(text).split())
    if len(line) <= longest:
        return line
    end = longest // 3
    return f"{line[: longest - end - 3]} … {line[-end:]}"


def quoted(value: object) -> str:
    """A value from outside as an error shows it: of what is long or deep only the ends."""
    return one_line(_SHORT.repr(value), SHOWN)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Python shows no number of more than 4300 digits."""
        return repr(x) if x.bit_length() < 4 * SHOWN else f"a number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, SHOWN, SHOWN


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class ZImageError(Exception):
    """Base of all errors that are raised on purpose; `exit_status` is what the command line returns for it.

    `fields` names the settings at fault, the foremost first. Code reads these names, and never the wording of the text:
    the line in a settings file, the answer of a server and the marked field of a form are found by them.
    """

    exit_status = 1

    def __init__(self, text: str = "", *, fields: Iterable[str] = ()):
        super().__init__(one_line(text))
        self.fields = tuple(fields)

    def with_text(self, text: str) -> Self:
        """The same error with another text."""
        return type(self)(text, fields=self.fields)


class RequestError(ZImageError, ValueError):
    """A setting or an argument that cannot be used: the caller has to change the call."""

    exit_status = 2


class TemplateError(RequestError):
    """A prompt template that cannot be read; names the file, and the line where it is text that is at fault."""


class ConfigFileError(RequestError):
    """A settings file that cannot be used; names the file and, where there is one, the line."""


class CheckpointError(ZImageError):
    """A model folder or weight file that is missing, damaged or does not fit the architecture."""


class ConfigError(CheckpointError):
    """A `config.json` that lacks a needed key or asks for something that is not implemented."""


class FetchError(ZImageError):
    """A transfer that failed; what has arrived is kept, and the same command goes on from there."""


class RemoteError(ZImageError):
    """A server for text that could not be reached, refused, or answered what cannot be used."""


class RewriteError(ZImageError):
    """A rewriter that wrote no prompt."""


class NonFiniteError(ZImageError):
    """A stage produced NaN or infinity; names the stage and, where found, the weights at fault."""


class RanksParted(ZImageError):
    """Another rank of a group has gone, and this one cannot go on alone."""


class OutputError(ZImageError):
    """A file or stream that cannot be written: a full disk, a folder that is gone or closed. Names it."""


class OutOfMemory(ZImageError):
    """The device ran out of memory all the same: something else took it, or the plan's estimate was too low."""


def install_hint(extra: str, options: str = "") -> str:
    """The command that installs an extra of this project, for an installed wheel and for a clone."""
    return f'pip install "zimage-torch[{extra}]"{options} (in a clone: pip install -e ".[{extra}]"{options})'
