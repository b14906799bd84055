"""The components of a model in their files: found, checked alone and against one another, loaded on request."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zimage.errors import CheckpointError, RequestError, quoted
from zimage.formats.checkpoint import Checkpoint, components_in, holds_weights
from zimage.formats.hub_cache import repository
from zimage.formats.json_text import read_json
from zimage.formats.unsupported import check_config
from zimage.kernels.backend import check_triton
from zimage.loading.devices import choose_device, choose_dtype
from zimage.loading.finding import component_folder, find_model, find_tokenizer, naming, read_shift
from zimage.loading.infer import ASSUMED, architecture
from zimage.loading.memory import keep_freed_memory
from zimage.loading.plan import Workload
from zimage.loading.registry import DIT, REQUIRED, ROWS, TEXT_ENCODER, VAE, Model, Row
from zimage.loading.sizes import BlockBytes
from zimage.loading.streaming import Blocks
from zimage.loading.weights import (
    Folds,
    LeavesOut,
    check_fit,
    half_matrices,
    held_as,
    late_matrices,
    load_weights,
    loaded_sizes,
    on_meta,
    stays_packed,
)
from zimage.loading.work import CPU
from zimage.settings.loading import LoadSettings
from zimage.settings.paths import user_path
from zimage.text import Tokenizer

log = logging.getLogger("zimage")

NOTHING: Mapping[str, Any] = {}
VARIANTS = {"turbo": 3.0, "base": 6.0}  # the schedule's shift, which loose files do not carry


class Component:
    """One component of a model, opened and checked but not loaded. Raises CheckpointError or ConfigError."""

    def __init__(
        self, name: str, config: Mapping[str, object], checkpoint: Checkpoint, described_by: Path | None = None
    ):
        """`described_by` is the file that the config was read from, else the checkpoint itself."""
        self.name, self.config, self.checkpoint = name, config, checkpoint
        self._described_by = described_by or checkpoint.origin
        self.skeleton = self._build()
        if isinstance(self.skeleton, LeavesOut):
            self.checkpoint = checkpoint.without(self.skeleton.leaves_out)
        check_fit(self.skeleton, self.checkpoint, self._other_keys())

    @classmethod
    def open(cls, name: str, path: Path) -> "Component":
        """From a component folder with its config, or from a loose file whose shapes show the architecture."""
        whole = ROWS[name].inside or name
        if path.is_dir():
            described_by = path / "config.json"
            config = read_json(described_by)
            check_config(described_by, config)
            checkpoint, as_stored = Checkpoint.of_folder(path, whole), ROWS[whole].as_stored
            described = as_stored(config, checkpoint.entries) if as_stored else config
            return cls(name, described, checkpoint, described_by)
        checkpoint = Checkpoint.of_file(path, whole)
        return cls(name, architecture(whole, path, checkpoint.entries), checkpoint)

    @property
    def row(self) -> Row:
        return ROWS[self.name]

    @cached_property
    def is_packed(self) -> bool:
        """Whether some of the weights are quantised and remain so."""
        return any(entry.packed for entry in self.checkpoint.entries.values())

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        widen_late: bool = False,
        streamed: Sequence[int] = (),
        precision: str = "bf16",
    ) -> nn.Module:
        """A module with its weights, which on the CPU are views of the mapped file if the dtype agrees.

        `widen_late`: matrices stay as stored and are widened to `dtype` when used. `streamed`: blocks whose weights
        stay on the host; `streaming.stream` brings them when they run. `precision`: "int8" or "fp8" quantises each
        matrix of a DiT's products as soon as it is loaded.
        """
        if device.type == "cpu":
            keep_freed_memory()
        check_triton(device)
        model = self._build()
        away = self._weights_of(model, streamed) if streamed else set[str]()
        late = self.late_weights(model) if device.type == "cuda" and not widen_late else set[str]()
        load_weights(model, self.checkpoint, dtype, device, widen_late, away, late, precision)
        return model

    # ------------------------------------------------------------------ what `sizes` asks

    def reads(self) -> Iterator[nn.Parameter]:
        """The weights that a render reads, in its order."""
        return self.row.reads(self.skeleton)

    def late_weights(self, model: nn.Module) -> set[str]:
        """The weights of a model of blocks that no render reads: on a GPU they come when something else reads them."""
        read = {id(weight) for weight in self.row.reads(model)}
        unread = {name: w for name, w in model.named_parameters() if id(w) not in read and w.ndim == 2}
        late = isinstance(model, Blocks) and not self.is_packed
        return {name for name in unread if late and self.can_be_view(name)}

    def work_bytes(self, work: Workload, dtype: torch.dtype, device: torch.device = CPU) -> int:
        """What its stage needs besides weights."""
        return self.row.work(self.skeleton.config, work, dtype, device)

    def stored_bytes(self) -> int:
        return self.checkpoint.stored_bytes()

    def weight_sizes(self, dtype: torch.dtype, widen_late: bool = False, device: torch.device = CPU) -> dict[str, int]:
        """Bytes of each loaded weight as `dtype`, or as they are stored."""
        if widen_late:
            entries = self.checkpoint.entries
            packed = {key for key, entry in entries.items() if entry.packed and not stays_packed(entry, device.type)}
            return {key: 2 * entry.count if key in packed else entry.nbytes for key, entry in entries.items()}
        return loaded_sizes(self.skeleton, self.checkpoint, dtype, device.type)

    def can_be_view(self, name: str) -> bool:
        """Whether a weight is a view of the file before it is cast, and need not be copied."""
        return not isinstance(self.skeleton, Folds) and self.checkpoint.entries[name].aligned

    def view_bytes(self, name: str, dtype: torch.dtype, widen_late: bool) -> int:
        """Bytes of a weight that remains a view of the file when loaded on a CPU; 0 for one that does not."""
        entry = self.checkpoint.entries.get(name)
        if entry is None or not self.can_be_view(name):
            return 0
        held = held_as(name, dtype, self._half)
        stays = entry.packed or entry.kind == held or (widen_late and name in self._matrices)
        return entry.nbytes if stays else 0

    def block_bytes(self, names: list[str], dtype: torch.dtype, widen_late: bool) -> BlockBytes:
        """The bytes of those weights of a block that can be streamed."""
        loaded = stored = 0
        for entry, name in ((self.checkpoint.entries[n], n) for n in names if self.can_be_view(n)):
            viewed = self.view_bytes(name, dtype, widen_late)
            loaded += viewed or entry.count * held_as(name, dtype, self._half).itemsize
            stored += 0 if viewed else entry.nbytes
        return BlockBytes(loaded, stored, loaded)

    def _weights_of(self, model: nn.Module, blocks: Sequence[int]) -> set[str]:
        names = {id(weight): name for name, weight in model.named_parameters()}
        found = model.blocks() if isinstance(model, Blocks) else ()
        chosen = [weights for i, (_, weights) in enumerate(found) if i in blocks]
        return {names[id(w)] for weights in chosen for w in weights if self.can_be_view(names[id(w)])}

    @cached_property
    def _matrices(self) -> set[str]:
        return late_matrices(self.skeleton)

    @cached_property
    def _half(self) -> set[str]:
        return half_matrices(self.skeleton)

    def _build(self, name: str = "") -> Model:
        with on_meta(), naming(self._described_by):
            return ROWS[name or self.name].build(self.config)

    def _other_keys(self) -> set[str]:
        """The keys of the component in whose file this one lies."""
        return set(self._build(self.row.inside).state_dict()) if self.row.inside else set()


class ModelFiles:
    """A whole model in its files: components, tokenizer and schedule, checked alone and against one another.

    `shift` is None if no file states it; `assumptions` are lines about what loose files leave open.
    """

    def __init__(
        self,
        origin: Path,
        components: dict[str, Component],
        tokenizer: Tokenizer,
        shift: float | None,
        assumptions: Sequence[str] = (),
        absent: Mapping[str, Any] = NOTHING,
    ):
        """`absent`: the architecture of each component that is on another machine, or None where no config says it."""
        self.origin, self.components, self.tokenizer, self.shift = origin, components, tokenizer, shift
        self._absent = absent
        loose = [name for name, component in components.items() if component.checkpoint.origin.is_file()]
        self.assumptions = [*(ASSUMED[name] for name in loose if name in ASSUMED), *assumptions]
        self._check_agreement()

    @classmethod
    def of_folder(cls, folder: Path, elsewhere: Collection[str] = ()) -> "ModelFiles":
        """A folder in the published layout; the weights of components `elsewhere` need not be in it.

        Raises CheckpointError or ConfigError.
        """
        if (folder / "config.json").is_file() and not (folder / ROWS[DIT].folder).is_dir():
            text = f"{folder} is the folder of one component; pass it as dit, text_encoder or vae"
            raise CheckpointError(text, fields=("model",))
        if not any((folder / ROWS[name].folder).is_dir() for name in REQUIRED):
            names = ", ".join(ROWS[name].folder for name in REQUIRED)
            raise CheckpointError(f"{folder} is not a model folder: it holds none of {names}", fields=("model",))
        tokenizer, shift = Tokenizer.load(folder / "tokenizer"), read_shift(folder)
        components, absent = _opened({name: folder / ROWS[name].folder for name in REQUIRED}, elsewhere)
        return cls(folder, components, tokenizer, shift, absent=absent)

    @classmethod
    def of_components(
        cls,
        paths: Mapping[str, Path],
        tokenizer: Path | None,
        variant: str | None,
        folder: Path | None = None,
        elsewhere: Collection[str] = (),
    ) -> "ModelFiles":
        """Loose files or component folders, one for each that is required and not `elsewhere`.

        What a model `folder` holds counts for all that they do not replace: tokenizer and schedule, too.
        """
        needed = [name for name in REQUIRED if name not in elsewhere]
        for name in needed:
            if name not in paths:
                text = f"{name} is missing: pass {', '.join(needed)} together, or a whole model"
                raise RequestError(text, fields=(name,))
        components, absent = _opened(paths, elsewhere)
        origin = paths[DIT if DIT in components else TEXT_ENCODER]
        found = Tokenizer.load(tokenizer or find_tokenizer(paths.get(TEXT_ENCODER, origin), folder))
        shift, lines = _schedule(origin, variant, folder) if DIT in components else (None, [])
        return cls(origin, components, found, shift, lines, absent)

    @property
    def name(self) -> str:
        """What pictures call the model: OWNER/NAME of one in the hub's cache, whose folders and files are hashes."""
        resolved = self.origin.resolve()
        if resolved.is_file():
            return (self.origin if resolved.parent.name == "blobs" else resolved).stem
        return repository(self.origin) or repository(resolved) or resolved.name

    @cached_property
    def fingerprint(self) -> str:
        """Digits that distinguish this model's weights from others."""
        drawing = (self.components[name] for name in REQUIRED if name in self.components)
        return "-".join(component.checkpoint.fingerprint()[:4] for component in drawing)

    def skeleton(self, name: str) -> Any:
        """A component's module on meta: its config and shapes without its weights."""
        return self.components[name].skeleton

    def config(self, name: str) -> Any:
        """A component's architecture; None of one on another machine that no config here describes."""
        return self.components[name].skeleton.config if name in self.components else self._absent.get(name)

    def _check_agreement(self) -> None:
        """Components of different models may each be whole and still not fit together."""
        encoder, dit, vae = (self.config(name) for name in (TEXT_ENCODER, DIT, VAE))
        pairs = (
            ("the DiT's caption width", dit, "cap_feat_dim", "the text encoder's width", encoder, "hidden_size"),
            ("the DiT's latent channels", dit, "in_channels", "the VAE's", vae, "latent_channels"),
        )
        for ours, one, its, theirs, other, others in pairs:
            if one and other and (wanted := getattr(one, its)) != (found := getattr(other, others)):
                raise CheckpointError(f"{self.origin}: {ours} ({wanted}) must equal {theirs} ({found})")
        if encoder is None:
            return
        if self.tokenizer.vocab_size > encoder.vocab_size:
            raise CheckpointError(
                f"{self.origin}: the tokenizer's {self.tokenizer.vocab_size} entries exceed "
                f"the text encoder's {encoder.vocab_size}"
            )
        self.tokenizer.limit(encoder.vocab_size)  # a vocabulary may have gaps


