"""TOML whose faults name their line: tomllib tells no key's line, and of some faults none at all."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from zimage.errors import ConfigFileError

MAX_BYTES = 100_000
MAX_DOTS = 20  # of a key; tomllib's memory grows with the square of their number
MAX_MESSAGE = 1500  # characters; values in messages may be long
BACKSLASH = "; write paths in 'single quotes', where a backslash stands for itself"
HINTS = {
    "Unescaped": BACKSLASH,
    "Invalid hex value": BACKSLASH,
    "Cannot overwrite": "; the key stands there a second time",
    "Invalid value": "; texts stand in quotation marks",
}
# What decides where a TOML statement ends: comments and strings are skipped whole, brackets are counted.
TOKENS = re.compile(
    r"""\#[^\n]* | \"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5} | "(?:\\.|[^"\\\n])*" | '[^'\n]*' | [\[\]{}\n]""",
    re.DOTALL | re.VERBOSE,
)


class TomlFile:
    """A file that was parsed. Raises ConfigFileError."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text
        for line, statement in statements(text):
            if statement.partition("\n")[0].partition("=")[0].count(".") > MAX_DOTS:
                raise fault(path, line, "nested too deeply")
        try:
            self.document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise _syntax_fault(path, text, error) from None

    def line(self, *keys: str) -> int:
        """The line on which the statement of these keys begins, or of the table they are in."""
        found = (self._lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self._lines)
        return next(found, 1)

    def fault(self, message: str, *keys: str, fields: Iterable[str] = ()) -> ConfigFileError:
        """The error on what stands at these keys."""
        return fault(self.path, self.line(*keys), message, fields)

    @cached_property
    def _lines(self) -> dict[tuple[str, ...], int]:
        """Of keys down to the third level; a statement of sound TOML is sound by itself."""
        lines, header = {}, ()
        for line, statement in statements(self.text):
            paths = list(_key_paths(tomllib.loads(statement)))
            is_header = statement.lstrip().startswith("[")
            for path in paths:
                lines.setdefault(path if is_header else header + path, line)
            header = paths[-1] if is_header else header
        return lines


def read_text(path: Path) -> str:
    """The text of a TOML file, its lines ended by \\n. Raises ConfigFileError."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise ConfigFileError(f"{path} is a folder; name the settings file in it") from None
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
        raise fault(path, line, "the file is not in UTF-8; save it in this encoding") from None


def fault(path: Path, line: int, message: str, fields: Iterable[str] = ()) -> ConfigFileError:
    """The error on a line, itself on one line."""
    message = " ".join(message.split())
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} … {message[-MAX_MESSAGE // 4 :]}"
    return ConfigFileError(f"{path} line {line}: {message}", fields=fields)


def statements(text: str) -> Iterator[tuple[int, str]]:
    """Each statement of a TOML file (header, key and value, blank) with the number of its first line."""
    line, first, start, depth = 1, 1, 0, 0
    for token in TOKENS.finditer(text):
        line += token[0].count("\n")
        if token[0] in ("[", "{"):
            depth += 1
        elif token[0] in ("]", "}"):
            depth = max(depth - 1, 0)
        elif token[0] == "\n" and depth == 0:
            yield first, text[start : token.end()]
            first, start = line, token.end()
    yield first, text[start:]


def _syntax_fault(path: Path, text: str, error: Exception) -> ConfigFileError:
    """tomllib says where, but for statements that never end, and for numbers and nesting beyond Python's limits."""
    message, at, place = str(error).partition(" (at ")
    message = re.sub(r"\('(.*)',\)", r"[\1]", message)
    if not isinstance(error, tomllib.TOMLDecodeError):
        message = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
    for start, hint in HINTS.items():
        message += hint if message.startswith(start) else ""
    if at and (found := re.match(r"line (\d+), column (\d+)", place)):
        return fault(path, int(found[1]), f"{message} (column {found[2]})")
    all_of_it = list(statements(text))
    broken = next((line for line, statement in all_of_it if not _parses(statement)), all_of_it[-1][0])
    return fault(path, broken, message)


def _parses(statement: str) -> bool:
    try:
        return tomllib.loads(statement) is not None
    except (ValueError, RecursionError):
        return False


def _key_paths(table: Mapping[str, Any], depth: int = 3) -> Iterator[tuple[str, ...]]:
    """Paths of keys, each after the one that it lies in."""
    for key, value in table.items():
        yield (key,)
        if isinstance(value, dict) and depth > 1:
            yield from ((key, *path) for path in _key_paths(value, depth - 1))
