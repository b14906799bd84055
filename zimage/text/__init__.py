"""From a prompt to caption embeddings. Torch and tokenizers are imported when a class that needs them is first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage.text.qwen3 import Qwen3
    from zimage.text.tokenizer import Tokenizer

__all__ = ["Qwen3", "Tokenizer"]

_MODULES = {"Qwen3": "qwen3", "Tokenizer": "tokenizer"}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f"zimage.text.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'zimage.text' has no attribute {name!r}")
