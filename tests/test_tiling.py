"""Tiled decoding and encoding: strips give the whole pass, at any size and with any norm."""

from fractions import Fraction

import pytest
import torch
from tiny import KL, WAN, randomised, relative_error
from torch import nn

from zimage.errors import RequestError
from zimage.kernels import backend, channel_norm, group_norm
from zimage.vae import AutoencoderKL, AutoencoderKLWan, blend, tiling, walk
from zimage.vae.statistics import BlockMoments, ChannelStatistics
from zimage.vae.walk import StripWalk
from zimage.vae.windows import phase_weights, two_maps, windows

TOLERANCE = 1e-4  # fp32, of the largest value
VAES = {"kl": (AutoencoderKL, KL), "wan": (AutoencoderKLWan, WAN)}


@pytest.fixture(scope="module", params=VAES)
def vae(request):
    cls, config = VAES[request.param]
    return randomised(cls.from_config(config), seed=51).eval().requires_grad_(False)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(52))


@pytest.mark.parametrize("height", [8, 16, 24, 40, 104, 4096, None])
@pytest.mark.parametrize("size", [(13, 4), (2, 9), (6, 6)], ids=str)
def test_strips_decode_as_the_whole_does(vae, size, height):
    z = noise(1, 16, *size)
    whole = vae.decoder(z)
    strips = StripWalk(vae.decoder, 8 * size[0], height).decode(z.contiguous(memory_format=torch.channels_last))
    assert relative_error(strips, whole) <= TOLERANCE


@pytest.mark.parametrize("height", [8, 24, 104, None])
@pytest.mark.parametrize("size", [(104, 32), (16, 72)], ids=str)
def test_strips_encode_as_the_whole_does(vae, size, height):
    image = noise(1, 3, *size)
    whole = vae.encoder(image)
    strips = StripWalk(vae.encoder, size[0], height).encode(image.contiguous(memory_format=torch.channels_last))
    assert relative_error(strips, whole) <= TOLERANCE


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Tensors on the CPU take the way of those on a GPU, without kernels."""
    monkeypatch.setattr(walk, "on_gpu", lambda device: True)
    return monkeypatch


@pytest.fixture
def kernels_interpreted(as_on_a_gpu):
    """… and with kernels, in Triton's interpreter."""
    pytest.importorskip("triton", reason="needs the extra `triton`")
    from kernel_checks import interpreter

    interpreter.install()
    for module in (tiling, backend):
        as_on_a_gpu.setattr(module, "fuses", lambda *tensors, least_capability=0: True)
    for module in (group_norm, channel_norm):
        as_on_a_gpu.setattr(module, "TILE", 1024)  # what lies beyond a small map is interpreted too
    return as_on_a_gpu


@pytest.mark.parametrize(("mode", "size"), [("off", None), ("exact", None), ("exact", 40), ("blend", 40)])
def test_the_way_of_a_gpu_gives_the_pictures_of_a_cpu(vae, as_on_a_gpu, mode, size):
    latents, images = noise(2, 16, 7, 5), noise(2, 3, 56, 40).clamp(-1, 1)
    decoded, encoded = vae.decode(latents, size, 8, mode), vae.encode(images, size, 8, mode)
    as_on_a_gpu.undo()
    assert relative_error(decoded, vae.decode(latents, size, 8, mode)) <= TOLERANCE
    assert relative_error(encoded, vae.encode(images, size, 8, mode)) <= TOLERANCE


@pytest.mark.parametrize(("mode", "size"), [("off", None), ("exact", 16)])
def test_so_do_its_kernels(vae, kernels_interpreted, mode, size):
    latents = noise(1, 16, 3, 2)
    ours = vae.decode(latents, size, 8, mode)
    kernels_interpreted.undo()
    assert relative_error(ours, vae.decode(latents)) <= TOLERANCE


@pytest.mark.parametrize("height", [1, 2, 3, 7, 8])
def test_windows_prepare_each_row_once_and_may_be_written_over(height):
    x = noise(1, 2, 7, 3).contiguous(memory_format=torch.channels_last)
    original, seen = x.clone(), []

    def before(rows, out):
        seen.append(rows.shape[2])
        out.copy_(2 * rows)

    padded = nn.functional.pad(2 * original, (0, 0, 1, 1))
    for top, end, window in windows(x, height, before):
        assert torch.equal(window, padded[:, :, top : end + 2])
        x[:, :, top:end] = float("nan")
    assert sum(seen) == 7


