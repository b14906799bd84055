"""One step of the published model on a pretended RTX 4090: its launches, bytes, memory and least time."""

import pytest
import torch
from pretended import Card, Count, needs_pretended, pretend

from bench.card import random_model
from zimage.loading.plan import Workload
from zimage.loading.work import dit_bytes

pytestmark = [pytest.mark.cuda, needs_pretended]
CARD = torch.device("cuda", 0)
TOKENS = 32  # of the caption
LAUNCH = 12e-6  # seconds that Python and Triton take for one launch


def step(card: Card, dit, size: int, dtype: torch.dtype = torch.bfloat16) -> Count:
    """What one evaluation of a picture of `size` × `size` pixels does."""
    caption = torch.zeros(TOKENS, dit.config.cap_feat_dim, device=CARD, dtype=dtype)
    latents = torch.zeros(1, 16, size // 8, size // 8, device=CARD)
    modulation = dit.modulate(torch.tensor([0.7]))
    context = dit.context(dit.refine([caption]), size // 8, size // 8)
    with card.count() as count:
        dit.velocity(latents, modulation, context)
    return count


def test_a_step_in_bf16():
    with torch.no_grad(), pretend() as card:
        dit = random_model("transformer", CARD)
        for size, most in ((512, 0.082), (1024, 0.3565), (2048, 2.020)):
            count = step(card, dit, size)
            assert not count.syncs
            assert not count.copies
            assert len(count.launches) <= 470
            assert count.seconds() <= most, f"{size}: {count.seconds():.4f} s"
            assert len(count.launches) * LAUNCH < count.seconds() / 2
            assert count.peak <= dit_bytes(dit.config, Workload(size, size, TOKENS), torch.bfloat16)
