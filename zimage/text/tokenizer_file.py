"""Files of tokenizers, which the `tokenizers` package sees only in part and only once they have been checked.

    tokenizer.json = normalizer, pre-tokenizer, decoder, added tokens  +  model: vocabulary and merges

The first are steps by name, and some of these panic, never return or take all memory on the right text: a Replace of
nothing, a pattern that backtracks, a Prepend of any length. Nothing can interrupt them, so only steps and patterns that
are known go on. The model is most of the file; its JSON is left to the package, which reads it faster.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from zimage.errors import CheckpointError, quoted
from zimage.formats.files import read_file
from zimage.formats.gguf import CONTROL, UNUSED, USER, Vocabulary
from zimage.formats.json_text import json_object, read_json

LONGEST = 32 << 20  # bytes; the published file has 11.4 MB
MAX_STEPS = 16  # of a sequence
MAX_ADDED = 10_000  # tokens beside the vocabulary
MAX_LETTERS = 200  # of such a token, and of any text in a step
# How Qwen2 and Qwen3 split text into words before they merge byte pairs.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = (QWEN_SPLIT, GPT4_SPLIT, GPT2_SPLIT)  # whose time grows with the text's length only
STEPS = {
    "normalizer": ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip"),
    "pre_tokenizer": ("ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Split"),
    "decoder": ("ByteLevel", "Fuse", "ByteFallback"),
}
KINDS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # flags of an added token
_MODEL = re.compile(rb'"model"\s*:\s*(?=\{)')
_EMPTY = {"type": "BPE", "vocab": {}, "merges": []}


def read_tokenizer_json(path: Path) -> FastTokenizer:
    """The tokenizer in a `tokenizer.json`; one without a normalizer gets Qwen's. Raises CheckpointError."""
    parts, model = _halves(path)
    added = [_added_token(path, token) for token in _added_tokens(path, parts)]
    steps = {part: parts.get(part) for part in STEPS}
    for part, step in steps.items():
        _check_step(path, part, step)
    shell: dict[str, Any] = {**steps, "version": "1.0", "added_tokens": [], "post_processor": None, "model": _EMPTY}
    with naming_faults(f"{path}: the tokenizer cannot be read"):
        fast = FastTokenizer.from_str(json.dumps(shell))
    fast.normalizer = fast.normalizer or normalizers.NFC()
    fast.model = model
    fast.add_tokens(added)
    return fast


def read_vocabulary(folder: Path) -> FastTokenizer:
    """Qwen's tokenizer from `vocab.json`, `merges.txt` and `tokenizer_config.json`. Raises CheckpointError."""
    names = ("vocab.json", "merges.txt")
    for name in names:
        read_file(folder / name, LONGEST)  # a regular file within limits
    with naming_faults(f"{folder}: the tokenizer cannot be read"):
        bpe = models.BPE.from_file(*(str(folder / name) for name in names))
    return _qwen(bpe, _special_tokens(folder))


def read_gguf(file: Path) -> FastTokenizer:
    """Qwen's tokenizer from a GGUF file, without tokens that only fill its vocabulary up. Raises CheckpointError."""
    found = Vocabulary.read(file)
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    words = {token: i for i, token in enumerate(found.tokens) if kinds[token] != UNUSED}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in found.merges)]
    wrong = next((merge for merge in merges if not {*merge, "".join(merge)} <= words.keys()), None)
    if wrong is not None:
        raise CheckpointError(f"{file}: the merge {quoted(' '.join(wrong))} does not join two of its tokens to a third")
    special = {token: kind == CONTROL for token, kind in kinds.items() if kind in (CONTROL, USER)}
    if len(special) > MAX_ADDED or not all(0 < len(token) <= MAX_LETTERS for token in special):
        raise CheckpointError(f"{file}: its special tokens should be at most {MAX_ADDED:,} short texts")
    with naming_faults(f"{file}: the tokenizer cannot be read"):
        added = [AddedToken(token, special=is_special, normalized=False) for token, is_special in special.items()]
        return _qwen(models.BPE(words, merges), added)


def _qwen(bpe: models.BPE, added: list[AddedToken]) -> FastTokenizer:
    """A tokenizer that cuts text as Qwen's does before it merges."""
    fast = FastTokenizer(bpe)
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_tokens(added)
    return fast


