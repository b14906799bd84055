"""Text ↔ token ids with Qwen's byte-level BPE: from `tokenizer.json`, `vocab.json` and `merges.txt`, or a GGUF file."""

from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from zimage.errors import CheckpointError, quoted
from zimage.formats.gguf import is_gguf
from zimage.settings.fields import check_text
from zimage.text.tokenizer_file import naming_faults, read_gguf, read_tokenizer_json, read_vocabulary

ANY_ID = 1 << 32


class Tokenizer:
    def __init__(self, fast: FastTokenizer):
        self._fast, self._end = fast, ANY_ID
        fast.no_truncation()
        fast.no_padding()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """From a `tokenizer/` folder, a `tokenizer.json` or a GGUF file with a vocabulary in its metadata.

        Raises CheckpointError naming what is missing or damaged.
        """
        if path.is_file():
            return cls(read_gguf(path) if is_gguf(path) else read_tokenizer_json(path))
        if (path / "tokenizer.json").is_file():
            return cls(read_tokenizer_json(path / "tokenizer.json"))
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return cls(read_vocabulary(path))
        raise CheckpointError(f"{path} should hold tokenizer.json, or vocab.json and merges.txt")

    @property
    def vocab_size(self) -> int:
        """Number of entries, special tokens included."""
        return self._fast.get_vocab_size()

    def limit(self, end: int) -> None:
        """Ids of `end` and above are errors from now on: the text encoder has no embeddings for them."""
        self._end = end

    def id_of(self, token: str) -> int:
        """The id of the token with this text. Raises CheckpointError if the vocabulary lacks it."""
        found = self._fast.token_to_id(token)
        if found is None:
            raise CheckpointError(
                f"the tokenizer has no token {quoted(token)}; use the tokenizer that belongs to the text encoder"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """All token ids of `text`: nothing is added, nothing is truncated. Raises RequestError for invalid text."""
        check_text("prompt", text)
        with naming_faults("the tokenizer failed"):
            ids = self._fast.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= self._end:
            raise CheckpointError(f"the tokenizer gives id {max(ids)}; the text encoder has only {self._end}")
        return ids

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters (first, end) of `text` that each of its tokens stands for; raises as `encode` does."""
        self.encode(text)
        with naming_faults("the tokenizer failed"):
            return list(self._fast.encode(text, add_special_tokens=False).offsets)

    def decode(self, ids: list[int]) -> str:
        with naming_faults("the tokenizer failed"):
            return self._fast.decode(ids, skip_special_tokens=False)
