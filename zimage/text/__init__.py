"""From a prompt to caption embeddings."""

from zimage.text.qwen3 import Qwen3
from zimage.text.tokenizer import Tokenizer

__all__ = ["Qwen3", "Tokenizer"]
