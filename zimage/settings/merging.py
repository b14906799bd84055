"""Settings of several sources made one: by rank, without what does not go together, with what a preset stands for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from zimage.errors import RequestError
from zimage.settings.declared import Request
from zimage.settings.fields import Plain, Settings, fields
from zimage.settings.loading import LoadSettings
from zimage.settings.presets import check_preset, decided, names_of
from zimage.settings.rewriting import RewriteSettings
from zimage.settings.scale import BatchSettings, ParallelSettings
from zimage.settings.serving import ServeSettings

ALL_SETTINGS: tuple[type[Settings], ...] = (Request, LoadSettings, RewriteSettings)  # of a render
EVERY_SETTINGS: tuple[type[Settings], ...] = (*ALL_SETTINGS, ParallelSettings, BatchSettings, ServeSettings)
OWNERS: dict[str, type[Settings]] = {name: settings for settings in EVERY_SETTINGS for name in settings.names()}
FIELDS = {field.name: field for settings in EVERY_SETTINGS for field, _ in fields(settings)}
PRESET = "preset"
BELOW = 0.5  # of a rank: what a preset stands for gives way to what stands beside its name


@dataclass(frozen=True)
class Entry:
    """A setting's value and its source, as people write it; sources of a higher rank come first.

    It is the user's `own` unless a picture, a state or a file that merely lies in the current folder brought it.
    """

    value: Plain
    source: str
    rank: float = 0
    own: bool = True


Entries = dict[str, Entry]
Presets = Mapping[str, Entries]  # those of a settings file, by name
LeftOut = dict[str, tuple[Entry, str]]  # what does not go together with the rest, and why
NO_PRESETS: Presets = {}


def laid_over(
    defaults: Mapping[str, Plain], given: Mapping[str, Plain], presets: Presets = NO_PRESETS
) -> dict[str, Plain]:
    """What is `given` over `defaults`, without those of these that do not go together with it. Raises RequestError."""
    entries = {name: Entry(value, "default") for name, value in defaults.items()}
    entries |= {name: Entry(value, "request", 1) for name, value in given.items() if value is not None}
    use_preset(entries, presets)
    settle(entries, 1)
    return {name: entry.value for name, entry in entries.items()}


def use_preset(entries: Entries, presets: Presets) -> LeftOut:
    """Take out what ranks below a preset and is decided by it; put what a file's preset stands for in its place.

    Raises RequestError for a preset that does not exist.
    """
    named = entries.get(PRESET)
    if named is None or not isinstance(named.value, str):  # a value of another type is told by its own check
        return {}
    check_preset(named.value, presets)
    own = presets.get(named.value)
    decides = decided(names_of(named.value) if own is None else own)
    lower = [name for name in decides if name in entries and entries[name].rank < named.rank]
    left_out = {name: (entries.pop(name), f"{PRESET} {named.value} decides it") for name in sorted(lower)}
    if own is not None:
        del entries[PRESET]
        for name, entry in own.items():
            entries.setdefault(name, replace(entry, rank=named.rank - BELOW))
    return left_out


def settle(entries: Entries, top: float) -> LeftOut:
    """Take out what has a rank below `top` and does not go together with the rest. Raises what that does not solve."""
    left_out: LeftOut = {}
    while error := error_of(entries):
        lower = sorted(
            (n for n in error.fields if n in entries and entries[n].rank < top), key=lambda name: entries[name].rank
        )
        for names in [*([name] for name in lower), lower]:  # one of them, else all
            rest = {name: entry for name, entry in entries.items() if name not in names}
            left = error_of(rest)
            if left is None or left.fields != error.fields:
                left_out |= {name: (entries.pop(name), str(error)) for name in names}
                break
        else:
            raise error
    return left_out


def error_of(entries: Mapping[str, Entry]) -> RequestError | None:
    """What the settings' own checks say about values together."""
    try:
        for settings in EVERY_SETTINGS:
            values = {name: entry.value for name, entry in entries.items() if OWNERS[name] is settings}
            if values:
                settings.from_mapping(values)
    except RequestError as error:
        return error
    return None
