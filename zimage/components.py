"""The parts of a model: which module each one is, how it is found, checked and loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from zimage.architecture import ASSUMED, architecture
from zimage.dit import ContextRefiner, ZImageDiT
from zimage.errors import CheckpointError, ConfigError, RequestError
from zimage.nn.config import read_architecture
from zimage.runtime.checkpoint import Checkpoint, check_fit, load_weights, loaded_bytes, on_meta, parts_of, read_json
from zimage.runtime.memory import keep_freed_memory
from zimage.text import Qwen3, Tokenizer
from zimage.vae import AutoencoderKL, AutoencoderKLWan

SUBFOLDERS = {"text_encoder": "text_encoder", "dit": "transformer", "context_refiner": "transformer", "vae": "vae"}
PARTS = ("text_encoder", "dit", "vae")
VARIANTS = {"turbo": 3.0, "base": 6.0}  # the schedule's shift, which loose files do not carry
VAE_CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLWan": AutoencoderKLWan}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class SchedulerConfig:
    """The only scheduler setting that a plain flow-matching Euler sampler needs."""

    shift: float

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


class Component:
    """One part of a model, opened and checked but not loaded. Raises CheckpointError or ConfigError."""

    def __init__(self, name: str, config: Mapping[str, Any], checkpoint: Checkpoint):
        self.name, self.config, self.checkpoint = name, config, checkpoint
        self.skeleton = self._build()
        check_fit(self.skeleton, self.checkpoint, self._other_keys())

    @classmethod
    def open(cls, name: str, path: Path) -> "Component":
        """From a component folder with its config, or from a loose file whose shapes tell the architecture."""
        part = "dit" if name == "context_refiner" else name
        if path.is_dir():
            return cls(name, read_json(path / "config.json"), Checkpoint.of_folder(path, part))
        checkpoint = Checkpoint.of_file(path, part)
        return cls(name, architecture(part, path, checkpoint.entries), checkpoint)

    def weight_bytes(self, dtype: torch.dtype, widen_late: bool = False) -> int:
        """Bytes of the loaded weights as `dtype`, or as they are stored."""
        if widen_late:
            return self.checkpoint.stored_bytes()
        return loaded_bytes(self.skeleton, self.checkpoint, dtype)

    def load(self, device: torch.device, dtype: torch.dtype, widen_late: bool = False) -> nn.Module:
        """A module with its weights: on the CPU views of the mapped file where the dtype agrees.

        `widen_late`: matrices stay as stored and are widened to `dtype` when used.
        """
        if device.type == "cpu":
            keep_freed_memory()
        model = self._build()
        load_weights(model, self.checkpoint, dtype, device, widen_late)
        return model

    def _build(self) -> nn.Module:
        with on_meta():
            return _module_class(self.name, self.config).from_config(self.config)

    def _other_keys(self) -> set[str]:
        """The context refiner shares its file with the rest of the DiT."""
        if self.name != "context_refiner":
            return set()
        with on_meta():
            return set(ZImageDiT.from_config(self.config).state_dict())


class Model:
    """A whole model: text encoder, DiT, VAE, tokenizer and schedule, checked each and against one another.

    `shift` is None where nothing tells it; `assumptions` are lines on what loose files do not say.
    """

    def __init__(self, origin: Path, components: dict[str, Component], tokenizer: Tokenizer, shift: float | None):
        self.origin, self.components, self.tokenizer, self.shift = origin, components, tokenizer, shift
        loose = [name for name, component in components.items() if component.checkpoint.origin.is_file()]
        self.assumptions = [ASSUMED[name] for name in loose if name in ASSUMED]
        self._check_agreement()

    @classmethod
    def of_folder(cls, folder: Path) -> "Model":
        """A folder in the published layout. Raises CheckpointError or ConfigError."""
        if not folder.is_dir():
            raise CheckpointError(f"model {str(folder)!r} is neither a folder in the published layout nor a file")
        tokenizer, shift = Tokenizer.load(folder / "tokenizer"), read_shift(folder)
        return cls(folder, {name: Component.open(name, folder / SUBFOLDERS[name]) for name in PARTS}, tokenizer, shift)

    @classmethod
    def of_parts(cls, paths: Mapping[str, Path], tokenizer: Path | None, variant: str | None) -> "Model":
        """Loose files or component folders, one for each of PARTS; the schedule's shift goes by the variant."""
        for name in PARTS:
            if name not in paths:
                raise RequestError(f"{name} is missing: give {', '.join(PARTS)} together, or a whole model")
        components = {name: Component.open(name, paths[name]) for name in PARTS}
        found = tokenizer or find_tokenizer(paths["text_encoder"])
        shift = VARIANTS[variant] if variant else _shift_beside(paths["dit"])
        return cls(paths["dit"], components, Tokenizer.load(found), shift)

    @property
    def name(self) -> str:
        resolved = self.origin.resolve()
        return resolved.stem if resolved.is_file() else resolved.name

    @cached_property
    def fingerprint(self) -> str:
        """Digits that tell this model's weights from others."""
        return "-".join(component.checkpoint.fingerprint()[:4] for component in self.components.values())

    def skeleton(self, name: str) -> Any:
        """A component's module on meta: its config and shapes without its weights."""
        return self.components[name].skeleton

    def _check_agreement(self) -> None:
        """Parts from different models may each be whole and still not fit together."""
        encoder, dit, vae = (self.skeleton(name).config for name in self.components)
        pairs = (
            ("the DiT's caption width", dit.cap_feat_dim, "the text encoder's width", encoder.hidden_size),
            ("the DiT's latent channels", dit.in_channels, "the VAE's", vae.latent_channels),
        )
        for ours, wanted, theirs, found in pairs:
            if wanted != found:
                raise CheckpointError(f"{self.origin}: {ours} ({wanted}) must equal {theirs} ({found})")
        if self.tokenizer.vocab_size > encoder.vocab_size:
            raise CheckpointError(
                f"{self.origin}: the tokenizer's {self.tokenizer.vocab_size} entries exceed "
                f"the text encoder's {encoder.vocab_size}"
            )


