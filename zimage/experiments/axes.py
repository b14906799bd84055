"""The axes of a sweep: settings with the values that they take, each checked as its field checks it.

    steps=4,8,16                                    three values
    lora=,style.safetensors:0.8                     without it, and with it: an empty value leaves the setting as it is
    system_prompt=,"In oil, on canvas."             a value with a comma stands in double quotes, as in CSV

Any setting of a request or of loading can be one: a model, a LoRA, a template or a dtype is a parameter like the number
of steps. Axes are crossed with one another; those that are zipped change together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from zimage.errors import RequestError, quoted
from zimage.settings.declared import Request
from zimage.settings.environment import from_text
from zimage.settings.fields import Plain, Settings, fields, list_fields, nearest
from zimage.settings.loading import LoadSettings
from zimage.settings.sampling import MAX_SEED, RANDOM_SEED
from zimage.settings.scale import FIXED
from zimage.settings.varied import varied

SETTINGS: tuple[type[Settings], ...] = (Request, LoadSettings)
OWNERS = {name: settings for settings in SETTINGS for name in settings.names()}
KINDS = {field.name: kinds[-1] for settings in SETTINGS for field, kinds in fields(settings)}
LISTS = {name: takes_one for settings in SETTINGS for name, takes_one in list_fields(settings).items()}
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Axis:
    """Settings that change together, and their values at each point; a plain axis has one name."""

    names: tuple[str, ...]
    points: tuple[tuple[Plain, ...], ...]


def axis(name: str, values: Sequence[Plain]) -> Axis:
    """An axis of values as Python and TOML hold them; None or "" leaves the setting as it is. Raises RequestError."""
    check_name(name)
    if not values:
        raise RequestError(f"{name}: an axis needs a value", fields=(name,))
    return Axis((name,), tuple((checked(name, value),) for value in values))


def parse_axis(text: str) -> Axis:
    """NAME=VALUE,VALUE,… → an axis. Raises RequestError."""
    name, texts = varied(text)
    check_name(name)
    return axis(name, [read(name, value) for value in texts])


def zipped(axes: Sequence[Axis]) -> list[Axis]:
    """One axis whose settings change together; all must have as many values. Raises RequestError."""
    if len(axes) < 2:
        return list(axes)
    lengths = {len(one.points) for one in axes}
    names = tuple(name for one in axes for name in one.names)
    if len(lengths) > 1:
        told = ", ".join(f"{one.names[0]} has {len(one.points)}" for one in axes)
        raise RequestError(f"zipped axes need as many values each; {told}", fields=names)
    together = zip(*(one.points for one in axes), strict=True)
    return [Axis(names, tuple(sum(parts, ()) for parts in together))]


def check_axes(axes: Sequence[Axis]) -> None:
    """Raise RequestError where a setting stands in two axes, or a point twice in one."""
    names = [name for one in axes for name in one.names]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"{name}: it stands in two axes; put all values into one", fields=(name,))
    for one in axes:
        for i, point in enumerate(one.points):
            if point in one.points[:i]:
                shown = ", ".join("nothing" if value is None else quoted(value) for value in point)
                raise RequestError(f"{' and '.join(one.names)}: {shown} stands twice in its axis", fields=one.names)


def check_name(name: str) -> None:
    """Raise RequestError unless a sweep can vary this setting."""
    if name in FIXED:
        raise RequestError(f"{name} cannot be varied: {FIXED[name]}", fields=(name,))
    if name not in OWNERS:
        known = [known for known in OWNERS if known not in FIXED]
        raise RequestError(f"there is no setting {quoted(name)} to vary; {nearest(name, known)}", fields=(name,))


def read(name: str, text: str) -> Plain:
    """A value from the command line, as far as a plain type makes it from its text. Raises RequestError."""
    kind = KINDS[name] if KINDS[name] in (bool, int, float) else str
    return from_text(name, text, kind) if text else None


def checked(name: str, value: Plain) -> Plain:
    """A value of an axis as its field holds it, checked by itself; None for one that leaves it. Raises RequestError."""
    if value is None or value == "":
        return None
    if name in LISTS and not LISTS[name] and not isinstance(value, list):
        value = [value]
    if KINDS[name] is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    return OWNERS[name].check_one(name, value)


def shown(value: Plain) -> str:
    """A value of an axis as people read it, and write it with --vary."""
    if value is None:
        return "default"
    if isinstance(value, dict):
        return ",".join(f"{key}:{shown(weight)}" for key, weight in value.items())
    if isinstance(value, list | tuple):
        return " + ".join(map(shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value) or "(empty)"


def parse_seeds(text: str) -> list[int]:
    """0-3,7 → 0, 1, 2, 3, 7; −1 stays what it is, and may stand more than once. Raises RequestError."""
    seeds: list[int] = []
    for part in text.split(","):
        if part.strip() == str(RANDOM_SEED):
            seeds.append(RANDOM_SEED)
            continue
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise RequestError(f"seeds {quoted(text)} should be numbers and ranges, such as 0-3,7", fields=("seed",))
        low, high = int(first), int(last or first)
        if not low <= high <= MAX_SEED or high - low >= MOST_SEEDS:
            told = f"a range rises, up to {MAX_SEED}, and has at most {MOST_SEEDS:,} seeds"
            raise RequestError(f"seeds {quoted(part)}: {told}", fields=("seed",))
        seeds += range(low, high + 1)
    chosen = [seed for seed in seeds if seed != RANDOM_SEED]
    if len(set(chosen)) < len(chosen):
        raise RequestError(f"seeds {quoted(text)}: a seed stands twice", fields=("seed",))
    return seeds
