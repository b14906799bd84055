"""The DiT's training scenes with their latents: all single scenes, a pool of pairs that slowly renews itself."""

import random
from pathlib import Path

import torch
from torch import Tensor

from zimage.vae import AutoencoderKL
from zimage.weights.recipe.objects import PALETTE
from zimage.weights.recipe.scenes import LARGE, Scene, draw, random_pair, single_scenes

PAIR_POOL = 900  # per worker
FRESH_PAIRS = 2  # at a time


class LatentCache:
    """Scenes and their scaled latents (N, 16, 16, 16), drawn from by kind. Each of several workers keeps a share."""

    def __init__(self, vae: AutoencoderKL, rng: random.Random, rank: int = 0, workers: int = 1):
        self.vae, self.rng = vae, rng
        self.scenes: list[Scene] = [Scene((), colour) for colour in PALETTE] + shuffled_singles()[rank::workers]
        self.kinds = {
            "plain": [i for i, s in enumerate(self.scenes) if not s.objects],
            "large": [i for i, s in enumerate(self.scenes) if s.objects and s.objects[0].size == LARGE],
            "small": [i for i, s in enumerate(self.scenes) if s.objects and s.objects[0].size != LARGE],
        }
        self.latents = self._encode(self.scenes)
        self._oldest = 0

    def add_pairs(self, count: int = PAIR_POOL) -> None:
        pairs = [random_pair(self.rng) for _ in range(count)]
        self.kinds["pair"] = list(range(len(self.scenes), len(self.scenes) + count))
        self.scenes += pairs
        self.latents = torch.cat((self.latents, self._encode(pairs)))

    def renew_pairs(self, count: int = FRESH_PAIRS) -> None:
        """Replace the oldest pairs by new ones."""
        pool = self.kinds["pair"]
        slots = [pool[(self._oldest + i) % len(pool)] for i in range(count)]
        self._oldest = (self._oldest + count) % len(pool)
        pairs = [random_pair(self.rng) for _ in range(count)]
        self.latents[slots] = self._encode(pairs)
        for slot, pair in zip(slots, pairs, strict=True):
            self.scenes[slot] = pair

    def sample(self, shares: dict[str, float], count: int) -> tuple[list[Scene], Tensor]:
        """`count` scenes whose kinds follow `shares`, with their latents."""
        kinds = self.rng.choices(list(shares), weights=list(shares.values()), k=count)
        indices = [self.rng.choice(self.kinds[kind]) for kind in kinds]
        return [self.scenes[i] for i in indices], self.latents[indices]

    @torch.no_grad()
    def _encode(self, scenes: list[Scene], batch: int = 16) -> Tensor:
        parts = [scenes[i : i + batch] for i in range(0, len(scenes), batch)]
        return torch.cat([self.vae.encode(torch.stack([draw(scene) for scene in part])) for part in parts])


def shuffled_singles() -> list[Scene]:
    """Always in the same order, so that shares of it do not overlap."""
    scenes = single_scenes()
    random.Random(0).shuffle(scenes)
    return scenes


def load_vae(work: Path) -> AutoencoderKL:
    final = torch.load(work / "vae_final.pt", weights_only=True)
    vae = AutoencoderKL.from_config(final["config"])
    vae.load_state_dict(final["weights"])
    return vae.eval().requires_grad_(False)