def open_model(
    path: Path | None, parts: Mapping[str, Path], tokenizer: Path | None = None, variant: str | None = None
) -> Model:
    """A model from a folder or an all-in-one file, with `parts` in the place of its own; or from `parts` alone."""
    if path is None:
        return Model.of_parts(parts, tokenizer, variant)
    if path.is_file():
        return Model.of_parts(dict.fromkeys(parts_of(path), path) | dict(parts), tokenizer, variant)
    if not (parts or tokenizer or variant):
        return Model.of_folder(path)
    own = {name: path / SUBFOLDERS[name] for name in PARTS}
    return Model.of_parts(own | dict(parts), tokenizer or path / "tokenizer", variant)


def load_component(
    path: str | Path, name: str, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> nn.Module:
    """Load one part by itself: "text_encoder", "dit", "context_refiner" or "vae".

    `path` is the model folder, the component's own, or a loose file. Raises RequestError or CheckpointError.
    """
    if name not in SUBFOLDERS:
        raise RequestError(f"there is no component {name!r}; use one of {', '.join(SUBFOLDERS)}")
    place = choose_device(device)
    return Component.open(name, component_folder(Path(path), name)).load(place, choose_dtype(dtype, place))


def component_folder(path: Path, name: str) -> Path:
    """`path`'s subfolder of the component, or `path` itself where it is that subfolder or a file."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a folder in the published layout nor a file")
    inner = path / SUBFOLDERS[name]
    if not inner.is_dir() and (path / "config.json").is_file():
        return path
    return inner


def find_tokenizer(text_encoder: Path) -> Path:
    """The tokenizer's folder beside a text encoder. Raises CheckpointError that says where to get one."""
    near = text_encoder if text_encoder.is_dir() else text_encoder.parent
    for folder in (near, near / "tokenizer", near.parent / "tokenizer"):
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            return folder
    raise CheckpointError(
        f"{text_encoder} comes with no tokenizer, and none is beside it; give --tokenizer DIR, the folder `tokenizer` "
        "of Tongyi-MAI/Z-Image-Turbo or of Qwen/Qwen3-4B (tokenizer.json)"
    )


def _shift_beside(dit: Path) -> float | None:
    """The shift of the model folder that a component folder lies in, if it does."""
    return read_shift(dit.parent) if dit.is_dir() else None


def read_shift(folder: Path) -> float | None:
    """The schedule's shift, or None where the folder carries no scheduler config."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    shift = read_architecture(SchedulerConfig, read_json(path), SchedulerConfig.IMPLEMENTED).shift
    if not shift > 0:
        raise ConfigError(f"{path}: shift = {shift} must be above 0")
    return float(shift)


def choose_device(name: str) -> torch.device:
    """A device by name; "auto" takes a GPU where there is one. Raises RequestError for one this machine lacks."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"device {name!r} is not known; use auto, cpu, cuda, cuda:N or mps") from None
    present = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type):
        raise RequestError(f"device {name!r} is not on this machine; use auto or cpu")
    return device


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations: bf16 where the device computes in it, unless one is named."""
    if dtype is None:
        native = device.type == "cuda" or (device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return torch.bfloat16 if native else torch.float32
    chosen = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if chosen in (torch.float16, "fp16", "float16"):
        raise RequestError("dtype fp16 overflows in this model (activations reach 344,000); use bf16 or fp32")
    if chosen not in (torch.bfloat16, torch.float32, torch.float64):
        raise RequestError(f"dtype {dtype!r} is not known; use {' or '.join(DTYPES)}")
    return chosen


def _module_class(name: str, config: Mapping[str, Any]) -> type:
    if name == "vae":
        kind = config.get("_class_name")
        if kind not in VAE_CLASSES:
            raise ConfigError(f"vae config: _class_name = {kind!r} is not implemented; use {' or '.join(VAE_CLASSES)}")
        return VAE_CLASSES[kind]
    return {"text_encoder": Qwen3, "dit": ZImageDiT, "context_refiner": ContextRefiner}[name]
