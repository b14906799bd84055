"""The parts of a model folder: which module each one is, how it is found, checked and loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from zimage.dit import ContextRefiner, ZImageDiT
from zimage.errors import CheckpointError, ConfigError, RequestError
from zimage.nn.config import read_architecture
from zimage.runtime.checkpoint import (
    Checkpoint,
    check_fit,
    late_matrices,
    load_weights,
    on_meta,
    read_json,
    stored_names,
)
from zimage.runtime.memory import keep_freed_memory
from zimage.settings import LoadSettings
from zimage.text import Qwen3, Tokenizer
from zimage.vae import AutoencoderKL, AutoencoderKLWan

SUBFOLDERS = {"text_encoder": "text_encoder", "dit": "transformer", "context_refiner": "transformer", "vae": "vae"}
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


class BlockBytes(NamedTuple):
    """What a block takes that is streamed instead of loaded."""

    loaded: int  # its weights as they are used
    source: int  # of those that are cast: as they are stored


class Component:
    """One part of a model folder, opened and checked but not loaded."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.config = read_json(folder / "config.json")
        self.checkpoint = Checkpoint(folder)
        self.skeleton = self._build()
        check_fit(self.skeleton, self.checkpoint, self._other_keys())

    def weight_bytes(self, dtype: torch.dtype, widen_late: bool = False) -> int:
        """Bytes of the loaded weights as `dtype`, or as they are stored."""
        if widen_late:
            return self.checkpoint.stored_bytes()
        return sum(weight.numel() for weight in self.skeleton.parameters()) * dtype.itemsize

    def unread_bytes(self, dtype: torch.dtype, widen_late: bool = False) -> int:
        """Of `weight_bytes`, on a CPU, what stays on disk: weights that are views of the file and no render reads."""
        read = {id(weight) for weight in self.skeleton.read_order()}
        unread = 0
        for name, weight in self.skeleton.named_parameters():
            stored = self._stored_dtype(name)
            if id(weight) not in read and stored == self._wanted_dtype(name, dtype, widen_late):
                unread += weight.numel() * stored.itemsize
        return unread

    def is_viewed(self, dtype: torch.dtype, widen_late: bool = False) -> bool:
        """Whether most of the weights, once loaded on a CPU, are views of the file."""
        names = [name for name, _ in self.skeleton.named_parameters()]
        views = sum(self._stored_dtype(n) == self._wanted_dtype(n, dtype, widen_late) for n in names)
        return 2 * views > len(names)

    def block_bytes(self, dtype: torch.dtype, widen_late: bool = False) -> list[BlockBytes]:
        """The size of each block that can be streamed, in the order of `blocks()`; 0 where a render runs none."""
        if not hasattr(self.skeleton, "blocks"):
            return []
        read = {id(weight) for weight in self.skeleton.read_order()}
        names = {id(w): name for name, w in self.skeleton.named_parameters() if id(w) in read}
        sizes = []
        for _, weights in self.skeleton.blocks():
            loaded = source = 0
            for weight in (w for w in weights if id(w) in names):
                stored = self._stored_dtype(names[id(weight)])
                wanted = self._wanted_dtype(names[id(weight)], dtype, widen_late)
                loaded += weight.numel() * wanted.itemsize if stored else 0
                source += weight.numel() * stored.itemsize if stored not in (None, wanted) else 0
            sizes.append(BlockBytes(loaded, source))
        return sizes

    def load(
        self, device: torch.device, dtype: torch.dtype, widen_late: bool = False, streamed: Sequence[int] = ()
    ) -> nn.Module:
        """A module with its weights: on the CPU views of the mapped file where the dtype agrees.

        `widen_late`: matrices stay as stored and are widened to `dtype` when used. `streamed`: blocks whose weights
        are left in the file; `runtime.offload.stream` brings them when they run.
        """
        if device.type == "cpu":
            keep_freed_memory()
        model = self._build()
        away = self._weights_of(model, streamed) if streamed else ()
        load_weights(model, self.checkpoint, dtype, device, widen_late, away)
        return model

    def _weights_of(self, model: nn.Module, blocks: Sequence[int]) -> set[str]:
        names = {id(weight): name for name, weight in model.named_parameters()}
        chosen = [weights for i, (_, weights) in enumerate(model.blocks()) if i in blocks]
        return {names[id(w)] for weights in chosen for w in weights if self._stored_dtype(names[id(w)])}

    def _stored_dtype(self, name: str) -> torch.dtype | None:
        """Of a weight that can be a view of the file; None where loading has to copy it."""
        key = self._keys.get(name)
        mapped = key is not None and not hasattr(self.skeleton, "fold") and self.checkpoint.is_mapped(key)
        return self.checkpoint.entries[key].dtype if mapped else None

    def _wanted_dtype(self, name: str, dtype: torch.dtype, widen_late: bool) -> torch.dtype:
        stored = self._stored_dtype(name) if widen_late and name in self._matrices else None
        return stored or dtype

    @cached_property
    def _keys(self) -> dict[str, str]:
        return stored_names(self.skeleton, self.checkpoint)

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


