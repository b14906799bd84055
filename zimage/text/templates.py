"""Prompt templates: Markdown files whose front matter sets chat parts and whose body is the system prompt.

    ---
    name: photo-overcast
    description: Soft, shadowless daylight under a closed cloud cover
    category: photo
    ---
    The picture is a photograph taken under ...

The keys name, description and category are required; model, add_think_block, thinking_content and assistant_content
are optional. The file's name is the template's name plus `.md`. Reading is strict: nothing is skipped, and whatever is
not understood is an error that names file and line. A template in the user's folder replaces a shipped one of its name.
"""

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zimage.errors import RequestError, TemplateError, quoted
from zimage.settings.environment import config_folder, from_environment
from zimage.settings.fields import Plain, close_matches
from zimage.settings.loading import LoadSettings
from zimage.settings.paths import user_path
from zimage.templates import FOLDER
from zimage.text.chat import format_chat

if TYPE_CHECKING:
    import yaml

REWRITER = "rewriter"  # the category of system prompts that rewrite prompts and do not draw
TOKEN_COUNTS = "tokens.json"  # lies beside the shipped templates
MAX_BYTES = 65_536
REQUIRED = ("name", "description", "category")
OPTIONAL = ("model", "add_think_block", "thinking_content", "assistant_content")

_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_FENCE = "---"
_FIRST = 2  # the line of the file on which the front matter begins
# Unprintable, or a line break for YAML but not for editors, which would shift the line numbers.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
# Qwen3's tokenizer turns these into control tokens anywhere in a text, so a part could close its own turn.
_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?(?:think|tool_call|tool_response)>")
_KINDS = {"bool": "true or false", "int": "a number", "float": "a number", "null": "empty", "timestamp": "a date"}


@dataclass(frozen=True)
class Template:
    """Chat parts for a prompt; None leaves a part to the user or the default."""

    name: str
    description: str
    category: str
    model: str = "z-image"
    add_think_block: bool | None = None
    thinking_content: str | None = None
    assistant_content: str | None = None
    system_prompt: str = ""
    path: Path | None = None


def read_template(path: Path) -> Template:
    """The template in a file. Raises TemplateError naming file and line, or why the file cannot be opened."""
    try:
        return _parse(path, _read(path))
    except _Flaw as flaw:
        raise TemplateError(f"{path}, line {flaw.line}: {' '.join(str(flaw).split())}") from None
    except OSError as error:
        raise TemplateError(f"{path} cannot be read: {error.strerror or error}") from None


def count_added_tokens(template: Template, encode: Callable[[str], Sequence[int]]) -> int:
    """The number of tokens that this template adds to a prompt; `encode` turns text into token ids."""
    parts = (template.system_prompt, template.thinking_content, template.assistant_content)
    block = bool(template.thinking_content or template.add_think_block)
    return len(encode(format_chat("", *parts, think_block=block))) - len(encode(format_chat("")))


def user_folder() -> Path | None:
    """The user's own: the folder that ZIMAGE_TEMPLATES names, else `templates` in the config folder if it exists."""
    if named := from_environment(LoadSettings).get("templates"):
        return user_path(named, "templates")
    folder = config_folder()
    return folder / "templates" if folder is not None and os.path.isdir(folder / "templates") else None


class Templates:
    """The shipped templates and the user's own, which go first. A file is read once, when it is first needed."""

    def __init__(self, shipped: Mapping[str, Path], own: Mapping[str, Path]):
        self._shipped, self._own = shipped, own
        self._paths = {**shipped, **own}
        self._read: dict[str, Template] = {}

    @classmethod
    def open(cls, user_folder: Path | None = None) -> "Templates":
        """Raises RequestError if the folder cannot be read, TemplateError if two of its files have the same name."""
        return cls(_files(FOLDER), _files(user_folder) if user_folder else {})

    def get(self, name: str, field: str = "template") -> Template:
        """The template with this name; only its file is read.

        Raises RequestError that suggests the nearest names; `field` is the setting that has named it.
        """
        if name not in self._paths:
            near = _nearest(name, self._paths, "zimage templates list")
            raise RequestError(f"there is no template {quoted(name)}; {near}", fields=(field,))
        if name not in self._read:
            self._read[name] = read_template(self._paths[name])
        return self._read[name]

    def list(self, category: str | None = None, hidden: bool = False) -> Sequence[Template]:
        """Templates of one category or of all, by category and name; rewriters only if asked for or with `hidden`."""
        if category is None:
            return [t for t in self._all() if hidden or t.category != REWRITER]
        if category not in (known := self.categories()):
            raise RequestError(f"there is no category {quoted(category)}; {_nearest(category, known, None)}")
        return [t for t in self._all() if t.category == category]

    def search(self, words: Iterable[str]) -> Sequence[Template]:
        """The templates that contain the most of these words, best first; the beginning of a word is enough.

        Rewriters are found only by the beginning of the word 'rewriter'.
        """
        patterns = [re.compile(rf"(?<!\w){re.escape(word)}", re.IGNORECASE) for word in " ".join(words).split()]
        scores = {t.name: _score(t, patterns) for t in self._all()}
        most = max((found for found, _ in scores.values()), default=0)
        hits = [t for t in self._all() if most and scores[t.name][0] == most]
        return sorted(hits, key=lambda t: -scores[t.name][1])

    def categories(self) -> dict[str, int]:
        """The number of templates in each category, rewriters included."""
        return dict(Counter(t.category for t in self._all()))

    def origin(self, name: str) -> str:
        """`shipped`, `own`, or `override` for one of the user's that replaces a shipped one."""
        if name not in self._own:
            return "shipped"
        return "override" if name in self._shipped else "own"

    def stored_count(self, name: str) -> int | None:
        """The number of tokens that a shipped template adds with Qwen3's tokenizer; None for the user's own."""
        return _stored_counts().get(name) if self.origin(name) == "shipped" else None

    def _all(self) -> Sequence[Template]:
        return sorted((self.get(name) for name in self._paths), key=lambda t: (t.category, t.name))


