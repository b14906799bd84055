"""A loose weight file as its header tells it: tensors, kinds of numbers, metadata, and what it was recognised as."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from zimage.errors import printable
from zimage.formats.checkpoint import read_tensors
from zimage.formats.gguf import is_gguf
from zimage.formats.layouts import recognise
from zimage.formats.stored import Stored
from zimage.formats.unsupported import foreign_tool
from zimage.loading.files import Component
from zimage.loading.finding import tokenizer_near
from zimage.loading.registry import CONTROL

SHOWN = 80  # characters of a text in the metadata
ADAPTER = re.compile(r"[._](lora|lokr|hada|dora|oft|boft|glora|ia3|vera)_?\w*([._]|$)|\.diff(_b)?$")


def describe_file(file: Path) -> dict[str, Any]:
    """What a safetensors or GGUF file holds, as plain values; no weight is read. Raises CheckpointError."""
    tensors, metadata = read_tensors(file)
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for stored in tensors.values():
        kinds[stored.dtype]["tensors"] += 1
        kinds[stored.dtype]["bytes"] += stored.nbytes
    return {
        "file": str(file),
        "format": "GGUF" if is_gguf(file) else "safetensors",
        "bytes": file.stat().st_size,
        "components": list(recognise(tensors)),
        "holds": _recognised(file, tensors),
        "has_tokenizer": tokenizer_near(file) is not None,
        "tensors": [{"name": key, "dtype": s.dtype, "shape": list(s.shape)} for key, s in tensors.items()],
        "dtypes": dict(sorted(kinds.items(), key=lambda item: -item[1]["bytes"])),
        "metadata": {printable(key[:SHOWN]): _cut(value) for key, value in metadata.items()},
    }


def _recognised(file: Path, tensors: dict[str, Stored]) -> list[str]:
    """The components in a file with their layouts, else the kind of file that its keys show, if any."""
    found = [
        f"{name} ({known.name} names{f' behind {prefix}' if prefix else ''}{_control(file) if name == CONTROL else ''})"
        for name, (prefix, known) in recognise(tensors).items()
    ]
    tool = foreign_tool(tensors)
    if tool:
        found.append(f"weights quantised by {tool[0]}, which cannot be loaded")
    if not found and any(ADAPTER.search(key) for key in tensors):
        found.append("LoRA or another adapter (use it with --lora)")
    return found


def _control(file: Path) -> str:
    """What a ControlNet reads, and where it adds. Raises CheckpointError."""
    config: Any = Component.open(CONTROL, file).skeleton.config
    return f"; {config.told}; use it with --control"


def _cut(text: str) -> str:
    return printable(text[:SHOWN]) + ("…" if len(text) > SHOWN else "")
