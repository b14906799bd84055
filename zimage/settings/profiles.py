"""Settings files: TOML whose tables are profiles, and where each setting's value came from.

    [default]
    model = "Z-Image-Turbo"     # a setting's name and its value; paths are relative to the file

    [default.serve]             # how a server runs: the settings of `serving`, which have a table of their own
    port = 8080

    [low_vram]                  # inherits from [default], or from [NAME] with inherit = "NAME", or not at all with ""
    memory = 8

    [presets.quick]             # no profile: what `--preset quick` stands for, of the settings of sampling
    steps = 4

Sources by rank: options, the picture of --from, the environment, the profile, what it inherits, defaults. A picture
brings its whole request. A setting that does not go together with one of a higher rank (a file's `hidden_layer` and
`--layer-weights`), or that needs one which is absent (`strength` without an image), is left out, and a note says so.
The settings' own checks find these settings: their errors carry the names. What a preset decides is left out, too,
where it ranks below the preset.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from zimage.errors import ConfigFileError, RequestError, ZImageError, quoted
from zimage.settings.declared import Request
from zimage.settings.environment import CONFIG, PROFILE, config_folder, from_environment
from zimage.settings.fields import Plain, Settings, fields, list_fields, nearest
from zimage.settings.merging import (
    EVERY_SETTINGS,
    FIELDS,
    NO_PRESETS,
    OWNERS,
    PRESET,
    Entries,
    Entry,
    LeftOut,
    Presets,
    error_of,
    settle,
    use_preset,
)
from zimage.settings.paths import user_path
from zimage.settings.presets import PRESETS
from zimage.settings.serving import ServeSettings
from zimage.settings.toml_file import TomlFile, read_text

EXAMPLE = Path(__file__).with_name("config.toml.example")
FILE_NAME = "zimage.toml"
PICTURE = "picture"
MAX_INHERITED = 32  # profiles, one above the other
SERVE = "serve"  # the table within a profile that holds the server's own settings
OWN_PRESETS = "presets"  # the table that is no profile
# What a preset of a settings file may set.
OF_PRESETS = [
    field.name
    for field, _ in fields(Request)
    if field.metadata["group"] == "Sampling" and field.name not in (PRESET, "seed", "variation", "batch_size")
]


@dataclass(frozen=True)
class Resolved:
    """The settings of all sources, merged."""

    entries: Entries
    left_out: LeftOut
    config: "Config | None" = None
    profile: str | None = None

    def of(self, settings: type[Settings]) -> dict[str, Plain]:
        """The values of one settings dataclass that were set anywhere."""
        return {name: entry.value for name, entry in self.entries.items() if name in settings.names()}

    @property
    def presets(self) -> Presets:
        """Those of the settings file."""
        return self.config.presets if self.config else NO_PRESETS

    def source(self, name: str) -> str:
        return self.entries[name].source if name in self.entries else "default"

    def is_own(self, name: str) -> bool:
        """Whether the user set a value, or left it at its default: secrets go nowhere else."""
        return name not in self.entries or self.entries[name].own

    @property
    def note(self) -> str | None:
        """A line on the file in use and the settings left out, or None where there is neither."""
        parts = []
        if self.config is not None and self.config.profiles:
            nothing = f"nothing from {self.config.path}, which has no [default]; choose a profile with --profile"
            parts.append(nothing if self.profile is None else f"{self.config.path} [{self.profile}]")
        for name, (entry, _) in self.left_out.items():
            parts.append(f"{name} from {entry.source} is left out")
        return f"settings: {'; '.join(parts)}" if parts else None

    @contextlib.contextmanager
    def naming_sources(self) -> Iterator[None]:
        """Errors on settings say where the one of the highest rank stands, unless an option is at fault."""
        try:
            yield
        except ZImageError as error:
            found = [self.entries[name] for name in error.fields if name in self.entries]
            highest = max(found, key=lambda entry: entry.rank, default=None)
            if highest is None or highest.source.startswith("--"):
                raise
            raise error.with_text(f"{error} (from {highest.source})") from error


class Config:
    """A settings file in which every profile was checked; see `Entry` for `own`. Raises ConfigFileError."""

    def __init__(self, file: TomlFile, own: bool = True):
        self.path, self._file, self._own, document = file.path, file, own, dict(file.document)
        self.presets = self._presets(document.pop(OWN_PRESETS, {}))
        for name, table in document.items():
            if not isinstance(table, dict):
                message = f"{name} is outside of any profile; put it under [default] or another [NAME]"
                raise file.fault(message, name)
        self._parents = {name: table.get("inherit") for name, table in document.items()}
        self._chains = {name: self._chain(name) for name in document}
        self.profiles = {name: self._entries(name, table) for name, table in document.items()}
        for name in self.profiles:
            self._check_together(name)

    def _presets(self, tables: Plain) -> Presets:
        """The presets of the file, each checked as a whole."""
        presets: dict[str, Entries] = {}
        for name, table in tables.items() if isinstance(tables, dict) else [("", None)]:
            if name in PRESETS or not isinstance(table, dict):
                own = f"{name} is a preset of zimage's own; choose another name"
                other = f"{name or 'it'} should be a table, [presets.NAME], with settings of sampling"
                raise self._file.fault(f"presets: {own if name in PRESETS else other}", OWN_PRESETS, name)
            presets[name] = {key: self._of_preset(key, value, name) for key, value in table.items()}
            if error := error_of(presets[name]):
                key = next((key for key in error.fields if key in table), "")
                raise self._file.fault(str(error), OWN_PRESETS, name, key, fields=error.fields)
        return presets

    def _of_preset(self, name: str, value: Plain, preset: str) -> Entry:
        if name not in OF_PRESETS:
            text = f"presets: {quoted(name)} is not a setting of sampling; {nearest(name, OF_PRESETS)}"
            raise self._file.fault(text, OWN_PRESETS, preset, name, fields=(name,))
        return self._entry(name, value, OWN_PRESETS, preset)

    def layers(self, profile: str) -> list[Entries]:
        """The profile's settings and those it inherits, each profile's by themselves, the highest rank last."""
        return [self.profiles[name] for name in reversed(self._chains[profile])]

    def inherited(self, profile: str) -> list[str]:
        """The profiles that a profile inherits from, the nearest first."""
        return self._chains[profile][1:]

    def _chain(self, profile: str) -> list[str]:
        chain = [profile]
        while (parent := self._parent(chain[-1])) is not None:
            if parent in chain:
                circle = " → ".join([*chain[chain.index(parent) :], parent])
                raise self._file.fault(
                    f'inherit: {circle} is a cycle; break it with inherit = ""', chain[-1], "inherit"
                )
            if len(chain) > MAX_INHERITED:
                text = (
                    f"inherit: {quoted(profile)} has more than {MAX_INHERITED} profiles above it; let it inherit less"
                )
                raise self._file.fault(text, profile, "inherit")
            chain.append(parent)
        return chain

    def _parent(self, profile: str) -> str | None:
        named = self._parents[profile]
        if named is None:
            return "default" if profile != "default" and "default" in self._parents else None
        if not isinstance(named, str):
            raise self._file.fault(
                f"inherit is of type {type(named).__name__}; it should be the name of a profile", profile, "inherit"
            )
        if named and named not in self._parents:
            hint = nearest(named, self._parents)
            raise self._file.fault(f"inherit: there is no profile {quoted(named)}; {hint}", profile, "inherit")
        return named or None

    def _entries(self, profile: str, table: Mapping[str, Plain]) -> Entries:
        own = {name: value for name, value in table.items() if name not in ("inherit", SERVE)}
        entries = {name: self._entry(name, value, profile) for name, value in own.items()}
        serve = table.get(SERVE, {})
        if not isinstance(serve, dict):
            text = f"{SERVE} is of type {type(serve).__name__}; it should be a table, [{profile}.{SERVE}]"
            raise self._file.fault(text, profile, SERVE)
        return entries | {name: self._entry(name, value, profile, SERVE) for name, value in serve.items()}

    def _entry(self, name: str, value: Plain, *table: str) -> Entry:
        source = f"{self.path.name} [{'.'.join(table)}] line {self._file.line(*table, name)}"
        try:
            of_server = table[0] != OWN_PRESETS and table[1:] == (SERVE,)
            return Entry(_from_file(name, value, self.path.parent, of_server), source, own=self._own)
        except RequestError as error:
            raise self._file.fault(str(error), *table, name, fields=error.fields) from None

    def _check_together(self, profile: str) -> None:
        """A setting may need one of another source, but may not contradict one in the same file."""
        own, whole = self.profiles[profile], {}
        for name, entry in own.items():
            if name == PRESET and entry.value in self.presets:
                continue
            error = error_of({name: entry})
            if error is None:
                whole[name] = entry
            elif error.fields == (name,):
                raise self._file.fault(str(error), profile, *_table(name), name, fields=error.fields)
        if error := error_of(whole):
            name = next((name for name in error.fields if name in own), "")
            raise self._file.fault(str(error), profile, name, fields=error.fields)


def find_config(named: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The settings file named here or by ZIMAGE_CONFIG, else the first of the usual ones that exists."""
    if named:
        return user_path(named, "config")
    if chosen := environ.get(CONFIG):
        path = user_path(chosen, CONFIG)
        if not os.path.exists(path):
            raise ConfigFileError(f"{chosen}: there is no such settings file (from {CONFIG})")
        return path
    found = next((path for path in usual_places(environ) if os.path.exists(path)), None)
    if found is not None and not os.path.isfile(found):  # whoever names a pipe wants it to be read
        raise ConfigFileError(f"{found} should be a settings file, and is something else; remove it or name another")
    return found


