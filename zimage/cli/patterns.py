"""Patterns of output names: fields with small formats, and nothing that Python's formats can do besides."""

import re
import string

from zimage.errors import RequestError, quoted

NAME_FIELDS = ("prompt", "seed", "index", "width", "height", "steps")
FIELDS = ", ".join(f"{{{name}}}" for name in NAME_FIELDS)
WIDEST = 100  # characters of a field
LONGEST = 1000  # characters of a pattern
# Fill and alignment, zeros in front, width, precision, kind: {seed:08}, {index:>3}, {prompt:.20}, {seed:x}.
SPEC = re.compile(r"(?:[^{}]?[<>^])?0?(\d{0,3})(?:\.(\d{1,3}))?[dxs]?")


def check_pattern(pattern: str) -> None:
    """Raise RequestError unless the pattern is one that every picture's settings can fill, with names of sane sizes."""
    try:
        fields = [part for part in string.Formatter().parse(pattern[: LONGEST + 1]) if part[1] is not None]
    except ValueError:
        raise invalid(pattern) from None
    if len(pattern) > LONGEST:
        raise RequestError(f"output pattern {quoted(pattern)} has {len(pattern):,} characters; at most {LONGEST:,}")
    for _, name, spec, conversion in fields:
        found = SPEC.fullmatch(spec or "")
        if name not in NAME_FIELDS or conversion or not found:
            raise invalid(pattern)
        if any(int(size or 0) > WIDEST for size in found.groups()):
            raise RequestError(f"output pattern {quoted(pattern)}: {name} is wider than {WIDEST} characters")


def invalid(pattern: str) -> RequestError:
    return RequestError(f"output pattern {quoted(pattern)} is not valid; its fields may be {FIELDS}")
