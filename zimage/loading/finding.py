"""Where the pieces of a model lie: its folder or file, a component's folder, the tokenizer, the schedule."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from zimage.errors import CheckpointError, ConfigError
from zimage.formats.gguf import has_tokenizer
from zimage.formats.hub_cache import is_repository, snapshot
from zimage.formats.json_text import read_json
from zimage.loading.registry import ROWS
from zimage.nn.config import Between, read_architecture


@dataclass(frozen=True)
class SchedulerConfig:
    """The only scheduler setting that a plain flow-matching Euler sampler needs."""

    shift: Annotated[float, Between(1e-3, 100)]

    IMPLEMENTED: ClassVar = {
        "_class_name": ("FlowMatchEulerDiscreteScheduler",),
        "use_dynamic_shifting": (False,),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "invert_sigmas": (False,),
        "stochastic_sampling": (False,),
        "shift_terminal": (None,),
    }


def find_model(path: Path) -> Path:
    """A model's folder or file; of one in the hub's cache, its newest snapshot. Raises CheckpointError for neither."""
    path = snapshot(path)
    if os.path.isdir(path) or os.path.isfile(path):  # unlike Path's, these do not raise for names that are too long
        return path
    text = f"model {str(path)!r} is neither a folder in the published layout nor a file"
    if is_repository(str(path)):
        text += f"; `zimage weights fetch {path}` downloads it"
    raise CheckpointError(text, fields=("model",))


def component_folder(path: Path, name: str) -> Path:
    """The component's subfolder of a model's folder, or `path` itself if it is that subfolder or a file."""
    path = find_model(path)
    inner = path / ROWS[name].folder
    if path.is_file() or (not inner.is_dir() and (path / "config.json").is_file()):
        return path
    return inner


def find_tokenizer(text_encoder: Path, folder: Path | None = None) -> Path:
    """As `tokenizer_near`. Raises CheckpointError that says where to get one."""
    found = tokenizer_near(text_encoder, folder)
    if found is None:
        raise CheckpointError(
            f"{text_encoder} has no tokenizer beside it; use --tokenizer DIR or FILE with the folder `tokenizer` of "
            "Tongyi-MAI/Z-Image-Turbo or the tokenizer.json of Qwen/Qwen3-4B, or --model with a whole model"
        )
    return found


def tokenizer_near(text_encoder: Path, folder: Path | None = None) -> Path | None:
    """The tokenizer of the model `folder`, else beside a text encoder, else the one in its GGUF file, else None."""
    near = text_encoder if text_encoder.is_dir() else text_encoder.parent
    places = (near, near / "tokenizer", near.parent / "tokenizer")
    for place in places if folder is None else (folder / "tokenizer", *places):
        if (place / "tokenizer.json").is_file() or (place / "vocab.json").is_file():
            return place
    return text_encoder if text_encoder.is_file() and has_tokenizer(text_encoder) else None


def read_shift(folder: Path) -> float | None:
    """The schedule's shift, or None where the folder carries no scheduler config."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    with naming(path):
        return float(read_architecture(SchedulerConfig, read_json(path), SchedulerConfig.IMPLEMENTED).shift)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors on a config name the file that it was read from."""
    try:
        yield
    except ConfigError as error:
        raise error.with_text(f"{path}: {error}") from None
