"""Words on sheets: a font that has their characters, lines that fit a width, drawn from the top left.

Sizes and widths are in pixels. Pillow's own font has little beyond ASCII, so the system's fonts come first; prompts may
be in any script.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont

from zimage.errors import CheckpointError, RequestError, printable, quoted
from zimage.formats.files import require_file

# As systems name them: Latin, Greek and Cyrillic first, then fonts with Chinese, Japanese and Korean.
SYSTEM = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial.ttf",
    "LiberationSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Arial Unicode.ttf",
)
ELLIPSIS = "…"
ABSENT = "\uffff"  # no font has it: drawn as the sign for what is missing
LEADING = 1.35  # of a line, in sizes of its letters
Font = Any  # Pillow's FreeTypeFont, or its bitmap font in builds without FreeType


@dataclass(frozen=True)
class Letters:
    """Letters of one size, from a font that the user names, else from the first that has what is written."""

    size: int
    file: str | None = None

    @property
    def line(self) -> int:
        """The height of a line."""
        return round(self.size * LEADING)

    def width(self, text: str) -> int:
        return round(self._font(text).getlength(text))

    def wrapped(self, text: str, width: int, most: int) -> list[str]:
        """The text in at most so many lines; what does not fit ends in an ellipsis. Long words are broken."""
        words, lines = printable(text).split(), [""]
        while words:
            word = words.pop(0)
            longer = f"{lines[-1]} {word}".strip()
            if self.width(longer) <= width:
                lines[-1] = longer
            elif lines[-1]:
                lines.append("")
                words.insert(0, word)
            else:
                head = self._fitting(word, width)
                lines[-1] = head
                words.insert(0, word[len(head) :])
            if len(lines) > most:
                return [*lines[: most - 1], self._ended(lines[most - 1], width)]
        return lines

    def draw(self, onto: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], ink: str) -> None:
        """Write lines below one another."""
        for number, text in enumerate(lines):
            onto.text((at[0], at[1] + number * self.line), text, fill=ink, font=self._font(text))

    def _fitting(self, word: str, width: int) -> str:
        """As much of a word's beginning as fits, and at least one character."""
        end = next((i for i in range(2, len(word) + 1) if self.width(word[:i]) > width), len(word) + 1)
        return word[: end - 1]

    def _ended(self, text: str, width: int) -> str:
        while text and self.width(text + ELLIPSIS) > width:
            text = text[:-1]
        return text.rstrip() + ELLIPSIS

    def _font(self, text: str) -> Font:
        fonts = [_opened(self.file, self.size)] if self.file else _of_system(self.size)
        return next((font for font in fonts if _has(font, "".join(sorted(set(text))))), fonts[0])


@functools.cache
def _opened(file: str, size: int) -> Font:
    try:
        require_file(Path(file))  # a pipe would be waited for
        return ImageFont.truetype(file, size)
    except (OSError, ValueError, CheckpointError):
        text = f"font {quoted(file)} cannot be read; pass a TrueType or OpenType file"
        raise RequestError(text, fields=("font",)) from None


@functools.cache
def _of_system(size: int) -> list[Font]:
    """Those of SYSTEM that are here, and Pillow's own at the end."""
    found = []
    for name in SYSTEM:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # it is not here
            continue
    return [*found, ImageFont.load_default(size)]


@functools.lru_cache(maxsize=4096)
def _has(font: Font, characters: str) -> bool:
    absent = bytes(font.getmask(ABSENT))
    return not any(bytes(font.getmask(c)) == absent for c in characters if c.isprintable() and not c.isspace())