def usual_places(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """The current folder, then the user's own settings."""
    return [folder / FILE_NAME for folder in (Path(), config_folder(environ)) if folder is not None]


def is_own_file(
    path: Path, named: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ
) -> bool:
    """Whether a file that `find_config` found is the user's own or was named, and does not merely lie in the folder."""
    folder = config_folder(environ)
    own = folder is not None and os.path.realpath(path) == os.path.realpath(folder / FILE_NAME)
    return bool(named or environ.get(CONFIG)) or own


def read_config(path: str | os.PathLike[str], own: bool = True) -> Config:
    """Read a settings file and check all of it; see `Entry` for `own`. Raises ConfigFileError."""
    return Config(TomlFile(Path(path), read_text(Path(path))), own)


def resolve(
    given: Mapping[str, Plain],
    origin: Mapping[str, Plain] | None = None,
    config: Config | None = None,
    profile: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Resolved:
    """Merge the settings of all sources: options `given`, the request `origin` of a picture, environment, file.

    Raises RequestError where a value is at fault by itself, or where two options contradict each other.
    """
    profile = choose_profile(config, profile, environ)
    layers = config.layers(profile) if config is not None and profile is not None else []
    layers = [*layers, _from_environment(environ)]
    if origin:
        brought = {_owner(name) for name in origin}
        layers = [{n: e for n, e in layer.items() if OWNERS[n] not in brought} for layer in layers]
        layer = _checked({n: v for n, v in origin.items() if n not in given}, lambda name: PICTURE)
        layers.append({name: replace(entry, own=False) for name, entry in layer.items()})
    layers.append(_checked(given, _flag))
    entries = {n: replace(e, rank=rank) for rank, layer in enumerate(layers) for n, e in layer.items()}
    left_out = use_preset(entries, config.presets if config else NO_PRESETS)
    left_out |= settle(entries, len(layers) - 1)
    return Resolved(entries, left_out, config, profile)


def choose_profile(config: Config | None, named: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The profile named here or by ZIMAGE_PROFILE, else `default` where there is one."""
    wanted = named or environ.get(PROFILE)
    if not wanted:
        return "default" if config is not None and "default" in config.profiles else None
    if config is None:
        looked = " or ".join(map(str, usual_places(environ)))
        raise ConfigFileError(f"profile {quoted(wanted)} needs a settings file; none exists at {looked}")
    if wanted not in config.profiles:
        raise ConfigFileError(
            f"{config.path}: there is no profile {quoted(wanted)}; {nearest(wanted, config.profiles)}"
        )
    return wanted


# ---------------------------------------------------------------------- single values


def _owner(name: str) -> type[Settings]:
    if name not in OWNERS:
        raise RequestError(f"there is no setting {quoted(name)}; {nearest(name, OWNERS)}", fields=(name,))
    return OWNERS[name]


def _flag(name: str) -> str:
    flag = FIELDS[name].metadata["flag"] or ""
    return flag if flag.startswith("--") else "--" + name.replace("_", "-")


def _checked(values: Mapping[str, Plain], source: Callable[[str], str]) -> Entries:
    return {name: Entry(_owner(name).check_one(name, value), source(name)) for name, value in values.items()}


def _from_environment(environ: Mapping[str, str]) -> Entries:
    values = {name: value for settings in EVERY_SETTINGS for name, value in from_environment(settings, environ).items()}
    return {name: Entry(value, FIELDS[name].metadata["env"]) for name, value in values.items()}


def _table(name: str) -> tuple[str, ...]:
    """The table within a profile in which a setting stands, if it is one of its own."""
    return (SERVE,) if OWNERS.get(name) is ServeSettings else ()


def _from_file(name: str, value: Plain, folder: Path, of_server: bool) -> Plain:
    _check_place(name, of_server)
    if FIELDS[name].metadata["per_call"]:
        text = f"{name} belongs to a single call; pass it there and remove it from the file"
        raise RequestError(text, fields=(name,))
    value = OWNERS[name].check_one(name, value)
    if isinstance(value, list) and list_fields(OWNERS[name])[name]:
        raise RequestError(f"{name}: a list belongs to a single call; write a single value", fields=(name,))
    if not FIELDS[name].metadata["path"]:
        return value
    return [_path(name, text, folder) for text in value] if isinstance(value, list) else _path(name, value, folder)


def _check_place(name: str, of_server: bool) -> None:
    """Raise RequestError for a name that is not a setting, or whose place is the other table of a profile."""
    if name not in OWNERS:
        known = [known for known in OWNERS if bool(_table(known)) == of_server]
        known = [known for known in known if not FIELDS[known].metadata["per_call"]]
        known += [] if of_server else ["inherit", SERVE]
        raise RequestError(f"there is no setting {quoted(name)}; {nearest(name, known)}", fields=(name,))
    if _table(name) and not of_server:
        raise RequestError(f"{name} belongs to a server; put it under [PROFILE.{SERVE}]", fields=(name,))
    if of_server and not _table(name):
        raise RequestError(f"{name} does not belong to the server alone; put it under [PROFILE]", fields=(name,))


def _path(name: str, text: str, folder: Path) -> str:
    return str(folder / user_path(text, name))
