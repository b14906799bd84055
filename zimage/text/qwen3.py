"""Qwen3, the text encoder: a causal transformer with grouped queries, normalised q and k, and SwiGLU.

Shapes: B batch, L tokens, H query heads, G key/value heads, D head size. Module names are the checkpoint's.
Source: Qwen3 Technical Report (2025) and the published configuration.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zimage.errors import ConfigError, RequestError
from zimage.kernels.swiglu import swiglu
from zimage.nn.attention import attention
from zimage.nn.config import read_architecture
from zimage.nn.layers import NarrowLinear, RMSNorm, TokenEmbedding

PREFIX = "model."


@dataclass(frozen=True)
class Qwen3Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float

    IMPLEMENTED: ClassVar = {
        "model_type": ("qwen3",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "use_sliding_window": (False,),
        "rope_scaling": (None,),
    }

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Qwen3Config":
        """From `text_encoder/config.json`, with θ at the top (transformers 4) or in `rope_parameters` (5)."""
        rope = config.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(
                f"Qwen3 config: rope_type = {rope['rope_type']!r} is not implemented; it must be 'default'"
            )
        other = set(config.get("layer_types") or ()) - {"full_attention"}
        if other:
            raise ConfigError(f"Qwen3 config: layer_types holds {sorted(other)}; only 'full_attention' is implemented")
        if "rope_theta" in rope:
            config = {**config, "rope_theta": rope["rope_theta"]}
        return read_architecture(cls, config, cls.IMPLEMENTED)


class Qwen3(nn.Module):
    """Token ids → hidden states: 0 is the token embeddings, n the last layer after the final norm."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.model = Qwen3Decoder(config)
        self.register_load_state_dict_pre_hook(_add_prefix)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Qwen3":
        """Build from the contents of `text_encoder/config.json`; raises ConfigError."""
        return cls(Qwen3Config.read(config))

    def read_order(self) -> Iterator[nn.Parameter]:
        """Weights in the order in which encoding reads them: not the last layer, and of the embeddings only rows."""
        for layer in self.model.layers[:-1]:
            yield from layer.parameters()

    def blocks(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """The modules that run one after another, in that order, each with the weights that its forward reads."""
        for layer in self.model.layers:
            yield layer, list(layer.parameters())

    def activation_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """About the peak of one layer: the feed-forward's hidden maps, q, k and v in fp32 and a few of its width."""
        config = self.config
        heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        return tokens * ((2 * config.intermediate_size + 6 * config.hidden_size) * dtype.itemsize + 4 * heads)

    def forward(self, ids: Tensor, layer: int = -2) -> Tensor:
        """Hidden state `layer` (B, L, hidden) of ids (B, L); layers above it are not run.

        `layer` counts from the end, as in the reference's list of n + 1 states: −1 is after the last layer and the
        final norm, −2 the output of the last layer but one, without a norm. Right padding never changes real tokens.
        """
        states = self.config.num_hidden_layers + 1
        if not -states <= layer < states:
            raise RequestError(f"hidden layer {layer} does not exist; use −{states} to −1")
        index = layer % states
        for i, state in enumerate(self.hidden_states(ids)):
            if i == index:
                return state
        raise AssertionError("unreachable: the index was checked above")

    def blend(self, ids: Tensor, layers: Mapping[int, float]) -> Tensor:
        """Weighted mean (B, L, hidden) of several hidden states; the weights are divided by their sum.

        Layers above the highest one needed are not run, and a single layer is given as it is.
        """
        if len(layers) == 1:
            return self(ids, next(iter(layers)))
        states = self.config.num_hidden_layers + 1
        weights = {layer % states: weight / sum(layers.values()) for layer, weight in layers.items()}
        total = 0.0
        for i, state in enumerate(self.hidden_states(ids)):
            if i in weights:
                total = total + weights[i] * (state if state.dtype == torch.float64 else state.float())
            if i == max(weights):
                return total.to(state.dtype)
        raise RequestError(f"hidden layers {sorted(layers)} do not all exist; use −{states} to −1")

    def hidden_states(self, ids: Tensor) -> Iterator[Tensor]:
        """Yield the n + 1 hidden states (B, L, hidden), each computed when asked for."""
        model = self.model
        x = model.embed_tokens(ids).to(model.norm.weight.dtype)
        yield x
        turn = half_rotation(ids.shape[1], self.config, x.device)
        for i, layer in enumerate(model.layers):
            x = layer(x, turn)
            yield model.norm(x) if i == len(model.layers) - 1 else x


class Qwen3Decoder(nn.Module):
    """The stack whose parameters carry the prefix `model.` in published files."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3Layer(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Attention(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        D = config.head_dim
        queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
        self.head_dim = D
        self.q_proj = NarrowLinear(config.hidden_size, queries, bias=False)
        self.k_proj = NarrowLinear(config.hidden_size, keys, bias=False)
        self.v_proj = NarrowLinear(config.hidden_size, keys, bias=False)
        self.o_proj = NarrowLinear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps)
        self.k_norm = RMSNorm(D, config.rms_norm_eps)
        self.attend = attention

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        heads = (-1, self.head_dim)
        q = rotate_halves(self.q_norm(self.q_proj(x).unflatten(-1, heads)), *turn)  # (B, L, H, D)
        k = rotate_halves(self.k_norm(self.k_proj(x).unflatten(-1, heads)), *turn)  # (B, L, G, D)
        v = self.v_proj(x).unflatten(-1, heads)
        return self.o_proj(self.attend(q, k, v, causal=True).flatten(2))


class Qwen3MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = NarrowLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = NarrowLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = NarrowLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def half_rotation(length: int, config: Qwen3Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (L, 1, D/2), fp32 as in the reference: pair k turns by position · θ^(−2k/D)."""
    D = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None, None] * frequencies
    return angle.cos(), angle.sin()


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on pairs (xₖ, xₖ₊D/₂) of x (B, L, H, D), in fp32, cast back."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _add_prefix(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """Accept files whose keys lack `model.` (saved from the bare decoder)."""
    for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(prefix + PREFIX)]:
        state_dict[prefix + PREFIX + key.removeprefix(prefix)] = state_dict.pop(key)
