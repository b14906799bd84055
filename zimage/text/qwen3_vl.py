"""Qwen3-VL as a reader of pictures: a vision tower, and Qwen3's text stack, which reads what the tower sees.

The tower's tokens can be read by this model's own text stack, or by Qwen3 itself (the Z-Image text encoder), which has
its shapes: both are a `Qwen3` that is passed a `Sight`. Module names are the checkpoint's.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from zimage.errors import quoted
from zimage.nn.config import check_implemented, fault, read_architecture, section
from zimage.text.qwen3 import Qwen3, Qwen3Config, Qwen3Decoder
from zimage.text.sight import Sight
from zimage.text.vision_input import PixelLimits, Pixels
from zimage.text.vision_tower import VisionTower, VisionTowerConfig

IMAGE_PAD = 151_655  # of every published tokenizer: <|image_pad|>
TEXT = "model.language_model."


@dataclass(frozen=True)
class Qwen3VLConfig:
    """`text` is None where there is the tower alone."""

    vision: VisionTowerConfig
    text: Qwen3Config | None
    image_token_id: int = IMAGE_PAD

    TEXT_IMPLEMENTED: ClassVar = {
        "model_type": ("qwen3_vl_text",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
    }
    ROPE_IMPLEMENTED: ClassVar = {"rope_type": ("default",), "type": ("default",), "mrope_interleaved": (True,)}

    def __post_init__(self):
        if self.text is None:
            return
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise fault(
                type(self),
                f"out_hidden_size = {self.vision.out_hidden_size} must equal the text stack's hidden_size = "
                f"{self.text.hidden_size}",
            )
        if sum(self.text.mrope_section) != self.text.head_dim // 2:
            raise fault(
                type(self),
                f"mrope_section = {list(self.text.mrope_section)} in rope_scaling must add up to head_dim / 2 = "
                f"{self.text.head_dim // 2}",
            )

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Qwen3VLConfig":
        """From the model's `config.json`, or the vision tower's own. Raises ConfigError."""
        if config.get("model_type") == "qwen3_vl_vision":
            return cls(VisionTowerConfig.read(config), None)
        check_implemented(cls, config, {"model_type": ("qwen3_vl",)})
        if not (vision := section(cls, config, "vision_config")):
            raise fault(cls, "the key 'vision_config' is missing")
        pad = config.get("image_token_id", IMAGE_PAD)
        text = section(cls, config, "text_config")
        read = cls(VisionTowerConfig.read(vision), cls._text(text) if text else None, pad)
        end = read.text.vocab_size if read.text else 1 << 24
        if not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < end:
            raise fault(cls, f"image_token_id = {quoted(pad)} should be of type int, from 0 to {end - 1:,}")
        return read

    @classmethod
    def _text(cls, config: Mapping[str, Any]) -> Qwen3Config:
        """With θ and the sections beside one another (transformers 5), or under `rope_scaling` (4)."""
        rope = section(cls, config, "rope_parameters") or section(cls, config, "rope_scaling")
        check_implemented(cls, rope, cls.ROPE_IMPLEMENTED)
        turned = {key: rope[key] for key in ("rope_theta", "mrope_section") if key in rope}
        return read_architecture(Qwen3Config, {**config, **turned}, cls.TEXT_IMPLEMENTED)

    def pixel_limits(self, path: Path) -> PixelLimits:
        """Those of `preprocessor_config.json` beside the weights in `path`, which must cut pictures as the tower does.

        Raises CheckpointError or ConfigError.
        """
        ours = {"patch_size": self.vision.patch_size, "merge_size": self.vision.spatial_merge_size}
        limits = PixelLimits.beside(path, ours)
        for key, value in ours.items():
            if (found := getattr(limits, key)) != value:
                raise fault(PixelLimits, f"{key} = {found} must be the vision tower's {value}")
        return limits


class Qwen3VL(nn.Module):
    """Pictures → a Sight; `text` is the text stack that can read it."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.config = config
        self.model = Qwen3VLModel(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Qwen3VL":
        """Build from the contents of the model's `config.json`. Raises ConfigError."""
        return cls(Qwen3VLConfig.read(config))

    @property
    def text(self) -> Qwen3 | None:
        """This model's own text stack, which shares its weights; None where there is the tower alone."""
        stack = self.model.language_model
        return None if self.config.text is None or stack is None else Qwen3(self.config.text, stack)

    def look(self, pictures: Sequence[Pixels]) -> Sight:
        """The image tokens of pictures, in order: the same bits alone and among others, since each runs by itself."""
        seen, m = [self.model.visual(pixels) for pixels in pictures], self.config.vision.spatial_merge_size
        tokens, features = zip(*seen, strict=True)
        grids = tuple((rows // m, columns // m) for _, (rows, columns) in pictures)
        deepstack = tuple(torch.cat(layer) for layer in zip(*features, strict=True))
        return Sight(torch.cat(tokens), deepstack, grids, self.config.image_token_id)

    def blocks(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """The modules that run one after another, in that order, each with the weights that its forward reads."""
        stack = self.model.language_model
        for block in (*self.model.visual.blocks, *(stack.layers if stack else ())):
            yield block, list(block.parameters())


class Qwen3VLTower(Qwen3VL):
    """The same without its text stack, whatever the config says."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Qwen3VLTower":
        """Build from the contents of the model's `config.json`. Raises ConfigError."""
        return cls(replace(Qwen3VLConfig.read(config), text=None))


class Qwen3VLModel(nn.Module):
    """The two halves, whose parameters have the prefix `model.` in published files."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.visual = VisionTower(config.vision)
        self.language_model = Qwen3Decoder(config.text) if config.text else None


def as_stored(config: Mapping[str, Any], keys: Collection[str]) -> Mapping[str, Any]:
    """The config of a file with these canonical keys: without `text_config` where the file holds the tower alone."""
    if any(key.startswith(TEXT) for key in keys):
        return config
    return {key: value for key, value in config.items() if key != "text_config"}