def open_model(
    path: str | Path | None, settings: LoadSettings, default: Path, elsewhere: Collection[str] = ()
) -> ModelFiles:
    """Open a folder or an all-in-one file, with the settings' components in place of its own, or these alone.

    `default` is opened if neither is given. The weights of components `elsewhere` need not be here. Raises
    CheckpointError, ConfigError or RequestError.
    """
    named = {name: user_path(value, name) for name in REQUIRED if (value := getattr(settings, name))}
    tokenizer = user_path(settings.tokenizer, "tokenizer") if settings.tokenizer else None
    if path is None and named:
        return ModelFiles.of_components(named, tokenizer, settings.variant, elsewhere=elsewhere)
    path = find_model(user_path(default if path is None else path, "model"))
    if path.is_file():
        inside = dict.fromkeys(components_in(path), path)
        return ModelFiles.of_components(inside | named, tokenizer, settings.variant, elsewhere=elsewhere)
    if not (named or tokenizer or settings.variant):
        return ModelFiles.of_folder(path, elsewhere)
    own = {name: path / ROWS[name].folder for name in REQUIRED}
    return ModelFiles.of_components(own | named, tokenizer, settings.variant, path, elsewhere)


def _opened(paths: Mapping[str, Path], elsewhere: Collection[str]) -> tuple[dict[str, Component], dict[str, Any]]:
    """The components, and the architectures of those `elsewhere` whose weights are not at these paths."""
    absent = [name for name in elsewhere if name not in paths or not holds_weights(paths[name])]
    components = {name: Component.open(name, paths[name]) for name in REQUIRED if name not in absent}
    return components, {name: _described(name, paths[name]) for name in absent if name in paths}


