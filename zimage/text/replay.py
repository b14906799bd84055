"""Writing a text token by token from CUDA graphs.

A graph is captured for each window of the cache: 1024 tokens, then twice as many as before. What lies in the window
behind the text so far is masked, so the same graph serves every place in it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zimage.nn.graphs import Graphs, captured
from zimage.text.qwen3 import KVCache, PlacedCache, Qwen3

LEAST_WINDOW = 1024  # tokens; their keys and values are a fiftieth of what a token reads anyway


def window_of(tokens: int) -> int:
    """The window in which a text of `tokens` is written."""
    return max(LEAST_WINDOW, 1 << (tokens - 1).bit_length())


class ReplayedLogits:
    """`Qwen3.next_logits` for one text of at most `capacity` tokens: its prompt, then one token at a time."""

    def __init__(self, model: Qwen3, capacity: int, like: Tensor, graphs: Graphs):
        self._model, self._graphs = model, graphs
        self._cache = KVCache(model.config, window_of(capacity), like)
        for layer in self._cache.layers:  # what is masked must be finite
            layer.keys.zero_()
            layer.values.zero_()
        self._window = 0
        self._replay: Callable[..., Tensor] | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        place = self._cache.length
        if place == 0:
            return self._model.next_logits(ids, self._cache)
        position, window = torch.full((1,), place, device=ids.device), window_of(place + 1)
        if self._replay is None or window != self._window:
            self._replay, self._window = None, window  # the last one's memory is free for this one
            self._replay = captured(partial(self._logits, window), (ids, position), self._graphs)
        self._cache.skip()
        return self._replay(ids, position)

    def _logits(self, window: int, ids: Tensor, position: Tensor) -> Tensor:
        return self._model.next_logits(ids, PlacedCache(self._cache, position, window))