@functools.cache
def _stored_counts() -> dict[str, int]:
    return json.loads((FOLDER / TOKEN_COUNTS).read_text(encoding="utf-8"))


def _files(folder: Path) -> dict[str, Path]:
    """Name → file of the Markdown files directly in a folder, but for its README and the hidden ones of editors."""
    try:
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".md" and not p.name.startswith("."))
        found = [path for path in found if path.name != "README.md"]
    except OSError as error:
        text = f"templates: the folder {folder} cannot be read: {error.strerror or error}"
        raise RequestError(text, fields=("templates",)) from None
    paths: dict[str, Path] = {}
    for path in found:
        if path.stem in paths:
            raise TemplateError(f"{path}, line 1: {paths[path.stem].name} beside it has the same name {path.stem!r}")
        paths[path.stem] = path
    return paths


def _nearest(name: str, known: Iterable[str], command: str | None) -> str:
    if near := close_matches(name, known, 3):
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"see: {command}" if command else f"known: {', '.join(known)}"


def _score(template: Template, patterns: Sequence[re.Pattern]) -> tuple[int, int]:
    """(words found, weight): the most for a hit in the name, then for one in the description, then one in the text."""
    parts = (template.thinking_content, template.assistant_content, template.system_prompt)
    text = "\n".join(part for part in parts if part)
    places = ((template.name, 8), (template.category, 4), (template.description, 3), (text, 1))
    weights = [sum(weight for place, weight in places if pattern.search(place)) for pattern in patterns]
    if template.category == REWRITER and not any(pattern.match(REWRITER) for pattern in patterns):
        return 0, 0
    return sum(weight > 0 for weight in weights), sum(weights)


# Reading a file ------------------------------------------------------------------------------------------------------