def _described(name: str, folder: Path) -> Any:
    """The architecture that a folder without weights describes, if it describes one."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    check_config(path, config)
    with on_meta(), naming(path):
        return ROWS[name].build(config).config


def _schedule(dit: Path, variant: str | None, folder: Path | None) -> tuple[float | None, list[str]]:
    """The shift of the variant, else of the model in which the DiT's folder lies, else of the model `folder`.

    Where another model's counts than the DiT's own, or than the one that was asked for, a line says so.
    """
    if variant:
        return VARIANTS[variant], []
    own = read_shift(dit.parent) if dit.is_dir() else None
    if own is not None or folder is None:
        replaced = folder is not None and dit.parent.absolute() != folder.absolute()
        return own, [
            f"DiT of another model: the schedule of {dit.parent} (shift {own:g}) is assumed"
        ] if replaced else []
    shift, kind = read_shift(folder), "another folder" if dit.is_dir() else "a loose file"
    line = f"DiT from {kind}: the schedule of {folder} (shift {shift:g}) is assumed" if shift else ""
    return shift, [line] if line else []


def load_component(
    path: str | Path, name: str, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> nn.Module:
    """Load one component by itself: "text_encoder", "dit", "context_refiner", "control" (a ControlNet), "vae",
    "vision" (Qwen3-VL) or "vision_tower" (the same without its text stack).

    `path` is the model folder, the component's own, or a loose file. Raises RequestError or CheckpointError.
    """
    if name not in ROWS:
        raise RequestError(f"component {quoted(name)} does not exist; use one of {', '.join(ROWS)}")
    place = choose_device(device)
    return Component.open(name, component_folder(Path(path), name)).load(
        place, choose_dtype(dtype, place, ROWS[name].in_half)
    )
