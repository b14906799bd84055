"""SigLIP: what CLIP is, trained pair by pair; a text's last token and a pooled picture stand for the whole.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023. Module names are those of checkpoints in the
layout of `transformers`' SiglipModel.

Shapes: L tokens of one text, S × S pixels of one picture in P patches, C hidden width, the width of the vectors too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.experiments.metrics.clip import TextEmbeddings
from zimage.experiments.metrics.clip import VisionConfig as ClipVisionConfig
from zimage.experiments.metrics.encoder import Activation, Encoder, Mlp, Positions, Side, StackConfig, Wider, Words
from zimage.nn.attention import attention
from zimage.nn.config import Epsilon, Heads, Width, check_implemented, read_architecture, section
from zimage.nn.layers import TokenEmbedding


@dataclass(frozen=True)
class TextConfig(StackConfig):
    hidden_size: Width = 768
    intermediate_size: Wider = 3072
    num_attention_heads: Heads = 12
    layer_norm_eps: Epsilon = 1e-6
    hidden_act: Activation = "gelu_pytorch_tanh"
    vocab_size: Words = 32000
    max_position_embeddings: Positions = 64


@dataclass(frozen=True)
class VisionConfig(ClipVisionConfig):
    layer_norm_eps: Epsilon = 1e-6
    hidden_act: Activation = "gelu_pytorch_tanh"
    patch_size: Side = 16

    IMPLEMENTED: ClassVar = {"vision_use_head": (True,)}


class Siglip(nn.Module):
    """Vectors of length 1: of a text `text_vector`, of a picture `picture_vector`."""

    IMPLEMENTED: ClassVar = {"model_type": ("siglip",)}

    def __init__(self, text: TextConfig, vision: VisionConfig):
        super().__init__()
        self.text_model = TextModel(text, vision.hidden_size)
        self.vision_model = VisionModel(vision)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Siglip":
        """From a published `config.json`. Raises ConfigError."""
        check_implemented(cls, config, cls.IMPLEMENTED)
        text, vision = (section(cls, config, key) for key in ("text_config", "vision_config"))
        return cls(
            read_architecture(TextConfig, text), read_architecture(VisionConfig, vision, VisionConfig.IMPLEMENTED)
        )

    @torch.no_grad()
    def text_vector(self, ids: Tensor) -> Tensor:
        """Token ids, padded to all positions, which the model attends to as well: (L,) → (C,)."""
        return F.normalize(self.text_model(ids), dim=-1)

    @torch.no_grad()
    def picture_vector(self, pixels: Tensor) -> Tensor:
        """A picture (3, S, S), normalised as in training → (C,)."""
        return F.normalize(self.vision_model(pixels), dim=-1)


class TextModel(nn.Module):
    """Token ids (L,) → (C,): the state of the last one."""

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        self.embeddings = TextEmbeddings(config.vocab_size, config.max_position_embeddings, config.hidden_size)
        self.encoder = Encoder(config, causal=False)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.final_layer_norm(self.encoder(self.embeddings(ids))[-1]))


class VisionModel(nn.Module):
    """Pixels (3, S, S) → (C,)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = Pooling(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.post_layernorm(self.encoder(self.embeddings(pixels))))


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = TokenEmbedding(config.patches, config.hidden_size)
        self.size = config.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patch_embedding(pixels[None])[0].flatten(1).t() + self.position_embedding.weight  # (P, C)


class Pooling(nn.Module):
    """A learned query attends to all patches: (P, C) → (C,)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = PoolingAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.attention(self.probe[0], x)[0]
        return pooled + self.mlp(self.layernorm(pooled))


class PoolingAttention(nn.Module):
    """PyTorch's MultiheadAttention, whose three input projections lie in one matrix."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C = config.hidden_size
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(3 * C, C)), nn.Parameter(torch.empty(3 * C))
        self.out_proj = nn.Linear(C, C)
        self.head_dim, self.attend = config.head_dim, attention

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """Of queries (1, C) over (P, C): (1, C)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(of, weight, bias).unflatten(-1, (-1, self.head_dim))[None]  # (1, L, H, D)
            for of, weight, bias in zip((query, x, x), weights, biases, strict=True)
        )
        return self.out_proj(self.attend(q, k, v)[0].flatten(1))
