"""One row per component: what it is called, where it lies, which module it is, and which transformations apply to it.

This is the only place that lists them. To add one, add a row: it is then opened, checked, planned, loaded and
released like the others. An `optional` one is loaded by itself (`load_component`), or for a stage of its own where a
request needs it, as the vision model is.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zimage.dit import ContextRefiner, ControlNet, ZImageDiT
from zimage.errors import ConfigError, quoted
from zimage.loading.plan import Workload
from zimage.loading.work import (
    control_bytes,
    dit_bytes,
    dit_reads,
    text_encoder_bytes,
    text_encoder_reads,
    vae_bytes,
    vae_reads,
    vision_bytes,
    vision_reads,
)
from zimage.text import Qwen3, Qwen3VL
from zimage.text.qwen3_vl import Qwen3VLTower, as_stored
from zimage.vae import AutoencoderKL, AutoencoderKLWan

TEXT_ENCODER, DIT, VAE, CONTEXT_REFINER = "text_encoder", "dit", "vae", "context_refiner"
VISION, VISION_TOWER = "vision", "vision_tower"  # with the text stack that its file may hold, and without
CONTROL = "control"
Model = Qwen3 | Qwen3VL | ZImageDiT | ContextRefiner | ControlNet | AutoencoderKL | AutoencoderKLWan


@dataclass(frozen=True)
class Row:
    """A component. The keys of `classes` are a config's `_class_name`, or "" where there is only one class."""

    name: str  # in settings, files and messages for programs
    title: str  # in sentences
    folder: str  # in the published layout
    classes: Mapping[str, type[Model]]
    reads: Callable[[nn.Module], Iterator[nn.Parameter]]  # what a render reads, in its order
    work: Callable[
        [Any, Workload, torch.dtype, torch.device], int
    ]  # config … → bytes that its stage needs besides weights
    optional: bool = False
    inside: str = ""  # the component whose file it shares: it is loaded by itself only
    transformed: bool = False  # whether precision, LoRAs and compilation apply to it
    # The config of a file with certain keys, where files may hold less than the config says.
    as_stored: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, Any]] | None = None
    in_half: bool = False  # whether it computes in fp16; where that is asked for, the others compute in fp32
    placed_with: str = ""  # the component on whose device it is put, if it has no setting of its own

    def build(self, config: Mapping[str, object]) -> Model:
        """A module of the class and the sizes that a config asks for. Raises ConfigError."""
        kind = "" if "" in self.classes else config.get("_class_name")
        if not isinstance(kind, str) or kind not in self.classes:
            known = " or ".join(self.classes)
            raise ConfigError(
                f"{self.name} config: _class_name = {quoted(kind)} is not implemented; it must be {known}"
            )
        return self.classes[kind].from_config(config)


VAES: Mapping[str, type[Model]] = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLWan": AutoencoderKLWan}
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(TEXT_ENCODER, "text encoder", "text_encoder", {"": Qwen3}, text_encoder_reads, text_encoder_bytes),
        Row(DIT, "DiT", "transformer", {"": ZImageDiT}, dit_reads, dit_bytes, transformed=True, in_half=True),
        Row(VAE, "VAE", "vae", VAES, vae_reads, vae_bytes),
        Row(
            CONTEXT_REFINER,
            "context refiner",
            "transformer",
            {"": ContextRefiner},
            nn.Module.parameters,
            dit_bytes,
            optional=True,
            inside=DIT,
            in_half=True,
        ),
        Row(
            VISION,
            "vision model",
            "vision",
            {"": Qwen3VL},
            vision_reads,
            vision_bytes,
            optional=True,
            as_stored=as_stored,
            placed_with=TEXT_ENCODER,
        ),
        Row(
            VISION_TOWER,
            "vision tower",
            "vision",
            {"": Qwen3VLTower},
            vision_reads,
            vision_bytes,
            optional=True,
            inside=VISION,
            placed_with=TEXT_ENCODER,
        ),
        Row(CONTROL, "ControlNet", "controlnet", {"": ControlNet}, dit_reads, control_bytes, optional=True),
    )
}
REQUIRED = tuple(row.name for row in ROWS.values() if not row.optional)  # in the order in which a render needs them
