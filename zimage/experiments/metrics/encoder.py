"""The transformer that CLIP and SigLIP are made of, once for texts and once for pictures.

Shapes: L tokens of one text or patches of one picture, C hidden width, H heads, D head size. Module names are those of
checkpoints in the layout of `transformers`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.nn.attention import attention
from zimage.nn.config import Between, Depth, Epsilon, Heads, Width, check_divides

Wider = Annotated[int, Between(1, 1 << 22)]
Side = Annotated[int, Between(1, 4096)]  # pixels
Words = Annotated[int, Between(3, 1 << 20)]
Positions = Annotated[int, Between(3, 1 << 16)]
Activation = Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class StackConfig:
    """What both transformers have. Published configs leave out what is as in the first model: these defaults."""

    hidden_size: Width = 512
    intermediate_size: Wider = 2048
    num_attention_heads: Heads = 8
    num_hidden_layers: Depth = 12
    layer_norm_eps: Epsilon = 1e-5
    hidden_act: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        check_divides(type(self), "num_attention_heads", "hidden_size", self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


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
