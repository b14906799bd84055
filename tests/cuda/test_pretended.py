"""The ring itself: what it must find, it finds."""

import gc

import pytest
import torch
from pretended import needs_pretended, pretend
from torch import Tensor, nn

from zimage.flow import euler_step
from zimage.kernels.norm import rms_norm_scale
from zimage.vae.kl import conv

pytestmark = [pytest.mark.cuda, needs_pretended]
CARD, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def card():
    with torch.no_grad(), pretend(devices=2) as card:
        yield card


def norm_arguments(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, float]:
    x, weight, scale = (torch.zeros(shape, device=device, dtype=dtype) for shape in ((1, 4, 64), (64,), (1, 1, 64)))
    return x, weight, scale, 1e-5


def test_tensors_of_two_devices_do_not_meet(card):
    with pytest.raises(Exception, match="same device"):
        torch.zeros(3, device=CARD) + torch.zeros(3)
    with pytest.raises(Exception, match="same device"):
        torch.zeros(3, device=CARD) + torch.zeros(3, device=OTHER)
    assert (torch.zeros(3, device=CARD) + torch.tensor(1.0)).device == CARD, "a number may"


def test_waits_are_told_with_their_line(card):
    x = torch.zeros(4, device=CARD)
    float(x.sum())
    euler_step(x, x, torch.tensor(1.0), torch.tensor(0.5))
    x.cpu()
    torch.zeros(2).to(CARD, non_blocking=True)
    first, second, third = card.total.syncs
    assert "test_pretended.py" in first
    assert second.startswith("zimage/flow/steps.py:")
    assert "test_pretended.py" in third
    assert [copy.waits for copy in card.total.copies] == [True, True, False]


def test_results_that_depend_on_data_are_refused(card):
    with pytest.raises(AssertionError, match="depends on data"):
        torch.zeros(4, device=CARD).nonzero()


def test_kernels_run_where_their_tensors_are(card, monkeypatch):
    rms_norm_scale(*norm_arguments(OTHER))
    assert [launch.device for launch in card.total.launches if "kernel" in launch.name] == [OTHER]
    x, weight, scale, eps = norm_arguments(CARD)
    with pytest.raises(pytest.fail.Exception, match=r"on cuda:0, is given tensors on .*cpu"):
        rms_norm_scale(x, weight.cpu(), scale, eps)

    def enqueue_here(kernel, grid, *arguments, **options):
        kernel[grid](*arguments, **options)

    monkeypatch.setattr("zimage.kernels.norm.enqueue", enqueue_here)
    with pytest.raises(pytest.fail.Exception, match=r"on cuda:0, is given tensors on .*index=1"):
        rms_norm_scale(*norm_arguments(OTHER))


def test_bytes_and_flops_are_the_least_there_are(card):
    a, b = torch.zeros(64, 128, device=CARD).bfloat16(), torch.zeros(32, 128, device=CARD).bfloat16()
    arguments = norm_arguments(CARD)
    with card.count() as count:
        a @ b.t()
        rms_norm_scale(*arguments)
        a.view(128, 64).t()[1:]
    product, kernel = count.launches
    assert (product.flops, product.bytes) == (2 * 64 * 32 * 128, 2 * (64 * 128 + 32 * 128 + 64 * 32))
    assert (kernel.name, kernel.bytes) == ("norm.kernel", 2 * (2 * 4 * 64 + 2 * 64))


def test_storage_is_followed_until_it_is_freed(card):
    with card.count() as count:
        x = torch.zeros(1000, device=CARD)
        y = x.view(10, 100)[1:]
        del x
        z = y + 1
        del y
        gc.collect()
        torch.zeros(500, device=CARD)
    assert count.peak == 4000 + 3600
    assert card.live[0] == z.numel() * 4


def test_convolutions_and_group_norm_lie_as_on_a_card(card):
    """cuDNN keeps the channels innermost; CUDA's GroupNorm moves them outwards first."""
    layer, norm = conv(8, 16, 3).to(CARD), nn.GroupNorm(4, 16).to(CARD)
    y = layer(torch.zeros(1, 8, 6, 6, device=CARD).contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    with card.count() as count:
        assert norm(y).is_contiguous()
    assert "clone" in count.by_name()
