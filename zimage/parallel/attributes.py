"""Attributes of objects exchanged for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

Change = tuple[object, str, object]  # an object, its attribute, and what that is meanwhile
_NOTHING = object()


@contextmanager
def exchanged(changes: Iterable[Change]) -> Iterator[None]:
    """Set attributes of objects, and put back what each object had of its own, or nothing where it had nothing."""
    before: list[Change] = []
    try:
        for target, name, value in changes:
            before.append((target, name, vars(target).get(name, _NOTHING)))
            vars(target)[name] = value
        yield
    finally:
        for target, name, value in reversed(before):
            if value is _NOTHING:
                del vars(target)[name]
            else:
                vars(target)[name] = value
