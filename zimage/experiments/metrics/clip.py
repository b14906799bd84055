"""CLIP: a text and a picture → vectors of one space, near each other where the text tells what the picture shows.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021. Module names are
those of checkpoints in the layout of `transformers`' CLIPModel, "pre_layrnorm" as well.

Shapes: L tokens of one text, P = (image_size / patch_size)² patches of one picture, C hidden width, H heads, D head
size, E width of the vectors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.nn.attention import attention
from zimage.nn.config import (
    Between,
    Colours,
    Depth,
    Epsilon,
    Heads,
    Width,
    check_divides,
    fault,
    read_architecture,
    section,
)
from zimage.nn.layers import TokenEmbedding

Wider = Annotated[int, Between(1, 1 << 22)]
Side = Annotated[int, Between(1, 4096)]  # pixels


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class StackConfig:
    """What both transformers have. Published configs leave out what is as in the first model: these defaults."""

    hidden_size: Width = 512
    intermediate_size: Wider = 2048
    num_attention_heads: Heads = 8
    num_hidden_layers: Depth = 12
    layer_norm_eps: Epsilon = 1e-5
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def __post_init__(self) -> None:
        check_divides(type(self), "num_attention_heads", "hidden_size", self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class TextConfig(StackConfig):
    vocab_size: Annotated[int, Between(3, 1 << 20)] = 49408
    max_position_embeddings: Annotated[int, Between(3, 1 << 16)] = 77


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
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids))[-1])


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.position_embedding = TokenEmbedding(config.max_position_embeddings, config.hidden_size)

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


class Encoder(nn.Module):
    def __init__(self, config: StackConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class EncoderLayer(nn.Module):
    """(L, C) → (L, C)."""

    def __init__(self, config: StackConfig, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config, causal)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    def __init__(self, config: StackConfig, causal: bool):
        super().__init__()
        C = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))
        self.head_dim, self.causal, self.attend = config.head_dim, causal, attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))[None] for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # each (1, L, H, D)
        return self.out_proj(self.attend(q, k, v, causal=self.causal)[0].flatten(1))


class Mlp(nn.Module):
    def __init__(self, config: StackConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activate = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activate(self.fc1(x)))
