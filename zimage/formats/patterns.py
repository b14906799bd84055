"""Regular expressions in settings from outside, matched in bounded time.

PEFT looks a layer up by `re.match(rf"(.*\\.)?({key})$", name)`, and Python's matcher tries alternatives one after
another: `(\\w+\\.?)+x` takes longer than anybody waits. Here a part of an expression maps the set of places that are
reached in a name to the set that is reached behind it, so that no place is tried twice. What has no such meaning
(backward references, looking ahead, flags inside) is refused.
"""

import re
from collections.abc import Callable

from zimage.errors import CheckpointError

LONGEST = 300  # characters of an expression
DEEPEST = 6  # groups within one another
MOST_TIMES = 100  # a repetition that is counted
SIMPLE = re.compile(r"\^?(?:[\w.\-]|\\\.)+", re.ASCII)  # a name, of one length
CHARACTER = re.compile(r"\\\.|[\w.\-]", re.ASCII)
CLASS = re.compile(r"\[\^?(?:\\[dwsDWS.\-]|[\w.,\- ])+\]", re.ASCII)
COUNTED = re.compile(r"\{(?P<least>\d*)(?:(?P<comma>,)(?P<most>\d*))?\}", re.ASCII)
REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}

Places = set[int]
Part = Callable[[str, Places], Places]  # a name and the places reached in it → those reached behind the part


class Pattern:
    """One expression. Raises CheckpointError where it is none, or one that is not supported."""

    def __init__(self, text: str):
        self.text, self._at, self._depth = text, 0, 0
        if len(text) > LONGEST:
            raise self._fault(f"it has {len(text)} characters; at most {LONGEST} are read")
        self.simple = SIMPLE.fullmatch(text) is not None
        # One character each; an empty one stands for any.
        self._characters = [found[-1] if found != "." else "" for found in CHARACTER.findall(text)]
        self._part = _in_turn([]) if self.simple else self._alternatives()
        if self._at < len(text) and not self.simple:
            raise self._fault("it closes a group that was not opened")

    def matches(self, name: str) -> bool:
        """Whether it matches the end of a module's name, from the beginning or from behind a dot."""
        if self.simple:
            return self._is_end_of(name)
        starts = {0, *(i + 1 for i, character in enumerate(name) if character == ".")}
        return len(name) in self._part(name, starts)

    def _is_end_of(self, name: str) -> bool:
        start = len(name) - len(self._characters)
        if start < 0 or (start > 0 and (self.text[0] == "^" or name[start - 1] != ".")):
            return False
        return all(own in ("", other) for own, other in zip(self._characters, name[start:], strict=True))

    # ------------------------------------------------------------------ reading

    def _alternatives(self) -> Part:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else _either(parts)

    def _sequence(self) -> Part:
        parts = []
        while self._at < len(self.text) and self.text[self._at] not in "|)":
            parts.append(self._anchor() or self._repeated(self._single()))
        return _in_turn(parts)

    def _anchor(self) -> Part | None:
        if self._take("^"):
            return lambda name, places: places & {0}
        if self._take("$"):
            return lambda name, places: places & {len(name)}
        return None

    def _single(self) -> Part:
        if self._take("("):
            return self._group()
        if self.text[self._at] == "[":
            return self._class()
        if self._take("."):
            return _character(lambda character: True)
        if self._take("\\"):
            return self._escaped()
        character = self.text[self._at]
        if character in REPEATS or COUNTED.match(self.text, self._at):
            raise self._fault(f"there is nothing to repeat before {self.text[self._at :]!r}")
        self._at += 1
        return _character(lambda found: found == character)

    def _group(self) -> Part:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._fault(f"its groups lie more than {DEEPEST} deep")
        if self._take("?") and not self._take(":"):
            raise self._fault(f"(?{self.text[self._at : self._at + 1]} is not supported")
        inside = self._alternatives()
        if not self._take(")"):
            raise self._fault("a group is not closed")
        self._depth -= 1
        return inside

    def _class(self) -> Part:
        found = CLASS.match(self.text, self._at)
        if found is None:
            raise self._fault(f"the set {self.text[self._at : self._at + 20]!r} is not supported")
        self._at = found.end()
        return self._in_set(found[0])

    def _escaped(self) -> Part:
        character = self.text[self._at : self._at + 1]
        self._at += 1
        if character in ("d", "w", "s", "D", "W", "S"):
            return self._in_set("\\" + character)
        if not character or character.isalnum():
            raise self._fault(f"\\{character} is not supported")
        return _character(lambda found: found == character)

    def _in_set(self, text: str) -> Part:
        try:
            regex = re.compile(text)
        except re.error as error:
            raise self._fault(str(error)) from error
        return _character(lambda character: regex.match(character) is not None)

    def _repeated(self, part: Part) -> Part:
        if self._at == len(self.text):
            return part
        if counts := REPEATS.get(self.text[self._at]):
            self._at += 1
        elif counted := COUNTED.match(self.text, self._at):
            counts = self._counts(counted)
            self._at = counted.end()
        else:
            return part
        self._take("?")  # the least or the most: the same names match
        rest = self.text[self._at : self._at + 1]
        if rest in REPEATS or COUNTED.match(self.text, self._at):
            raise self._fault(f"{rest} follows another repetition, which is not supported")
        return _times(part, *counts)

    def _counts(self, counted: re.Match[str]) -> tuple[int, int | None]:
        least, most = int(counted["least"] or 0), counted["most"]
        last = least if counted["comma"] is None else int(most) if most else None
        if (not counted["least"] and not most) or max(least, last or 0) > MOST_TIMES or least > (last or least):
            raise self._fault(f"{counted[0][:20]} is not a repetition of at most {MOST_TIMES} times")
        return least, last

    def _take(self, character: str) -> bool:
        taken = self.text[self._at : self._at + 1] == character
        self._at += taken
        return taken

    def _fault(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.text[:80]!r} is not a regular expression that can be used here: {reason}")


# ---------------------------------------------------------------------- matching


def _character(test: Callable[[str], bool]) -> Part:
    return lambda name, places: {i + 1 for i in places if i < len(name) and test(name[i])}


def _in_turn(parts: list[Part]) -> Part:
    def follow(name: str, places: Places) -> Places:
        for part in parts:
            if not places:
                break
            places = part(name, places)
        return places

    return follow


def _either(parts: list[Part]) -> Part:
    return lambda name, places: set().union(*(part(name, places) for part in parts))


def _times(part: Part, least: int, most: int | None) -> Part:
    def follow(name: str, places: Places) -> Places:
        for _ in range(least):
            places = part(name, places)
        reached, new, left = set(places), places, len(name) if most is None else most - least
        while new and left > 0:
            new, left = part(name, new) - reached, left - 1
            reached |= new
        return reached

    return follow
