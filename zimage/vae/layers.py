"""What both autoencoders are built of, and the order in which an encoder and a decoder run their layers.

Shapes: B batch, C channels, H × W positions. Attributes have the checkpoint's names (diffusers naming).
"""

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn


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


class MidBlock(nn.Module):
    """Attention over all positions between two residual blocks."""

    def __init__(self, first: ResnetBlock, attention: nn.Module, last: ResnetBlock):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList([first, last]), nn.ModuleList([attention])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


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
