"""From prompts and pictures to captions. Torch and tokenizers are imported when a class that needs them is used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage.text.qwen3 import Qwen3
    from zimage.text.qwen3_vl import Qwen3VL
    from zimage.text.tokenizer import Tokenizer

__all__ = ["Qwen3", "Qwen3VL", "Tokenizer"]

_MODULES = {"Qwen3": "qwen3", "Qwen3VL": "qwen3_vl", "Tokenizer": "tokenizer"}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f"zimage.text.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'zimage.text' has no attribute {name!r}")