@contextlib.contextmanager
def naming_faults(what: str) -> Iterator[None]:
    """Whatever the package raises is a CheckpointError: plain Exceptions, and BaseExceptions where Rust panics."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0].rpartition("unpickle Model: ")[2] or type(error).__name__
        raise CheckpointError(f"{what}: {quoted(reason)}") from None


def _halves(path: Path) -> tuple[dict[str, Any], models.Model]:
    """What stands round the model, and the model.

    It comes last in every file that the package wrote; then its text need not be read here. That it is one JSON value,
    and nothing follows, is what the package checks.
    """
    data = read_file(path, LONGEST)
    found = _MODEL.search(data)
    if found and data.rstrip().endswith(b"}"):
        with contextlib.suppress(CheckpointError):
            before = json_object(str(path), data[: found.start()] + b'"model": null}')
            return before, _model(path, data[found.end() :].rstrip()[:-1])
    whole = json_object(str(path), data, LONGEST)
    return whole, _model(path, json.dumps(whole.get("model")).encode())


def _model(path: Path, content: bytes) -> models.Model:
    """The model that a JSON text describes. Raises CheckpointError."""
    shell = FastTokenizer(models.BPE())
    with naming_faults(f"{path}: the tokenizer cannot be read"):
        model = models.BPE()
        model.__setstate__(content)
        shell.model = model
    if not isinstance(shell.model, models.BPE | models.WordLevel) or getattr(shell.model, "dropout", None):
        raise CheckpointError(f"{path}: the tokenizer's model is not implemented; it must be BPE, without dropout")
    return shell.model


def _check_step(path: Path, part: str, step: object) -> None:
    """Raise CheckpointError for a step that is not known, or not with what it holds."""
    if step is None:
        return
    if not isinstance(step, Mapping) or not isinstance(step.get("type"), str):
        raise CheckpointError(f"{path}: {part} = {quoted(step)} should be an object with a type")
    if step["type"] == "Sequence":
        inner = step.get({"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}.get(part, "decoders"))
        if not isinstance(inner, list) or len(inner) > MAX_STEPS:
            raise CheckpointError(f"{path}: {part} should be a sequence of at most {MAX_STEPS} steps")
        for each in inner:
            _check_step(path, part, each)
        return
    if step["type"] not in STEPS[part]:
        known = f"known are {', '.join(STEPS[part])}"
        raise CheckpointError(f"{path}: {part} {quoted(step['type'])} is not implemented; {known}")
    for key, value in step.items():
        if not (_is_known_pattern(value) if key == "pattern" else isinstance(value, bool) or _is_short(value)):
            raise CheckpointError(f"{path}: {part} {step['type']}: {quoted(key)} = {quoted(value)} is not implemented")


def _is_known_pattern(pattern: object) -> bool:
    if not isinstance(pattern, Mapping) or len(pattern) != 1:
        return False
    return pattern.get("Regex") in PATTERNS or bool(_is_short(pattern.get("String")) and pattern["String"])


def _is_short(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_LETTERS


def _added_tokens(path: Path, parts: Mapping[str, Any]) -> Iterable[object]:
    found = parts.get("added_tokens") or []
    if not isinstance(found, list) or len(found) > MAX_ADDED:
        raise CheckpointError(f"{path}: added_tokens should be a list of at most {MAX_ADDED:,} tokens")
    return found


def _added_token(path: Path, token: object) -> AddedToken:
    if not isinstance(token, Mapping) or not token.get("content") or not _is_short(token["content"]):
        raise CheckpointError(f"{path}: the added token {quoted(token)} should have a short text as its content")
    flags = {kind: token.get(kind, False) for kind in KINDS}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(f"{path}: the added token {quoted(token['content'])} should have true or false for flags")
    with naming_faults(f"{path}: the added token {quoted(token['content'])} cannot be read"):
        return AddedToken(token["content"], **flags)


def _special_tokens(folder: Path) -> list[AddedToken]:
    """The `added_tokens_decoder` of tokenizer_config.json, in the order of the ids."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: vocab.json and merges.txt do not contain the special tokens")
    entries = read_json(path).get("added_tokens_decoder")
    if not entries:
        raise CheckpointError(f"{path}: the key 'added_tokens_decoder' is missing")
    if not isinstance(entries, dict) or not all(re.fullmatch("[0-9]{1,9}", key) for key in entries):
        raise CheckpointError(f"{path}: added_tokens_decoder = {quoted(entries)} should be an object of ids and tokens")
    return [_added_token(path, token) for _, token in sorted(entries.items(), key=lambda item: int(item[0]))]