@pytest.mark.parametrize("gathers", [ChannelStatistics, BlockMoments])
def test_statistics_of_strips_are_those_of_the_map(gathers):
    """Also where a channel's mean is far from zero, where squares would lose the variance."""
    x = (noise(1, 8, 37, 5) + 1000.0).contiguous(memory_format=torch.channels_last)
    statistics, written = gathers(2), torch.empty_like(x)
    for rows, out in zip(x.split(4, dim=2), written.split(4, dim=2), strict=True):
        statistics.write(out, rows)
        statistics.measure(rows)
    mean, variance = statistics.of_groups()
    groups = x.double().reshape(2, -1)
    torch.testing.assert_close(mean.double(), groups.mean(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), groups.var(dim=1, correction=0), rtol=1e-4, atol=0)
    assert torch.equal(written, x)


def test_phases_are_nearest_doubling_and_convolution():
    conv = nn.Conv2d(5, 3, 3, padding=1)
    x = noise(1, 5, 4, 6)
    whole = conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    phases = nn.functional.conv2d(x, phase_weights(conv.weight), conv.bias.repeat(4), padding=1).chunk(4, dim=1)
    for i, phase in enumerate(phases):
        row, column = divmod(i, 2)
        part = phase[:, :, row : row + 4, column : column + 6]
        torch.testing.assert_close(part, whole[:, :, row::2, column::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [2, 3])
def test_two_maps_are_apart_and_cover_the_rows_that_were_read(channels):
    """In the memory of a map of twice the channels: row i of both takes the place of its row i alone."""
    x = noise(1, 4, 5, 3).contiguous(memory_format=torch.channels_last)
    original = x.clone()
    maps = two_maps(x, channels)
    for i, part in enumerate(maps):
        assert part.shape == (1, channels, 5, 3)
        part[:, :, :2] = i
    assert (maps[0][:, :, :2] == 0).all()
    assert (maps[1][:, :, :2] == 1).all()
    assert torch.equal(x[:, :, 2:], original[:, :, 2:])
    assert torch.equal(x[:, :, :2], original[:, :, :2]) == (channels == 3)


# ------------------------------------------------------------------ through the VAEs


@pytest.mark.parametrize("size", [None, 8, 40, 4000])
def test_exact_mode_of_a_batch(vae, size):
    latents, images = noise(2, 16, 6, 5), noise(2, 3, 48, 40).clamp(-1, 1)
    assert relative_error(vae.decode(latents, tile_size=size, tile_mode="exact"), vae.decode(latents)) <= TOLERANCE
    assert relative_error(vae.encode(images, tile_size=size, tile_mode="exact"), vae.encode(images)) <= TOLERANCE


def test_blended_tiles_that_hold_the_whole_picture_are_the_whole(vae):
    latents, images = noise(2, 16, 6, 5), noise(2, 3, 48, 40).clamp(-1, 1)
    assert relative_error(vae.decode(latents, 64, 16, "blend"), vae.decode(latents)) <= 1e-6
    assert relative_error(vae.encode(images, 64, 16, "blend"), vae.encode(images)) <= 1e-6


def test_blended_tiles_have_the_pictures_size_and_are_near_it(vae):
    latents = noise(1, 16, 12, 15)
    blended, whole = vae.decode(latents, 48, 16, "blend"), vae.decode(latents)
    assert blended.shape == whole.shape
    assert 0 < (blended - whole).square().mean() < whole.var()
    images = noise(1, 3, 96, 120).clamp(-1, 1)
    assert vae.encode(images, 48, 16, "blend").shape == (1, 16, 12, 15)


@pytest.mark.parametrize(("tile", "overlap"), [(5, 2), (4, 0), (7, 6)])
def test_blending_is_no_change_where_tiles_agree(tile, overlap):
    """No frame of another colour, no tile in another's place."""
    x = noise(1, 3, 12, 15)

    def enlarge(part):
        return part.repeat_interleave(8, 2).repeat_interleave(8, 3)

    torch.testing.assert_close(blend.blend(enlarge, x, tile, overlap), enlarge(x))


@pytest.mark.parametrize(("length", "tile", "overlap"), [(100, 32, 8), (33, 32, 0), (7, 3, 2), (32, 32, 16), (5, 9, 3)])
def test_blending_weights_add_up_to_one(length, tile, overlap):
    begins, scale = blend.starts(length, tile, overlap), Fraction(8)
    total = torch.zeros(length * 8)
    for begin, weight in zip(begins, blend.weights(begins, tile, overlap, length, scale, total.device), strict=True):
        assert weight.min() > 0
        total[8 * begin : 8 * begin + len(weight)] += weight
    torch.testing.assert_close(total, torch.ones(length * 8))


@pytest.mark.parametrize(
    ("settings", "says"),
    [((None, 64, "strips"), "strips"), ((4, 0, "exact"), "4"), ((64, 64, "blend"), "64"), ((64, -1, "blend"), "-1")],
)
def test_unusable_tiles_are_refused(vae, settings, says):
    with pytest.raises(RequestError, match=says):
        vae.decode(noise(1, 16, 2, 2), *settings)
