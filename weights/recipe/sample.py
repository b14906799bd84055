"""Pictures from prompts with the plain modules: encode → 8 Euler steps → decode. The recipe's own, smallest sampler."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from zimage import flow
from zimage.dit import ZImageDiT
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL
from zimage.weights.recipe.tokenizer import encode

LATENT_SHAPE = (16, 16, 16)
SHIFT = 3.0


class Painter(nn.Module):
    """Text encoder and DiT: the part that learns from captions."""

    def __init__(self, text_config: dict, dit_config: dict):
        super().__init__()
        self.text_encoder = Qwen3.from_config(text_config)
        self.dit = ZImageDiT.from_config(dit_config)

    def captions(self, ids: Sequence[list[int]]) -> list[Tensor]:
        """Embeddings (L, width) of each prompt's tokens. Causal attention makes the right padding harmless."""
        longest = max(map(len, ids))
        batch = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        return [states[: len(row)] for states, row in zip(self.text_encoder(batch), ids, strict=True)]

    def forward(self, latents: Tensor, sigma: Tensor, ids: Sequence[list[int]]) -> Tensor:
        return self.dit(latents, sigma, self.captions(ids))


@torch.no_grad()
def denoise(painter: Painter, tokenizer: Tokenizer, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Tensor:
    """Latents (B, 16, 16, 16) for one batch."""
    x = torch.stack([torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    captions = painter.captions([encode(tokenizer, prompt) for prompt in prompts])
    for now, after in pairwise(flow.sigmas(steps, SHIFT)):
        x = flow.euler_step(x, painter.dit(x, now.expand(len(x)), captions), now, after)
    return x


@torch.no_grad()
def render(
    painter: Painter,
    vae: AutoencoderKL,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 8,
    batch: int = 16,
) -> list[Tensor]:
    """Pictures (3, 128, 128) in [−1, 1]."""
    pictures: list[Tensor] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        pictures += vae.decode(denoise(painter, tokenizer, prompts[part], seeds[part], steps)).unbind()
    return pictures
