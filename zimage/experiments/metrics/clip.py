"""CLIP: a text and a picture → vectors of one space, near each other where the text tells what the picture shows.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021. Module names are
those of checkpoints in the layout of `transformers`' CLIPModel, "pre_layrnorm" as well.

Shapes: L tokens of one text, S × S pixels of one picture in P patches, C hidden width, E width of the vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.experiments.metrics.encoder import Encoder, Positions, Side, StackConfig, Wider, Words
from zimage.nn.config import Colours, Heads, Width, fault, read_architecture, section
from zimage.nn.layers import TokenEmbedding


@dataclass(frozen=True)
class TextConfig(StackConfig):
    vocab_size: Words = 49408
    max_position_embeddings: Positions = 77


@dataclass(frozen=True)
class VisionConfig(StackConfig):
    hidden_size: Width = 768
    intermediate_size: Wider = 3072
    num_attention_heads: Heads = 12
    image_size: Side = 224
    patch_size: Side = 32
    num_channels: Colours = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise fault(type(self), f"image_size = {self.image_size} should be at least patch_size = {self.patch_size}")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ClipConfig:
    """The two parts' are objects of their own in a published `config.json`."""

    projection_dim: Width = 512

    IMPLEMENTED: ClassVar = {"model_type": ("clip",)}


class Clip(nn.Module):
    """Vectors of length 1: of a text `text_vector`, of a picture `picture_vector`."""

    def __init__(self, config: ClipConfig, text: TextConfig, vision: VisionConfig):
        super().__init__()
        self.text_model = TextModel(text)
        self.vision_model = VisionModel(vision)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Clip":
        """From a published `config.json`. Raises ConfigError."""
        text, vision = (section(cls, config, key) for key in ("text_config", "vision_config"))
        return cls(
            read_architecture(ClipConfig, config, ClipConfig.IMPLEMENTED),
            read_architecture(TextConfig, text),
            read_architecture(VisionConfig, vision),
        )

    @torch.no_grad()
    def text_vector(self, ids: Tensor) -> Tensor:
        """Token ids (L,) with a beginning and an end → (E,)."""
        return F.normalize(self.text_projection(self.text_model(ids)), dim=-1)

    @torch.no_grad()
    def picture_vector(self, pixels: Tensor) -> Tensor:
        """A picture (3, image_size, image_size), normalised as in training → (E,)."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)


class TextModel(nn.Module):
    """Token ids (L,) → (C,): the state of the last one, the text's end, which has seen all others."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config.vocab_size, config.max_position_embeddings, config.hidden_size)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids))[-1])


class TextEmbeddings(nn.Module):
    def __init__(self, words: int, positions: int, width: int):
        super().__init__()
        self.token_embedding = TokenEmbedding(words, width)
        self.position_embedding = TokenEmbedding(positions, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: len(ids)]


class VisionModel(nn.Module):
    """Pixels (3, S, S) → (C,): the state of the class token, which stands before the patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[0])


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        C, P = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.patch_embedding = nn.Conv2d(config.num_channels, C, P, P, bias=False)
        self.position_embedding = TokenEmbedding(config.patches + 1, C)
        self.size = config.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels[None])[0].flatten(1).t()  # (P, C)
        return torch.cat([self.class_embedding[None], patches]) + self.position_embedding.weight
