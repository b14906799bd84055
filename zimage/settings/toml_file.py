"""TOML whose keys know their lines, and whose faults name theirs: tomllib tells no key's line, and not every fault's.

No package helps: tomlkit keeps all text but tells no key's line either, names no line for a key that stands twice, and
names the file's last line for a string or list that never ends.
"""

import contextlib
import itertools
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from zimage.errors import ConfigFileError
from zimage.settings.fields import Plain

MAX_BYTES = 100_000
MAX_DOTS = 20  # of a key; tomllib's memory grows with the square of their number
MAX_TRIES = 500  # lines that might end a statement and do not; each costs a parse of what stands before it
MAX_MESSAGE = 1500  # characters; values in messages may be long
BACKSLASH = "; write paths in 'single quotes', where a backslash stands for itself"
HINTS = {
    "Unescaped": BACKSLASH,
    "Invalid hex value": BACKSLASH,
    "Cannot overwrite": "; the key appears twice",
    "Invalid value": "; text needs quotation marks",
}
ENDS = re.compile(r"""("{3}|'{3}|[\]}])\s*(#.*)?$""")  # how the last of a statement's several lines ends


class TomlFile:
    """A file that was parsed. Raises ConfigFileError."""

    def __init__(self, path: Path, text: str):
        self.path = path
        self._lines: dict[tuple[str, ...], int] = {}
        last, is_read = self._read_lines(text.split("\n"))
        try:
            self.document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise _syntax_fault(path, last, error) from None
        if not is_read:
            raise fault(path, last, "the value has too many lines that end in brackets")

    def line(self, *keys: str) -> int:
        """The line on which the statement of these keys begins, or of the table they are in."""
        found = (self._lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self._lines)
        return next(found, 1)

    def fault(self, message: str, *keys: str, fields: Iterable[str] = ()) -> ConfigFileError:
        """The error on what stands at these keys."""
        return fault(self.path, self.line(*keys), message, fields)

    def _read_lines(self, lines: list[str]) -> tuple[int, bool]:
        """Note where keys stand, statement by statement; returns the line of the last one, and whether it can be read.

        The first that cannot be read by itself is the last.
        """
        first, end = 0, 0
        header: tuple[str, ...] = ()
        while end < len(lines):
            first = end
            if lines[first].partition("=")[0].count(".") > MAX_DOTS:
                raise fault(self.path, first + 1, "nested too deeply")
            end, table = _statement(lines, first)
            if table is None:
                return first + 1, False
            paths, is_header = _key_paths(table), lines[first].lstrip().startswith("[")
            for path in paths:
                self._lines.setdefault(path if is_header else header + path, first + 1)
            header = paths[-1] if is_header else header
        return first + 1, True


def read_text(path: Path) -> str:
    """The text of a TOML file, its lines ended by \\n. Raises ConfigFileError."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise ConfigFileError(f"{path} is a folder; pass the settings file in it") from None
    except FileNotFoundError:
        raise ConfigFileError(f"{path}: there is no such settings file") from None
    except (OSError, ValueError) as error:
        raise ConfigFileError(f"{path} cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise ConfigFileError(f"{path} is larger than {MAX_BYTES // 1000} kB; is it a settings file?")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise fault(path, line, "the file is not encoded in UTF-8; save it as UTF-8") from None


def fault(path: Path, line: int, message: str, fields: Iterable[str] = ()) -> ConfigFileError:
    """The error on a line, itself on one line."""
    message = " ".join(message.split())
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} … {message[-MAX_MESSAGE // 4 :]}"
    return ConfigFileError(f"{path} line {line}: {message}", fields=fields)


def _statement(lines: list[str], first: int) -> tuple[int, dict[str, Plain] | None]:
    """The statement that begins on a line, and where the next one does; None where it does not end, or is broken."""
    ends = (n for n in range(first, len(lines)) if n == first or ENDS.search(lines[n]))
    for last in itertools.islice(ends, MAX_TRIES):
        with contextlib.suppress(ValueError, RecursionError):
            return last + 1, tomllib.loads("\n".join(lines[first : last + 1]))
    return len(lines), None


def _key_paths(table: dict[str, Plain]) -> list[tuple[str, ...]]:
    """The paths of keys down to the second level, each after the one that it lies in."""
    inner = {key: value if isinstance(value, dict) else {} for key, value in table.items()}
    return [path for key, value in inner.items() for path in [(key,), *((key, name) for name in value)]]


def _syntax_fault(path: Path, last: int, error: Exception) -> ConfigFileError:
    """tomllib says where, but for statements that never end, and for numbers and nesting beyond Python's limits."""
    message, _, place = str(error).partition(" (at ")
    message = re.sub(r"\('(.*)',\)", r"[\1]", message)
    if not isinstance(error, tomllib.TOMLDecodeError):
        message = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
    message += next((hint for start, hint in HINTS.items() if message.startswith(start)), "")
    if found := re.match(r"line (\d+), column (\d+)", place):
        return fault(path, int(found[1]), f"{message} (column {found[2]})")
    return fault(path, last, message)
