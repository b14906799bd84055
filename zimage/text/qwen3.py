"""Qwen3, the text encoder: a causal transformer with grouped queries, normalised q and k, and SwiGLU.

Its hidden states encode prompts; the whole stack, with a head tied to the embeddings, writes text.

Shapes: B batch, L tokens, H query heads, G key/value heads, D head size. Module names are the checkpoint's.
Source: Qwen3 Technical Report (2025) and the published configuration.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zimage.errors import RequestError, quoted
from zimage.kernels.qk_norm_rope import qk_norm_rope_halves
from zimage.kernels.rms_norm import add_rms_norm
from zimage.kernels.swiglu import swiglu
from zimage.nn.attention import attention
from zimage.nn.config import (
    Between,
    Depth,
    Epsilon,
    Heads,
    HeadSize,
    Positive,
    Width,
    check_divides,
    check_implemented,
    fault,
    read_architecture,
    section,
)
from zimage.nn.layers import NarrowLinear, RMSNorm, TokenEmbedding
from zimage.text.sight import Sight, axes, positions

PREFIX = "model."
Pairs = Annotated[int, Between(0, 2048)]


@dataclass(frozen=True)
class Qwen3Config:
    vocab_size: Annotated[int, Between(1, 1 << 24)]
    hidden_size: Width
    intermediate_size: Annotated[int, Between(1, 1 << 22)]
    num_hidden_layers: Depth
    num_attention_heads: Heads
    num_key_value_heads: Heads
    head_dim: HeadSize
    rms_norm_eps: Epsilon
    rope_theta: Positive
    mrope_section: tuple[Pairs, Pairs, Pairs] = (24, 20, 20)  # of a head that turn by time, height and width

    IMPLEMENTED: ClassVar = {
        "model_type": ("qwen3",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "use_sliding_window": (False,),
        "rope_scaling": (None,),
    }

    def __post_init__(self):
        check_divides(type(self), "num_key_value_heads", "num_attention_heads", self)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Qwen3Config":
        """From `text_encoder/config.json`, with θ at the top level (transformers 4) or in `rope_parameters` (5)."""
        rope = section(cls, config, "rope_parameters")
        check_implemented(cls, rope, {"rope_type": ("default",)})
        kinds = config.get("layer_types") or []
        if not isinstance(kinds, list | tuple) or any(kind != "full_attention" for kind in kinds):
            raise fault(cls, f"layer_types = {quoted(kinds)} should be a list; only 'full_attention' is implemented")
        if "rope_theta" in rope:
            config = {**config, "rope_theta": rope["rope_theta"]}
        return read_architecture(cls, config, cls.IMPLEMENTED)


class Qwen3(nn.Module):
    """Token ids → hidden states: 0 is the token embeddings, n the output of the last layer after the final norm."""

    def __init__(self, config: Qwen3Config, model: "Qwen3Decoder | None" = None):
        """With the stack `model`, where another module has it, else one of its own."""
        super().__init__()
        self.config = config
        self.model = model or Qwen3Decoder(config)
        self.register_load_state_dict_pre_hook(_add_prefix)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Qwen3":
        """Build from the contents of `text_encoder/config.json`. Raises ConfigError."""
        return cls(Qwen3Config.read(config))

    def blocks(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """The modules that run one after another, in that order, each with the weights that its forward reads."""
        for layer in self.model.layers:
            yield layer, list(layer.parameters())

    def forward(
        self,
        ids: Tensor,
        layer: int = -2,
        cache: "KVCache | PlacedCache | None" = None,
        sight: Sight | None = None,
    ) -> Tensor:
        """Hidden state `layer` (B, L, hidden) of ids (B, L); the layers above it do not run.

        `layer` counts from the end, as in the reference's list of n + 1 states: −1 is the last layer's output after the
        final norm, −2 the second-last layer's output, without a norm. Right padding never changes real tokens.
        With a `cache`, the ids follow the tokens that it holds, and are added to them. With a `sight`, ids (1, L) hold
        its pad token once for each of its image tokens.
        """
        states = self.config.num_hidden_layers + 1
        if not -states <= layer < states:
            raise RequestError(f"hidden layer {layer} does not exist; use −{states} to −1")
        index = layer % states
        for i, state in enumerate(self.hidden_states(ids, cache, sight)):
            if i == index:
                return state
        raise AssertionError("unreachable: the index was checked above")

    def blend(self, ids: Tensor, layers: Mapping[int, float], sight: Sight | None = None) -> Tensor:
        """Weighted mean (B, L, hidden) of several hidden states; the weights are divided by their sum.

        Layers above the highest one needed do not run, and a single layer is returned as it is.
        """
        if len(layers) == 1:
            return self(ids, next(iter(layers)), sight=sight)
        states = self.config.num_hidden_layers + 1
        weights = {layer % states: weight / sum(layers.values()) for layer, weight in layers.items()}
        total = torch.zeros(())
        for i, state in enumerate(self.hidden_states(ids, sight=sight)):
            if i in weights:
                total = total + weights[i] * (state if state.dtype == torch.float64 else state.float())
                if i == max(weights):
                    return total.to(state.dtype)
        raise RequestError(f"hidden layers {sorted(layers)} do not all exist; use −{states} to −1")

    def hidden_states(
        self, ids: Tensor, cache: "KVCache | PlacedCache | None" = None, sight: Sight | None = None
    ) -> Iterator[Tensor]:
        """Yield the n + 1 hidden states (B, L, hidden), each computed on demand: what the layer above it reads."""
        model, places = self.model, sight.places(ids) if sight else None
        turn = half_rotation(_positions(ids, cache, sight), self.config)
        x = model.embed_tokens(ids).to(model.norm.weight.dtype)
        if sight and places is not None:
            x = sight.shown(x, places)
        yield x
        for i, layer in enumerate(model.layers):
            x = layer(x, turn, cache.layers[i] if cache else None)
            if sight and places is not None:
                x = sight.deepened(x, places, i)
            yield model.norm(x) if i == len(model.layers) - 1 else x

    @torch.no_grad()
    def next_logits(self, ids: Tensor, cache: "KVCache | PlacedCache") -> Tensor:
        """Logits (B, vocabulary), fp32, of the token after ids (B, L), which follow the tokens that `cache` holds."""
        return self.model.embed_tokens.logits(self(ids, layer=-1, cache=cache)[:, -1]).float()


class Qwen3Decoder(nn.Module):
    """The stack of layers, whose parameters have the prefix `model.` in published files."""

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

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], past: "LayerCache | PlacedLayer | None" = None) -> Tensor:
        attended, norm = self.self_attn(self.input_layernorm(x), turn, past), self.post_attention_layernorm
        x, normed = add_rms_norm(x, attended, norm.weight, norm.eps)
        return x + self.mlp(normed)


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

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], past: "LayerCache | PlacedLayer | None" = None) -> Tensor:
        heads = (-1, self.head_dim)
        q, k, v = (project(x).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = qk_norm_rope_halves(q, k, self.q_norm.weight, self.k_norm.weight, *turn, self.q_norm.eps)
        attend = self.attend
        if past is not None:
            k, v = past.extend(k, v)
            attend = attention  # PyTorch's own: some packages write over k, which is the cache here
            if q.shape[1] < k.shape[1]:
                return self.o_proj(self._attend_from_last(q, k, v, past.bias).flatten(2))
        return self.o_proj(attend(q, k, v, causal=True).flatten(2))

    def _attend_from_last(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of one token to all before it; q and the result (B, 1, H, D), k and v (B, L, G, D).

        The H/G query heads that share keys become rows of one head: on a CPU a tenth of the time of grouped heads.
        """
        rows = q.unflatten(2, (k.shape[2], -1)).squeeze(1).transpose(1, 2)  # (B, H/G, G, D)
        return attention(rows, k, v, bias=bias).transpose(1, 2).flatten(1, 2).unsqueeze(1)


