"""Published adapters that ask for other defaults: recognised by the names of their files or by their metadata.

What a distilled adapter needs, fewer steps and no guidance, stands on its card and not in its tensors; whoever loads it
without knowing draws grey mush, or waits for steps that it does not need. Cards and repositories:

    alibaba-pai/Z-Image-Fun-Lora-Distill            8, 4 or 2 steps on Base, strength 0.7 to 0.8
    DiffSynth-Studio/Z-Image-Turbo-DistillPatch     gives a fine-tuned Turbo its 8 steps back
    F16/z-image-turbo-sda                           variety between seeds of Turbo, strength about 0.6
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from zimage.settings.fields import Plain
from zimage.settings.presets import BASE, KINDS, TURBO

GENERAL = ("model", "adapter_model", "pytorch_lora_weights")  # names of files that say nothing; their folders may
FOLDERS = 3  # above such a file; in the hub's cache the third bears the repository's name
TITLES = ("modelspec.title", "ss_output_name", "title", "name")  # in a file's metadata
LONGEST = 200  # characters of a name


class Known(NamedTuple):
    """What an adapter asks for: on checkpoints of its `kind` the defaults of a request, everywhere a `scale`."""

    title: str
    kind: str
    scale: float
    asks: Mapping[str, Plain] = {}

    def told(self, name: str, kind: str) -> str:
        """The line on a file of this name, used with a checkpoint of a kind."""
        if kind != self.kind:
            return f"lora {name} is {self.title}, made for {KINDS[self.kind]}, and this checkpoint is {KINDS[kind]}"
        words = [f"{self.asks['steps']} steps", f"guidance {self.asks['guidance']:g}"] if self.asks else []
        return f"lora {name} is {self.title}: {', '.join([*words, f'scale {self.scale:g}'])}, unless set otherwise"


def _pattern(*words: str) -> re.Pattern[str]:
    return re.compile(r"[-_. ]*".join(words), re.IGNORECASE)


DISTILL = _pattern("z", "image", "fun", "lora", "distill", "([248])", "step")
PATCH = _pattern("z", "image", "turbo", "distill", "patch")
SDA = _pattern(r"(?:z[-_. ]*image[-_. ]*turbo|\bzit)", r"sda(?![a-z])")


def known_adapter(file: Path, metadata: Mapping[str, str]) -> Known | None:
    """The adapter that a file is, as far as it is one of these."""
    return next((found for name in _names(file, metadata) if (found := _of_name(name))), None)


def _of_name(name: str) -> Known | None:
    if found := DISTILL.search(name):
        return Known("Z-Image-Fun-Lora-Distill", BASE, 0.8, {"steps": int(found[1]), "guidance": 0.0})
    if PATCH.search(name):
        return Known("Z-Image-Turbo-DistillPatch", TURBO, 1.0, {"steps": 8, "guidance": 0.0})
    return Known("Z-Image-Turbo-SDA", TURBO, 0.6) if SDA.search(name) else None


def _names(file: Path, metadata: Mapping[str, str]) -> Iterator[str]:
    """What a file goes by: its name, that of its folders if it says nothing, its titles."""
    yield file.stem
    if file.stem.lower() in GENERAL:
        yield from (folder.name for folder in list(file.absolute().parents)[:FOLDERS])
    yield from (str(metadata[key])[:LONGEST] for key in TITLES if key in metadata)
