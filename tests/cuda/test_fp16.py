"""One step of the published model in fp16 on pretended cards, by the makers' figures."""

import pytest
import torch
from pretended import needs_pretended, pretend
from test_steps import CARD, TOKENS, step

from bench.card import random_model
from zimage.loading.plan import Workload
from zimage.loading.weights import half_matrices, held_as
from zimage.loading.work import dit_bytes
from zimage.nn.layers import BlockLinear

pytestmark = [pytest.mark.cuda, needs_pretended]
OURS = "half_product.kernel"


def model_in_fp16():
    """Of the published size, its weights held as the loader holds them."""
    dit = random_model("transformer", CARD)
    half = half_matrices(dit)
    for name, weight in dit.named_parameters():
        weight.data = weight.data.to(held_as(name, torch.float16, half))
    dit.in_half = True
    return dit


def test_a_step_on_a_card_that_adds_in_fp16_at_twice_the_rate():
    with torch.no_grad(), pretend() as card:
        dit = model_in_fp16()
        for size, most in ((512, 0.054), (1024, 0.220), (2048, 1.49)):
            count = step(card, dit, size)
            assert not count.syncs
            assert not count.copies
            assert count.by_name()[OURS] == 7 * 32  # of the blocks that run in a step
            assert len(count.launches) <= 480
            assert count.seconds(fp16_sums=True) <= most, f"{size}: {count.seconds(fp16_sums=True):.4f} s"
            assert count.peak <= dit_bytes(dit.config, Workload(size, size, TOKENS), torch.float16)


@pytest.mark.parametrize(
    ("capability", "product"),
    [((7, 5), "mm"), ((8, 0), "mm"), ((8, 6), OURS), ((8, 9), OURS), ((9, 0), "mm"), ((12, 0), OURS)],
    ids=str,
)
def test_every_card_has_its_product(capability, product):
    """The library's adds in fp32: it costs no more on these cards, or Triton does not reach their tensor cores."""
    with torch.no_grad(), pretend(capability=capability) as card:
        layer = BlockLinear(96, 64).to(CARD, torch.float16)
        x = torch.zeros(2, 32, 96, device=CARD, dtype=torch.float16)
        with card.count() as count:
            out = layer(x)
        assert (out.shape, out.dtype) == ((2, 32, 64), torch.float16)
        assert [launch.name for launch in count.launches] == [product]