class Qwen3MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = NarrowLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = NarrowLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = NarrowLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class KVCache:
    """Keys and values of all layers for the tokens of a text so far, so that each token runs only once."""

    def __init__(self, config: Qwen3Config, capacity: int, like: Tensor, batch: int = 1):
        """Allocate for `capacity` tokens, in the dtype and on the device of `like`."""
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        pairs = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(config.num_hidden_layers)]
        self.layers = [LayerCache(keys, values) for keys, values in pairs]

    @property
    def length(self) -> int:
        """Number of tokens that it holds."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def skip(self) -> None:
        """Count a token that is written through a PlacedCache."""
        for layer in self.layers:
            layer.length += 1

    def positions(self, length: int) -> Tensor:
        """Those (L,) fp32 of the next `length` tokens."""
        device = self.layers[0].keys.device
        return torch.arange(self.length, self.length + length, dtype=torch.float32, device=device)


class LayerCache:
    """Keys and values of one layer (B, G, capacity, D), of which the first `length` tokens are written.

    Those of one head lie together, so attention reads them in half the time.
    """

    bias = None  # of attention to what `extend` returns

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.length = keys, values, 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, L, G, D); returns all keys and values (B, length, G, D), as views.

        Several tokens at once must be the first ones, because attention's causal mask has no offset.
        """
        begin, end = self.length, self.length + k.shape[1]
        capacity = self.keys.shape[2]
        if (begin and k.shape[1] > 1) or end > capacity:
            raise ValueError(f"{k.shape[1]} tokens cannot follow {begin} in a cache for {capacity}")
        self.length = end
        return self._joined(self.keys, begin, k), self._joined(self.values, begin, v)

    def _joined(self, memory: Tensor, begin: int, new: Tensor) -> Tensor:
        memory[:, :, begin : self.length] = new.transpose(1, 2)
        return memory[:, :, : self.length].transpose(1, 2)


