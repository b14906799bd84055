"""The VAEs on a pretended card: launches, bytes and memory at the published sizes, and how convolutions are called."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from pretended import Count, needs_pretended, pretend
from tiny import KL, WAN
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.ranks import Counted
from bench.weights import COMPONENTS
from zimage.kernels import backend
from zimage.kernels.tiles import to_levels
from zimage.loading.plan import Workload
from zimage.loading.work import vae_bytes
from zimage.parallel.divided import divided
from zimage.pictures.image import to_pil
from zimage.vae import Autoencoder, AutoencoderKL, AutoencoderKLWan

pytestmark = [pytest.mark.cuda, needs_pretended]
CARD = torch.device("cuda", 0)
PUBLISHED = {
    "kl": (AutoencoderKL, COMPONENTS["vae"][1]),
    "wan": (AutoencoderKLWan, {**WAN, "base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}),
}
TINY = {"kl": (AutoencoderKL, KL), "wan": (AutoencoderKLWan, WAN)}
BF16, FP32 = torch.bfloat16, torch.float32
aten = torch.ops.aten


def build(cls: type[Autoencoder], config: dict, dtype: torch.dtype) -> Autoencoder:
    with torch.device("meta"):
        vae = cls.from_config(config)
    return vae.to(dtype).to_empty(device=CARD).requires_grad_(False).eval()


# ------------------------------------------------------------------ what it costs


@cache
def cost(name: str, dtype: torch.dtype, size: int, mode: str, encodes: bool = False) -> Count:
    """What one picture of `size` × `size` does, with the weights laid out already."""
    with torch.no_grad(), pretend() as card:
        vae = build(*PUBLISHED[name], dtype)
        vae._lay_out_weights()
        with card.count() as count:
            if encodes:
                vae.encode(torch.zeros(1, 3, size, size, device=CARD), tile_mode=mode)
            else:
                vae.decode(torch.zeros(1, 16, size // 8, size // 8, device=CARD), tile_mode=mode)
    return count


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("size", "mode", "most"), [(1024, "off", 300), (1024, "exact", 400), (2048, "exact", 1000)])
def test_few_launches_and_no_waits(name, size, mode, most):
    count = cost(name, BF16, size, mode)
    assert len(count.launches) <= most
    assert not count.syncs


def test_few_passes_over_the_maps():
    """A map is written, normalised and read by a convolution; next to nothing is copied."""
    for mode in ("off", "exact"):
        count = cost("kl", BF16, 1024, mode)
        assert count.bytes <= 29e9
        assert count.seconds() <= 0.075
        copies = [launch.bytes for launch in count.launches if launch.name in ("clone", "_to_copy", "copy_")]
        assert sum(copies) <= 1.5e9, copies


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    ("dtype", "size", "mode"),
    [(BF16, 1024, "off"), (BF16, 1024, "exact"), (BF16, 2048, "exact"), (FP32, 1024, "exact")],
    ids=str,
)
def test_the_peak_is_planned(name, dtype, size, mode):
    with pretend():
        cls, config = PUBLISHED[name]
        with torch.device("meta"):
            read = cls.from_config(config).config
        planned = vae_bytes(read, Workload(size, size, 0, tile_mode=mode), dtype, CARD)
    peak = cost(name, dtype, size, mode).peak
    if size == 1024 and dtype is BF16:
        peak = max(peak, cost(name, dtype, size, mode, encodes=True).peak)
    assert 0.6 * planned <= peak <= planned, f"{peak / 1e6:.0f} MB of {planned / 1e6:.0f}"


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("size", "number"), [(2048, 2), (2048, 4), (4096, 2)])
def test_the_peak_of_a_rank_is_planned(name, size, number):
    """Of one with others above it and below it, or at least above; nothing waits for its card."""
    cls, config = PUBLISHED[name]
    with torch.no_grad(), pretend() as card:
        vae = build(cls, config, BF16)
        vae._lay_out_weights()
        with card.count() as count, divided(Counted(number // 2, number), "vae", vae):
            vae.decode(torch.zeros(1, 16, size // 8, size // 8, device=CARD), tile_mode="exact")
        planned = vae_bytes(vae.config, Workload(size, size, 0, tile_mode="exact", ranks=number), BF16, CARD)
    assert 0.6 * planned <= count.peak <= planned, f"{count.peak / 1e6:.0f} MB of {planned / 1e6:.0f}"
    assert not count.syncs


def test_a_picture_leaves_the_card_as_bytes():
    """Rounded in one launch, in the order of the decoder's map."""
    with pretend() as card, card.count() as count:
        images = torch.zeros(1, 3, 64, 48, device=CARD).contiguous(memory_format=torch.channels_last)
        before = len(count.launches)
        (picture,) = to_pil(to_levels(images))
    assert [launch.name for launch in count.launches[before:]] == ["tiles.levels_kernel"]
    assert [copy.bytes for copy in count.copies] == [3 * 64 * 48]
    assert picture.size == (48, 64)


# ------------------------------------------------------------------ how it is computed


class Op(NamedTuple):
    """One call: tensors as (dtype, whether the channels are innermost), other arguments as they are."""

    op: object
    arguments: tuple

    @property
    def tensors(self) -> list[tuple[torch.dtype, bool]]:
        return [x for x in self.arguments if isinstance(x, tuple) and x and isinstance(x[0], torch.dtype)]


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(Op(op, tuple(map(self._described, args))))
        return op(*args, **(kwargs or {}))

    @staticmethod
    def _described(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.dtype, value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)


@cache
def ops(name: str, kernels: bool) -> list[Op]:
    """What a tiny VAE calls while it decodes and encodes, whole and in strips."""
    with torch.no_grad(), pretend(), pytest.MonkeyPatch.context() as patches:
        patches.setattr(backend, "ACTIVE", kernels)
        vae = build(*TINY[name], FP32)
        with Seen() as seen:
            for mode in ("off", "exact"):
                vae.decode(torch.zeros(1, 16, 8, 8, device=CARD), tile_mode=mode)
                vae.encode(torch.zeros(1, 3, 64, 64, device=CARD), tile_mode=mode)
        assert all(is_laid_out(module.weight) for module in vae.modules() if isinstance(module, nn.Conv2d))
    return seen.ops


def is_laid_out(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "references"])
def test_no_convolution_in_fp32_uses_tf32_and_no_switch_is_touched(name, kernels):
    """cuDNN's switch is on by default; the last argument of `_convolution` is what it stands for."""
    before = torch.backends.cudnn.set_flags()
    called = [seen.arguments for seen in ops(name, kernels) if "convolution" in str(seen.op)]
    assert torch.backends.cudnn.set_flags() == before
    assert torch.backends.cudnn.allow_tf32, "PyTorch's default has changed"
    assert len(called) >= 80
    assert all(len(arguments) == 13 and arguments[12] is False for arguments in called)


@pytest.mark.parametrize("name", TINY)
def test_maps_and_weights_have_their_channels_innermost(name):
    """PyTorch copies what a convolution is given otherwise."""
    called = [seen.tensors[:2] for seen in ops(name, True) if "convolution" in str(seen.op)]
    assert len(called) >= 80
    assert all(innermost for tensors in called for _, innermost in tensors)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "references"])
def test_nothing_is_called_that_macs_lack(name, kernels):
    """Neither float64 nor batch norm's own statistics: the decode of a Mac's render once ended there."""
    called = ops(name, kernels)
    assert not [seen.op for seen in called if torch.float64 in [dtype for dtype, _ in seen.tensors]]
    assert not [seen.op for seen in called if "batch_norm_update_stats" in str(seen.op)]
