"""What both autoencoders are built of, and the order in which an encoder and a decoder run their layers.

Shapes: B batch, C channels, H × W positions. Attributes have the checkpoint's names (diffusers naming).
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.kernels.channel_norm import channel_norm_silu
from zimage.kernels.rms_norm import rms_norm
from zimage.nn.attention import attention

CHANNEL_NORM_EPS = 1e-12  # on the length of a channel vector, as in the reference's F.normalize


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: tuple[int, ...] = (0, 0),
) -> Tensor:
    """F.conv2d, in fp32 on a GPU without TF32, whose products keep 10 bits.

    cuDNN takes TF32 unless a switch of the whole process is off; a program that we are part of may want it on. So the
    switch is passed as an argument, as PyTorch itself does one level below F.conv2d; the others are left as they are.
    """
    if not (x.is_cuda and x.dtype == torch.float32):
        return F.conv2d(x, weight, bias, stride, padding)
    strides = (stride, stride) if isinstance(stride, int) else stride
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    switches = (cudnn.benchmark, deterministic, cudnn.enabled, False)
    return torch._convolution(x, weight, bias, strides, padding, (1, 1), False, (0, 0), 1, *switches)


class Conv2d(nn.Conv2d):
    """A convolution of zero padding, by `convolve`."""

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        assert not isinstance(padding, str)
        return convolve(x, self.weight, self.bias, self.stride, padding)


class ChannelNorm(nn.Module):
    """gamma · √C · x / ‖x‖ over the channels of each pixel, in fp32 inside: an RMS norm over the channel axis."""

    def __init__(self, width: int, published_axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.published_axes = published_axes
        self.eps = CHANNEL_NORM_EPS**2 / width

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.permute(0, 2, 3, 1), self.gamma, self.eps).permute(0, 3, 1, 2)

    def activated(self, x: Tensor, out: Tensor) -> Tensor:
        """out = silu(self(x)) for one sample."""
        return channel_norm_silu(x, self.gamma, self.eps, out)

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"gamma": (len(self.gamma), *(1,) * self.published_axes)}


class ResnetBlock(nn.Module):
    """x + f(x), where f is norm, SiLU and a 3 × 3 convolution, twice; x is projected if the channels change."""

    def __init__(
        self, c_in: int, c_out: int, norm: Callable[[int], nn.Module], conv: Callable[[int, int, int], nn.Conv2d]
    ):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = conv(c_in, c_out, 3)
        self.norm2 = norm(c_out)
        self.conv2 = conv(c_out, c_out, 3)
        self.conv_shortcut = conv(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class MapAttention(nn.Module):
    """One head over all L = H·W positions of a map, residual."""

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, L, 1, C)."""
        raise NotImplementedError

    def leave(self, x: Tensor, out: Tensor) -> Tensor:
        """The next map of this one and of what was attended to, (B, L, 1, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(x, attention(*self.enter(x)))


class MidBlock(nn.Module):
    """Attention over all positions between two residual blocks."""

    def __init__(self, first: ResnetBlock, attention: MapAttention, last: ResnetBlock):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList([first, last]), nn.ModuleList([attention])

    @property
    def first(self) -> ResnetBlock:
        return cast(ResnetBlock, self.resnets[0])

    @property
    def attention(self) -> MapAttention:
        return cast(MapAttention, self.attentions[0])

    @property
    def last(self) -> ResnetBlock:
        return cast(ResnetBlock, self.resnets[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(self.first(x)))


class Stack(nn.Module):
    """An encoder or a decoder: first convolution, layers, mid block, last norm and convolution."""

    conv_in: nn.Conv2d
    mid_block: MidBlock
    conv_out: nn.Conv2d
    last_norm_name = "norm_out"

    def layers(self) -> Iterator[nn.Module]:
        """Residual blocks and the layers that halve or double the map, in their order."""
        raise NotImplementedError

    def last_norm(self) -> nn.Module:
        return self.get_submodule(self.last_norm_name)

    def _through_layers(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x

    def _head(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.last_norm()(x)))


class EncoderStack(Stack):
    def forward(self, x: Tensor) -> Tensor:
        """Moments (B, 2·16, H/8, W/8) of images (B, 3, H, W)."""
        return self._head(self.mid_block(self._through_layers(self.conv_in(x))))


class DecoderStack(Stack):
    def forward(self, z: Tensor) -> Tensor:
        """Images (B, 3, 8·h, 8·w) of unscaled latents (B, 16, h, w)."""
        return self._head(self._through_layers(self.mid_block(self.conv_in(z))))


def layers_of(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """The layers of blocks whose children are lists of layers."""
    return (layer for block in blocks for group in block.children() for layer in group.children())
