"""What `--guidance-method NAME[:KEY=VALUE,…]` says: methods, their parameters, defaults and bounds, as a table.

What each method computes: `flow/guidance.py`, whose table has the same names.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from zimage.errors import RequestError, quoted
from zimage.settings.fields import nearest

Value: TypeAlias = int | float | tuple[int, ...]
FIELD = "guidance_method"


class Parameter(NamedTuple):
    """Of a method: the type of its default is that of its values; bounds are inclusive, and those of each layer."""

    default: Value
    minimum: float
    maximum: float


METHODS: Mapping[str, Mapping[str, Parameter]] = {
    "cfg": {},
    "cfg_zero": {"zero_init_steps": Parameter(1, 0, 1000)},
    "apg": {
        "eta": Parameter(0.0, 0, 1),
        "threshold": Parameter(15.0, 0, 100_000),
        "momentum": Parameter(0.0, -0.99, 0.99),
    },
    "slg": {
        "layers": Parameter((7, 8, 9), 0, 999),
        "scale": Parameter(2.8, 0, 100),
        "start": Parameter(0.01, 0, 1),
        "stop": Parameter(0.2, 0, 1),
    },
}


class GuidanceMethod(NamedTuple):
    """A method's name and the values of all its parameters."""

    name: str
    values: Mapping[str, Value]

    @classmethod
    def parse(cls, text: str) -> "GuidanceMethod":
        """Raises RequestError."""
        name, colon, rest = text.partition(":")
        if name not in METHODS:
            raise _fault(f"{quoted(name)} is not known; {nearest(name, METHODS)}")
        known = METHODS[name]
        values = {key: parameter.default for key, parameter in known.items()}
        given = [pair.partition("=") for pair in rest.split(",")] if colon else []
        for key, _, value in given:
            if key not in known:
                raise _fault(f"{quoted(key)} is not a parameter of {name}; {nearest(key, known)}")
            values[key] = _value(key, value, known[key])
        if len({key for key, _, _ in given}) < len(given):
            raise _fault(f"{quoted(text)} names a parameter twice")
        found = cls(name, values)
        found._check()
        return found

    def describe(self) -> str:
        """The text that gives the same method, whatever defaults become."""
        values = ",".join(f"{key}={_shown(value)}" for key, value in self.values.items())
        return f"{self.name}:{values}" if values else self.name

    def _check(self) -> None:
        start, stop = self.values.get("start", 0), self.values.get("stop", 1)
        if isinstance(start, float) and isinstance(stop, float) and start >= stop:
            raise _fault(f"start {start:g} must be below the stop {stop:g}")


def _value(key: str, text: str, parameter: Parameter) -> Value:
    """What a text says of a parameter."""
    kind, low, high = type(parameter.default), parameter.minimum, parameter.maximum
    items = text.split("+") if kind is tuple else [text]
    try:
        found = [float(item) if kind is float else int(item) for item in items]
    except ValueError:
        found = []
    if not found or not all(low <= value <= high for value in found):
        right = {float: "a number", int: "a whole number", tuple: "whole numbers, such as 7+8+9, each"}[kind]
        raise _fault(f"{key} {quoted(text)} should be {right} from {low:g} to {high:g}")
    return tuple(sorted({int(value) for value in found})) if kind is tuple else found[0]


def _shown(value: Value) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(int(value)) if value == int(value) else repr(value)


def _fault(rest: str) -> RequestError:
    return RequestError(f"{FIELD}: {rest}", fields=(FIELD,))