class PlacedCache:
    """A KVCache seen by a CUDA graph: the place of the one token that follows is a tensor, not a number.

    Attention reads the first `window` tokens of every layer, those behind `position` (1,) int64 with a bias of −∞; what
    lies there must be finite.
    """

    def __init__(self, cache: KVCache, position: Tensor, window: int):
        self.position, like = position, cache.layers[0].keys
        later = torch.arange(window, device=position.device) > position
        bias = torch.zeros(window, dtype=like.dtype, device=like.device).masked_fill(later, -torch.inf)
        self.layers = [PlacedLayer(layer, position, window, bias.view(1, 1, 1, -1)) for layer in cache.layers]

    def positions(self, length: int) -> Tensor:
        return self.position.float()


class PlacedLayer(NamedTuple):
    """One layer of a PlacedCache."""

    cache: LayerCache
    position: Tensor
    window: int
    bias: Tensor

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, 1, G, D) at the position; returns those of the window (B, window, G, D), as views."""
        return self._joined(self.cache.keys, k), self._joined(self.cache.values, v)

    def _joined(self, memory: Tensor, new: Tensor) -> Tensor:
        memory.index_copy_(2, self.position, new.transpose(1, 2))
        return memory[:, :, : self.window].transpose(1, 2)


def _positions(ids: Tensor, cache: KVCache | PlacedCache | None, sight: Sight | None) -> Tensor:
    """Those of ids (B, L): (L,), or (3, L) in time, height and width where pictures are among them."""
    if sight:
        return positions(ids[0], sight.grids, sight.pad)
    L = ids.shape[1]
    return cache.positions(L) if cache else torch.arange(L, dtype=torch.float32, device=ids.device)


def half_rotation(position: Tensor, config: Qwen3Config) -> tuple[Tensor, Tensor]:
    """cos and sin (L, D/2), fp32 like the reference: pair k turns by position · θ^(−2k/D).

    Of positions (L,), or (3, L) in time, height and width, of which pair k has the one that `axes` says.
    """
    D = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=position.device) / D)
    own = position[axes(D // 2, config.mrope_section)].T if position.ndim == 2 else position[:, None]  # (L, D/2 or 1)
    angle = (own * frequencies).contiguous()
    return angle.cos(), angle.sin()


def _add_prefix(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Accept files that were saved from the decoder alone, whose keys lack `model.`."""
    for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(prefix + PREFIX)]:
        state_dict[prefix + PREFIX + key.removeprefix(prefix)] = state_dict.pop(key)