class ModelFolder:
    """A whole model: text encoder, DiT, VAE, tokenizer and schedule, checked each and against one another."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise CheckpointError(f"model {str(folder)!r} is not a folder; give one in the published layout")
        self.folder = folder
        self.tokenizer = Tokenizer.load(folder / "tokenizer")
        self.shift = read_shift(folder)
        self.components = {name: Component(name, folder / SUBFOLDERS[name]) for name in ("text_encoder", "dit", "vae")}
        self._check_agreement()

    @property
    def name(self) -> str:
        return self.folder.resolve().name

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
                raise CheckpointError(f"{self.folder}: {ours} ({wanted}) must equal {theirs} ({found})")
        if self.tokenizer.vocab_size > encoder.vocab_size:
            raise CheckpointError(
                f"{self.folder}: the tokenizer's {self.tokenizer.vocab_size} entries exceed "
                f"the text encoder's {encoder.vocab_size}"
            )


def load_component(
    folder: str | Path, name: str, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> nn.Module:
    """Load one part by itself: "text_encoder", "dit", "context_refiner" or "vae".

    `folder` is the model folder or the component's own. Raises RequestError or CheckpointError.
    """
    if name not in SUBFOLDERS:
        raise RequestError(f"there is no component {name!r}; use one of {', '.join(SUBFOLDERS)}")
    place = choose_device(device)
    return Component(name, component_folder(Path(folder), name)).load(place, choose_dtype(dtype, place))


def component_folder(folder: Path, name: str) -> Path:
    """`folder`'s subfolder of the component, or `folder` itself where it is that subfolder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give one in the published layout")
    inner = folder / SUBFOLDERS[name]
    if not inner.is_dir() and (folder / "config.json").is_file():
        return folder
    return inner


def read_shift(folder: Path) -> float | None:
    """The schedule's shift, or None where the folder carries no scheduler config."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    shift = read_architecture(SchedulerConfig, read_json(path), SchedulerConfig.IMPLEMENTED).shift
    if not shift > 0:
        raise ConfigError(f"{path}: shift = {shift} must be above 0")
    return float(shift)


class Place(NamedTuple):
    """Where a part runs, and what it computes in."""

    device: torch.device
    dtype: torch.dtype


def choose_places(settings: LoadSettings, dtype: str | torch.dtype | None) -> dict[str, Place]:
    """The place of each part: its own device, where one is named, and the dtype that suits it. Raises RequestError."""
    places = {}
    for part in ("text_encoder", "dit", "vae"):
        field = f"{part}_device" if getattr(settings, f"{part}_device") else "device"
        device = choose_device(getattr(settings, field), field)
        places[part] = Place(device, choose_dtype(dtype, device))
    return places


def choose_device(name: str, setting: str = "device") -> torch.device:
    """A device by name; "auto" takes a GPU where there is one. Raises RequestError for one this machine lacks."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"{setting} {name!r} is not known; use auto, cpu, cuda, cuda:N or mps") from None
    present = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type):
        raise RequestError(f"{setting} {name!r} is not on this machine; use auto or cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


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
