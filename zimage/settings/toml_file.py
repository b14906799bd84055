"""TOML whose keys know their lines, and whose faults name theirs: tomllib tells no key's line, and not every fault's.

No package helps: tomlkit keeps all text but tells no key's line either, names no line for a key that stands twice, and
names the file's last line for a string or list that never ends.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from zimage.errors import ConfigFileError
from zimage.settings.fields import Plain

MAX_BYTES = 100_000
MAX_DOTS = 20  # of a key; tomllib's time and memory grow with the square of their number
MAX_MESSAGE = 1500  # characters; values in messages may be long
BACKSLASH = "; write paths in 'single quotes', where a backslash stands for itself"
HINTS = {
    "Unescaped": BACKSLASH,
    "Invalid hex value": BACKSLASH,
    "Cannot overwrite": "; the key appears twice",
    "Invalid value": "; text needs quotation marks",
}
TOKENS = re.compile(  # all of a text, each character once: a string without an end takes the rest of line or file
    r"""(?P<comment>\#[^\n]*)
    |(?P<text>"{3}(?:[^"\\]|\\.|"(?!""))*+"{0,5}|'{3}(?:[^']|'(?!''))*+'{0,5}|"(?:[^"\\\n]|\\[^\n])*+"?|'[^'\n]*+'?)
    |(?P<opening>[\[{])|(?P<closing>[\]}])|(?P<separator>[=,])|(?P<end>\n)|(?P<dot>\.)
    |[^\#"'\[{\]}=,\n.]++""",
    re.VERBOSE | re.DOTALL,
)


class TomlFile:
    """A file that was parsed. Raises ConfigFileError."""

    def __init__(self, path: Path, text: str):
        self.path = path
        self._lines: dict[tuple[str, ...], int] = {}
        last = self._read_lines(text)
        try:
            self.document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise _syntax_fault(path, last, error) from None

    def line(self, *keys: str) -> int:
        """The line on which the statement of these keys begins, or of the table they are in."""
        found = (self._lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self._lines)
        return next(found, 1)

    def fault(self, message: str, *keys: str, fields: Iterable[str] = ()) -> ConfigFileError:
        """The error on what stands at these keys."""
        return fault(self.path, self.line(*keys), message, fields)

    def _read_lines(self, text: str) -> int:
        """Note where keys stand; returns the line of the first statement that cannot be read by itself, or of the last.

        Nothing after that is noted: the file as a whole cannot be read either.
        """
        header: tuple[str, ...] = ()
        line = 1
        for line, statement in _statements(self.path, text):
            try:
                table = tomllib.loads(statement)
            except (ValueError, RecursionError):
                return line
            paths, is_header = _key_paths(table), statement.lstrip().startswith("[")
            for path in paths:
                self._lines.setdefault(path if is_header else header + path, line)
            header = paths[-1] if is_header else header
        return line


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


def _statements(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """The first line and the text of each statement, which ends with the line on which its brackets are closed.

    Raises ConfigFileError for keys that tomllib takes too long over.
    """
    begin, line, depth, dots = 0, 1, 0, 0
    for token in TOKENS.finditer(text):
        kind = token.lastgroup
        depth = max(0, depth + (kind == "opening") - (kind == "closing"))
        dots = dots + 1 if kind == "dot" else dots if kind in (None, "text") else 0
        if dots > MAX_DOTS:
            raise fault(path, line, "nested too deeply")
        if kind == "end" and depth == 0:
            statement = text[begin : token.start()]
            if statement.strip() and not statement.lstrip().startswith("#"):
                yield line, statement
            line, begin = line + statement.count("\n") + 1, token.end()
    if text[begin:].strip():
        yield line, text[begin:]


def _key_paths(table: dict[str, Plain], levels: int = 3) -> list[tuple[str, ...]]:
    """The paths of keys down to the third level, each after the one that it lies in."""
    if levels == 0:
        return []
    inner = {key: value if isinstance(value, dict) else {} for key, value in table.items()}
    return [(key, *path) for key, value in inner.items() for path in [(), *_key_paths(value, levels - 1)]]


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
