"""The stages beside the steps: encoding and writing, decoding whole, in strips and in tiles."""

import itertools
import time
from collections.abc import Iterator
from functools import cache, partial

import torch

from bench.card.models import TOKENS, costs, random_model
from bench.card.rows import Bench, Row, Task, as_planned
from bench.weights import SMALL
from zimage.loading.graphs import give_graphs
from zimage.loading.plan import Workload
from zimage.loading.work import text_encoder_bytes, vae_bytes
from zimage.settings.rewriting import Sampling
from zimage.text.generate import generate

PROMPT, WRITTEN, WRITTEN_BY_SMALL = 100, 32, 4  # tokens
MODES = ("off", "exact", "blend")


def text(bench: Bench) -> Iterator[Task]:
    """Encoding short and long prompts, and writing, per token."""
    encoder = cache(lambda: random_model("text_encoder", bench.device, config=_config(bench, "text_encoder")))

    def encode(tokens: int) -> Row:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=bench.device)
        planned = text_encoder_bytes(encoder().config, Workload(16, 16, tokens), torch.bfloat16)
        return as_planned(costs(lambda: encoder()(ids), planned, bench.device, bench.repeats))

    def write(graphs: bool = False) -> Row:
        if graphs:
            give_graphs("text_encoder", encoder(), bench.device, "sdpa", streamed=False)
        greedy = Sampling(temperature=0.0)
        count = WRITTEN_BY_SMALL if bench.small else WRITTEN
        for _ in range(2):  # kernels are compiled, and graphs recorded, in the first
            tokens = generate(encoder(), list(range(PROMPT)), greedy, count + 1, (), torch.Generator())
            started = time.perf_counter()
            next(tokens)
            first = time.perf_counter()
            written = len(list(tokens))
        ms = (time.perf_counter() - first) * 1e3
        return {"ms_per_token": ms / max(written, 1), "first_token_ms": (first - started) * 1e3, "tokens": written}

    yield Task(f"encode {TOKENS} tokens", partial(encode, TOKENS))
    yield Task("encode 512 tokens", partial(encode, 512))
    yield Task("write", write)
    yield Task("write, CUDA graphs", partial(write, graphs=True))


def decode(bench: Bench) -> Iterator[Task]:
    """Decoding whole, in exact strips and in blended tiles, beside the plan's memory."""
    vae = cache(lambda: random_model("vae", bench.device, config=_config(bench, "vae")))

    def decoded(size: int, mode: str) -> Row:
        latents = torch.randn(1, 16, size // 8, size // 8, device=bench.device)
        planned = vae_bytes(vae().config, Workload(size, size, 0, tile_mode=mode), torch.bfloat16, bench.device)
        row = costs(lambda: vae().decode(latents, None, 64, mode), planned, bench.device, bench.repeats)
        return as_planned(row)

    for size, mode in itertools.product(bench.sizes[-2:], MODES):
        yield Task(f"{ {'off': 'whole'}.get(mode, mode) } {size}", partial(decoded, size, mode))


def _config(bench: Bench, name: str) -> dict | None:
    return SMALL[name] if bench.small else None
