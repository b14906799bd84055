"""The parts of a model: which module each one is, how it is found, checked and loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from zimage.dit import ContextRefiner, ZImageDiT
from zimage.errors import CheckpointError, ConfigError, RequestError
from zimage.formats.checkpoint import Checkpoint, components_in, read_json
from zimage.kernels.backend import check_triton
from zimage.loading.devices import PARTS, choose_device, choose_dtype
from zimage.loading.infer import ASSUMED, architecture
from zimage.loading.memory import keep_freed_memory
from zimage.loading.weights import check_fit, late_matrices, load_weights, loaded_bytes, on_meta
from zimage.nn.config import read_architecture
from zimage.settings.declared import LoadSettings
from zimage.text import Qwen3, Tokenizer
from zimage.vae import AutoencoderKL, AutoencoderKLWan

SUBFOLDERS = {"text_encoder": "text_encoder", "dit": "transformer", "context_refiner": "transformer", "vae": "vae"}
VARIANTS = {"turbo": 3.0, "base": 6.0}  # the schedule's shift, which loose files do not carry
VAE_CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLWan": AutoencoderKLWan}


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


class BlockBytes(NamedTuple):
    """What a block takes that is streamed instead of loaded."""

    loaded: int  # its weights as they are used
    source: int  # of those that are cast: as they are stored


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

    @cached_property
    def is_packed(self) -> bool:
        """Whether some of the weights are quantised and stay so."""
        return any(entry.packed for entry in self.checkpoint.entries.values())

    def unread_bytes(self, dtype: torch.dtype, widen_late: bool = False) -> int:
        """Of `weight_bytes`, on a CPU, what stays on disk: weights that are views of the file and no render reads."""
        read = {id(weight) for weight in self.skeleton.read_order()}
        unread = 0
        for name, weight in self.skeleton.named_parameters():
            if id(weight) not in read and self._is_view(name, dtype, widen_late):
                unread += self.checkpoint.entries[name].nbytes
        return unread

    def is_viewed(self, dtype: torch.dtype, widen_late: bool = False) -> bool:
        """Whether most of the weights, once loaded on a CPU, are views of the file."""
        names = [name for name, _ in self.skeleton.named_parameters()]
        return 2 * sum(self._is_view(name, dtype, widen_late) for name in names) > len(names)

    def block_bytes(self, dtype: torch.dtype, widen_late: bool = False) -> list[BlockBytes]:
        """The size of each block that can be streamed, in the order of `blocks()`; 0 where a render runs none."""
        if not hasattr(self.skeleton, "blocks"):
            return []
        read = {id(weight) for weight in self.skeleton.read_order()}
        names = {id(w): name for name, w in self.skeleton.named_parameters() if id(w) in read}
        return [
            self._block_bytes([names[id(w)] for w in weights if id(w) in names], dtype, widen_late)
            for _, weights in self.skeleton.blocks()
        ]

    def _block_bytes(self, names: list[str], dtype: torch.dtype, widen_late: bool) -> BlockBytes:
        loaded = source = 0
        for entry, name in ((self.checkpoint.entries[n], n) for n in names if self._can_be_view(n)):
            if self._is_view(name, dtype, widen_late):
                loaded += entry.nbytes
            else:
                loaded += entry.count * dtype.itemsize
                source += entry.nbytes
        return BlockBytes(loaded, source)

    def load(
        self, device: torch.device, dtype: torch.dtype, widen_late: bool = False, streamed: Sequence[int] = ()
    ) -> nn.Module:
        """A module with its weights: on the CPU views of the mapped file where the dtype agrees.

        `widen_late`: matrices stay as stored and are widened to `dtype` when used. `streamed`: blocks whose weights
        are left in the file; `streaming.stream` brings them when they run.
        """
        if device.type == "cpu":
            keep_freed_memory()
        check_triton(device)
        model = self._build()
        away = self._weights_of(model, streamed) if streamed else ()
        load_weights(model, self.checkpoint, dtype, device, widen_late, away)
        return model

    def _weights_of(self, model: nn.Module, blocks: Sequence[int]) -> set[str]:
        names = {id(weight): name for name, weight in model.named_parameters()}
        chosen = [weights for i, (_, weights) in enumerate(model.blocks()) if i in blocks]
        return {names[id(w)] for weights in chosen for w in weights if self._can_be_view(names[id(w)])}

    def _can_be_view(self, name: str) -> bool:
        """Whether a weight is a view of the file before it is cast; one that loading has to copy is not."""
        return not hasattr(self.skeleton, "fold") and self.checkpoint.entries[name].aligned

    def _is_view(self, name: str, dtype: torch.dtype, widen_late: bool) -> bool:
        """Whether a weight stays a view of the file when it is loaded on a CPU."""
        entry = self.checkpoint.entries.get(name)
        if entry is None or not self._can_be_view(name):
            return False
        return entry.packed or entry.kind == dtype or (widen_late and name in self._matrices)

    @cached_property
    def _matrices(self) -> set[str]:
        return late_matrices(self.skeleton)

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


def open_model(path: str | Path | None, settings: LoadSettings, default: Path) -> Model:
    """A folder or an all-in-one file, with the settings' parts in the place of its own; or a model of parts alone.

    `default` is opened where neither is given. Raises CheckpointError, ConfigError or RequestError.
    """
    parts = {name: Path(value).expanduser() for name in PARTS if (value := getattr(settings, name))}
    tokenizer = Path(settings.tokenizer).expanduser() if settings.tokenizer else None
    if path is None and parts:
        return Model.of_parts(parts, tokenizer, settings.variant)
    path = Path(default if path is None else path).expanduser()
    if path.is_file():
        return Model.of_parts(dict.fromkeys(components_in(path), path) | parts, tokenizer, settings.variant)
    if not (parts or tokenizer or settings.variant):
        return Model.of_folder(path)
    own = {name: path / SUBFOLDERS[name] for name in PARTS}
    return Model.of_parts(own | parts, tokenizer or path / "tokenizer", settings.variant)


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


def _module_class(name: str, config: Mapping[str, Any]) -> type:
    if name == "vae":
        kind = config.get("_class_name")
        if kind not in VAE_CLASSES:
            raise ConfigError(f"vae config: _class_name = {kind!r} is not implemented; use {' or '.join(VAE_CLASSES)}")
        return VAE_CLASSES[kind]
    return {"text_encoder": Qwen3, "dit": ZImageDiT, "context_refiner": ContextRefiner}[name]