class _Flaw(Exception):
    """What is wrong, and on which line of the file."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


def _read(path: Path) -> str:
    """The file's text with plain line ends, checked to be printable and free of control tokens."""
    if not path.is_file():
        raise OSError("it is not a file" if path.exists() else "there is no such file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _Flaw(data[:-1].count(b"\n") + 1, f"the file is longer than {MAX_BYTES:,} bytes, the limit here")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _Flaw(data[: error.start].count(b"\n") + 1, f"not UTF-8: byte 0x{data[error.start]:02x}") from None
    _check_text(text)
    return text


def _parse(path: Path, text: str) -> Template:
    lines = text.split("\n")
    end = _closing_line(lines)
    body = "\n".join(lines[end:]).strip()
    values, where = _front_matter("\n".join(lines[1 : end - 1]))
    _check_names(path, values, where)
    if values.get("add_think_block") is False and "thinking_content" in values:
        raise _Flaw(where["add_think_block"], "add_think_block is false, but there is thinking_content; remove one")
    if not body and not {"add_think_block", "thinking_content", "assistant_content"} & values.keys():
        raise _Flaw(end, f"no text follows this {_FENCE!r} and no other chat part is set, so the template does nothing")
    return Template(**values, system_prompt=body, path=path)


def _closing_line(lines: list[str]) -> int:
    """The number of the line that closes the front matter."""
    fences = [number for number, line in enumerate(lines, 1) if line.rstrip() == _FENCE]
    if fences[:1] != [1]:
        raise _Flaw(1, f"a template begins with front matter: the first line should be {_FENCE!r}")
    if len(fences) < 2:
        raise _Flaw(len(lines), f"the front matter is not closed: a line {_FENCE!r} should follow it")
    return fences[1]


def _check_names(path: Path, values: Mapping[str, Plain], where: Mapping[str, int]) -> None:
    for key in ("name", "category"):
        if not _NAME.fullmatch(values[key]):
            raise _Flaw(
                where[key], f"{key} {quoted(values[key])} may contain only a-z, 0-9 and single hyphens between them"
            )
    if values["name"] != path.stem:
        raise _Flaw(where["name"], f"name {quoted(values['name'])} should be {path.stem!r}, as the file's name is")
    for key in ("description", "model"):
        if "\n" in values.get(key, ""):
            raise _Flaw(where[key], f"{key} should be a single line")


def _front_matter(text: str) -> tuple[dict[str, Plain], dict[str, int]]:
    """The values of the known keys, and the line of each key."""
    values: dict[str, Plain] = {}
    where: dict[str, int] = {}
    for key_node, node in _pairs(text):
        key, line = str(key_node.value), _line(key_node)
        if key not in REQUIRED + OPTIONAL:
            raise _Flaw(line, f"there is no key {quoted(key)}; {_nearest(key, REQUIRED + OPTIONAL, None)}")
        if key in where:
            raise _Flaw(line, f"{key} was already set on line {where[key]}")
        values[key], where[key] = _value(key, node), line
    if missing := [key for key in REQUIRED if key not in values]:
        raise _Flaw(1, f"the front matter lacks {' and '.join(missing)}")
    return values, where


def _value(key: str, node: "yaml.ScalarNode") -> str | bool:
    kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
    if key == "add_think_block":
        truth = {"true": True, "false": False}.get(node.value.lower())
        if kind != "bool" or truth is None:
            raise _Flaw(_line(node), f"add_think_block {quoted(node.value)} should be true or false")
        return truth
    if kind != "str":
        hint = "" if kind == "null" else "; if it is meant as text, put it in quotes"
        raise _Flaw(_line(node), f"{key} is {_KINDS.get(kind, f'of the type {kind!r}')}; it should be text{hint}")
    _check_text(node.value, _line(node))  # again, since an escape may produce what the file's text did not contain
    if not node.value.strip():
        raise _Flaw(_line(node), f"{key} is empty; it should be text")
    return node.value.strip()


def _check_text(text: str, line: int | None = None) -> None:
    """Refuse what does not belong in a prompt; the error names its line in `text`, or the `line` passed."""
    for pattern, complaint in (
        (_UNPRINTABLE, "the character U+{0:04X} is not printable; delete it"),
        (_CONTROL_TOKEN, "{1!r} is a control token of the chat format, which no chat part may contain"),
    ):
        if match := pattern.search(text):
            at = line or text.count("\n", 0, match.start()) + 1
            raise _Flaw(at, complaint.format(ord(match[0][0]), match[0]))


def _pairs(text: str) -> list[tuple["yaml.ScalarNode", "yaml.ScalarNode"]]:
    """The key and value nodes of the front matter, all scalars."""
    import yaml

    loader = _loader()(text)
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "it cannot be read"
        unclosed = "end of stream" in problem  # of a quote, for example: the line where it opens helps more
        mark = error.context_mark if unclosed else error.problem_mark
        line = (mark.line if mark else 0) + _FIRST
        raise _Flaw(line, f"broken YAML: {problem}; put text with a colon, # or quotes into quotes") from None
    except (ValueError, OverflowError) as error:  # PyYAML does not catch what chr() and int() raise
        raise _Flaw(loader.line + _FIRST, f"broken YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise _Flaw(_FIRST, "the front matter should be lines of the form `key: text`")
    return root.value


def _line(node: "yaml.Node") -> int:
    return node.start_mark.line + _FIRST


@functools.cache
def _loader() -> "type[yaml.SafeLoader]":
    """PyYAML's safe loader, restricted to one mapping of scalars; PyYAML is imported late because that takes time.

    Nesting could exhaust the stack, and aliases could expand a small file into a large one.
    """
    import yaml

    class FlatLoader(yaml.SafeLoader):
        def compose_node(self, parent: "yaml.Node | None", index: int) -> "yaml.Node | None":
            event = self.peek_event()
            line = event.start_mark.line + _FIRST
            if isinstance(event, yaml.AliasEvent) or event.anchor:
                raise _Flaw(line, "anchors and aliases are not supported; put text that begins with & or * into quotes")
            if parent is not None and isinstance(event, yaml.CollectionStartEvent):
                # The stub says that `index` is a number, but in a mapping it is the key's node.
                what = f"{index.value} is" if isinstance(index, yaml.Node) else "a key is"
                raise _Flaw(line, f"{what} a list or a mapping; it should be text, in quotes if it begins with [ or {{")
            return super().compose_node(parent, index)

    return FlatLoader
