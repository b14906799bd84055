"""Text ↔ token ids with Qwen's byte-level BPE: from `tokenizer.json`, `vocab.json` and `merges.txt`, or a GGUF file."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from zimage.errors import CheckpointError
from zimage.formats.gguf import CONTROL, UNUSED, USER, Vocabulary, is_gguf
from zimage.formats.json_text import read_json

# How Qwen2 and Qwen3 split text into words before they merge byte pairs.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    def __init__(self, fast: FastTokenizer):
        self._fast = fast

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """From a `tokenizer/` folder, a `tokenizer.json` or a GGUF file with a vocabulary in its metadata.

        Raises CheckpointError naming what is missing or damaged.
        """
        whole = path if path.is_file() else path / "tokenizer.json"
        try:
            if path.is_file() and is_gguf(path):
                fast = _from_gguf(path)
            elif whole.is_file():
                fast = FastTokenizer.from_file(str(whole))
                fast.normalizer = fast.normalizer or normalizers.NFC()
            elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
                fast = _from_vocabulary(path)
            else:
                raise CheckpointError(f"{path} should hold tokenizer.json, or vocab.json and merges.txt")
        except CheckpointError:
            raise
        except Exception as error:  # the Rust tokenizer raises plain Exception
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"{path}: the tokenizer cannot be read: {reason}") from error
        fast.no_truncation()
        fast.no_padding()
        return cls(fast)

    @property
    def vocab_size(self) -> int:
        """Number of entries, special tokens included."""
        return self._fast.get_vocab_size()

    def id_of(self, token: str) -> int:
        """The id of the token with this text. Raises CheckpointError if the vocabulary lacks it."""
        found = self._fast.token_to_id(token)
        if found is None:
            raise CheckpointError(
                f"the tokenizer has no token {token!r}; use the tokenizer that belongs to the text encoder"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """All token ids of `text`: nothing is added, nothing is truncated."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False)


def _from_vocabulary(folder: Path) -> FastTokenizer:
    return _qwen(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")), _special_tokens(folder))


def _from_gguf(file: Path) -> FastTokenizer:
    """The words and special tokens in a GGUF file; what only fills its vocabulary up is left out."""
    found = Vocabulary.read(file)
    words = {token: i for i, (token, kind) in enumerate(zip(found.tokens, found.kinds, strict=True)) if kind != UNUSED}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in found.merges)]
    wrong = next((merge for merge in merges if not {*merge, "".join(merge)} <= words.keys()), None)
    if wrong is not None:
        raise CheckpointError(f"{file}: the merge {' '.join(wrong)[:80]!r} does not join two of its tokens to a third")
    kinds = {token: kind for token, kind in zip(found.tokens, found.kinds, strict=True) if kind in (CONTROL, USER)}
    added = [AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in kinds.items()]
    return _qwen(models.BPE(words, merges), added)


def _qwen(bpe: models.BPE, added: Iterable[AddedToken]) -> FastTokenizer:
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
    fast.add_tokens(list(added))
    return fast


def _special_tokens(folder: Path) -> list[AddedToken]:
    """The `added_tokens_decoder` of tokenizer_config.json, in the order of the ids."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: vocab.json and merges.txt do not contain the special tokens")
    entries = read_json(path).get("added_tokens_decoder")
    if not entries:
        raise CheckpointError(f"{path}: the key 'added_tokens_decoder' is missing")
    kinds = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return [
        AddedToken(entry["content"], **{kind: entry.get(kind, False) for kind in kinds})
        for _, entry in sorted(entries.items(), key=lambda item: int(item[0]))
    ]
