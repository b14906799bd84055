"""How far the activations of the DiT's blocks can reach, by its weights and its modulation: the units that fp16 needs.

Nothing is measured on activations: the bounds hold for every latent of up to ±LATENTS and every caption.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zimage.dit.blocks import Block, BlockModulation
from zimage.dit.units import Units
from zimage.errors import RequestError
from zimage.nn.gain import Gain, gain, sides
from zimage.nn.layers import RMSNorm

log = logging.getLogger("zimage")

LIMIT = 2.0**15  # half of what fp16 holds: the other half is for the rounding of what is bounded here
LATENTS = 2.0**10
LEAST_RMS = 2.0**-15  # of a matrix: below, fp16's subnormal numbers round more than sums do


def units(blocks: Sequence[Block], modulations: Sequence[BlockModulation], entry: float) -> Units:
    """The units of these blocks, with their modulations at all noise levels, for a stream that begins within ±entry."""
    device = modulations[0].scale_msa.device
    inputs, hidden = [], []
    for block, (attention, feed_forward) in zip(blocks, _input_norms(blocks, modulations), strict=True):
        a, f = block.attention, block.feed_forward
        to_q, to_k, to_v, to_out = (_gain(layer, device) for layer in (a.to_q, a.to_k, a.to_v, a.to_out[0]))
        w1, w2, w3 = (_gain(layer, device) for layer in (f.w1, f.w2, f.w3))
        inputs += [attention * max(1.0, to_q.row, to_k.row, to_v.whole, to_v.whole * to_out.row)]  # 1: itself
        inputs += [feed_forward * max(1.0, w1.row, w3.row)]
        hidden += [max(1.0, w2.row)]
    stream = entry + branches(blocks, device)
    found = Units(_power(stream / LIMIT), _power(max(inputs) / LIMIT), 1 / _power(max(hidden) / LIMIT))
    log.debug("fp16: stream of up to %.3g, inputs up to %.3g, held in %s", stream, max(inputs), found)
    return found


def in_units(modulation: BlockModulation, units: Units) -> BlockModulation:
    """A block's modulation that puts its inputs and its branches in units."""
    scale, gate = 1 / units.input, 1 / units.stream
    m = modulation
    return BlockModulation(m.scale_msa * scale, m.gate_msa * gate, m.scale_mlp * scale, m.gate_mlp * gate)


def unmodulated(block: Block, device: torch.device) -> BlockModulation:
    """The modulation that changes nothing."""
    ones = torch.ones(1, 1, len(block.attention_norm1.weight), device=device)
    return BlockModulation(ones, ones, ones, ones)


def branches(blocks: Sequence[Block], device: torch.device) -> float:
    """The most that the branches of these blocks can add to a value of the stream, with gates of at most 1."""
    norms = [norm for block in blocks for norm in (block.attention_norm2, block.ffn_norm2)]
    return sum(largest_of_norms(norms, device))


def embedded(layer: nn.Module, norm: float, pad: Tensor) -> float:
    """The largest value of a Linear with a bias, whose input has this norm, and of the pads beside it."""
    bias = layer.bias
    assert isinstance(bias, Tensor)
    return gain(layer, pad.device).row * norm + float(torch.maximum(bias.abs().amax(), pad.abs().amax()))


def largest_of_norms(norms: Sequence[RMSNorm], device: torch.device, scales: Sequence[Tensor] = ()) -> list[float]:
    """√C · max|weight · scale| of each RMS norm: no value of its output is larger, nor the norm of a whole row.

    Worked out on `device`, where the scales are; weights of streamed blocks are still on the host.
    """
    if not norms:
        return []
    weights = [norm.weight.to(device, torch.float32) for norm in norms]
    factors = [w * scale for w, scale in zip(weights, scales, strict=True)] if scales else weights
    largest: list[float] = torch.stack([factor.abs().amax() for factor in factors]).tolist()
    return [math.sqrt(len(norm.weight)) * value for norm, value in zip(norms, largest, strict=True)]


def _input_norms(blocks: Sequence[Block], modulations: Sequence[BlockModulation]) -> list[tuple[float, float]]:
    """Of every block: the largest norms of a row that enters its attention and its feed-forward network."""
    norms = [norm for block in blocks for norm in (block.attention_norm1, block.ffn_norm1)]
    scales = [scale for m in modulations for scale in (m.scale_msa, m.scale_mlp)]
    largest = largest_of_norms(norms, scales[0].device, scales)
    return list(zip(largest[::2], largest[1::2], strict=True))


def _gain(layer: nn.Module, device: torch.device) -> Gain:
    """The gain of a layer. Raises RequestError for one whose weights are too small for fp16."""
    found = gain(layer, device)
    rms = found.whole / math.sqrt(math.prod(sides(layer)))
    if 0 < rms < LEAST_RMS:
        text = f"dtype fp16 would lose digits of weights as small as {rms:.1g} in this DiT; use bf16 or fp32"
        raise RequestError(text, fields=("dtype",))
    return found


def _power(value: float) -> float:
    """The smallest power of two that is at least `value`; 1 for 0, and for NaN and infinity, which others report."""
    return 2.0 ** math.ceil(math.log2(value)) if value and math.isfinite(value) else 1.0
