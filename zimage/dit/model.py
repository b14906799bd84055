"""The single-stream DiT of Z-Image (Tongyi-MAI 2025), and its context refiner, which can be used alone.

Shapes: B batch, L caption tokens, Lp = L padded to a multiple of 32, N image tokens, Np likewise, D head size,
C = 16 latent channels, h × w latents. σ is the noise level: 1 = pure noise, 0 = clean.

Data flow of one denoising run:

    captions → refine (once per prompt) ─┐
    sizes ───────────────────────────────┴→ context (once per image)
    all σ ───────────────────────────────→ modulate (once per run)
    latents, modulation.step(i), context → velocity (once per step)

ControlNets run beside it: see `zimage.dit.control`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zimage.dit import reach
from zimage.dit.blocks import Block, BlockModulation, FinalLayer, TimeEmbedder, blocks_of, modulations
from zimage.dit.context import Context, away_from, context_of, stacked
from zimage.dit.control import Controlled, ControlStream, check_dtype
from zimage.dit.nag import Seen
from zimage.dit.patch import PATCH, SEQUENCE_MULTIPLE, embed_patches, padded_length, unpatchify
from zimage.dit.rope import Rotation, caption_positions, rotation
from zimage.dit.units import PLAIN, Units
from zimage.errors import RequestError
from zimage.nn.attention import Padding
from zimage.nn.config import (
    Between,
    Channels,
    Depth,
    Epsilon,
    GroupDepth,
    Heads,
    HeadSize,
    Positive,
    Width,
    fault,
    read_architecture,
)
from zimage.nn.layers import RMSNorm

Positions = Annotated[int, Between(1, 1 << 20)]  # along one axis


@dataclass(frozen=True)
class ZImageDiTConfig:
    dim: Width
    n_layers: Depth
    n_refiner_layers: GroupDepth
    n_heads: Heads
    n_kv_heads: Heads
    in_channels: Channels
    cap_feat_dim: Width
    axes_dims: tuple[HeadSize, HeadSize, HeadSize]  # of a head, for sequence, row and column
    axes_lens: tuple[Positions, Positions, Positions]
    rope_theta: Positive
    norm_eps: Epsilon
    t_scale: Positive

    IMPLEMENTED: ClassVar[Mapping[str, tuple]] = {
        "_class_name": ("ZImageTransformer2DModel",),
        "all_patch_size": ([PATCH], (PATCH,)),
        "all_f_patch_size": ([1], (1,)),
        "qk_norm": (True,),
        "siglip_feat_dim": (None,),
    }

    def __post_init__(self):
        if self.n_kv_heads != self.n_heads:
            raise fault(type(self), f"n_kv_heads = {self.n_kv_heads} must equal n_heads = {self.n_heads}")
        if sum(self.axes_dims) * self.n_heads != self.dim:
            text = f"must add up to dim / n_heads = {self.dim} / {self.n_heads}"
            raise fault(type(self), f"axes_dims = {list(self.axes_dims)} {text}")
        if self.max_caption_tokens < 1:
            least = f"must begin with at least {SEQUENCE_MULTIPLE + 2}, the positions of the shortest caption"
            raise fault(type(self), f"axes_lens = {list(self.axes_lens)} {least}")

    @classmethod
    def read(cls, config: Mapping[str, object]) -> "ZImageDiTConfig":
        return read_architecture(cls, config, cls.IMPLEMENTED)

    @property
    def max_caption_tokens(self) -> int:
        """The longest caption that stays inside the trained positions: 1504 as published.

        Positions start at 1, Lp is a multiple of 32 and the image is at Lp + 1, which must be below axes_lens[0].
        """
        return (self.axes_lens[0] - 2) // SEQUENCE_MULTIPLE * SEQUENCE_MULTIPLE


@dataclass(frozen=True)
class Modulation:
    """What the noise level does to every block; one row per noise level."""

    noise_refiner: list[BlockModulation]
    layers: list[BlockModulation]
    final: Tensor  # (B, 1, dim)
    units: Units = PLAIN  # of all blocks

    def step(self, i: int) -> "Modulation":
        """The modulation of the i-th noise level alone."""

        refiner, layers = ([block.level(i) for block in part] for part in (self.noise_refiner, self.layers))
        return Modulation(refiner, layers, self.final[i : i + 1], self.units)


class CaptionStream(nn.Module):
    """What the context refiner and the DiT share: the layers that refine captions.

    With `in_half`, matrices of blocks are fp16, and so are the activations in blocks, held in units; all else is fp32.
    """

    in_half = False

    def __init__(self, config: ZImageDiTConfig):
        super().__init__()
        self.config = config
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps), nn.Linear(config.cap_feat_dim, config.dim)
        )
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.context_refiner = _blocks(config, config.n_refiner_layers, modulated=False)
        self.gradient_checkpointing = False

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Build from the contents of `transformer/config.json`; raises ConfigError."""
        return cls(ZImageDiTConfig.read(config))

    def refine(self, captions: Sequence[Tensor]) -> list[Tensor]:
        """Refined tokens (Lp, dim) of each caption (L, caption width), run one by one: no result depends on another."""
        return [self._refine_padded([caption])[0][0] for caption in captions]

    def _refine_padded(self, captions: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """All captions in one padded batch (B, max Lp, dim), fp32 with `in_half`, and their Lp."""
        lengths = [padded_length(len(caption)) for caption in captions]
        tokens = torch.stack([self._embed(c, n, max(lengths)) for c, n in zip(captions, lengths, strict=True)])
        turn = self._rotation(caption_positions(max(lengths))[None])
        padding = Padding.of(lengths, tokens.device)
        units, modulations = self._unmodulated()
        x = units.enter(tokens)
        for block, m in zip(self.context_refiner, modulations, strict=True):
            x = self._run(block, x, turn, padding, m, units)
        return units.leave(x), lengths

    def _unmodulated(self) -> tuple[Units, list[BlockModulation] | list[None]]:
        """The units of the context refiner, and the modulations that put its blocks in them."""
        blocks = blocks_of(self.context_refiner)
        if not self.in_half:
            return PLAIN, [None] * len(blocks)
        neutral = [reach.unmodulated(block, self.cap_pad_token.device) for block in blocks]
        units = reach.units(blocks, neutral, self._caption_reach())
        return units, [reach.in_units(m, units) for m in neutral]

    def _caption_reach(self) -> float:
        """The largest value of an embedded caption."""
        norm, linear = self.cap_embedder
        assert isinstance(norm, RMSNorm)
        (largest,) = reach.largest_of_norms([norm], self.cap_pad_token.device)
        return reach.embedded(linear, largest, self.cap_pad_token)

    def _embed(self, caption: Tensor, length: int, batch_length: int) -> Tensor:
        """(L, caption width) → (batch_length, dim): learned pads up to `length`, zeros (masked) from there."""
        if caption.ndim != 2 or caption.shape[1] != self.config.cap_feat_dim or not len(caption):
            raise RequestError(
                f"a caption of shape {tuple(caption.shape)} does not fit; "
                f"it must be (tokens, {self.config.cap_feat_dim})"
            )
        tokens = self.cap_embedder(caption.to(self.cap_pad_token))
        pads = self.cap_pad_token.expand(length - len(tokens), -1)
        return F.pad(torch.cat((tokens, pads)), (0, 0, 0, batch_length - length))

    def _rotation(self, positions: Tensor) -> Rotation:
        turn = rotation(positions, self.config.axes_dims, self.config.rope_theta)
        return Rotation(*(part.to(self.cap_pad_token.device) for part in turn))

    def _run(self, block: nn.Module, *args: object) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class ContextRefiner(CaptionStream):
    """Caption embeddings → refined caption tokens. It sees neither time nor image, so it runs once per prompt."""

    forward = CaptionStream.refine


class ZImageDiT(CaptionStream):
    """Predicts the velocity dx/dσ of noisy latents: the layers of a ContextRefiner, and the image stream."""

    def __init__(self, config: ZImageDiTConfig):
        super().__init__(config)
        values = PATCH * PATCH * config.in_channels
        key = f"{PATCH}-1"  # spatial and temporal patch size
        self.all_x_embedder = nn.ModuleDict({key: nn.Linear(values, config.dim)})
        self.all_final_layer = nn.ModuleDict({key: FinalLayer(config.dim, values)})
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.t_embedder = TimeEmbedder(min(config.dim, 256), config.t_scale)
        self.noise_refiner = _blocks(config, config.n_refiner_layers, modulated=True)
        self.layers = _blocks(config, config.n_layers, modulated=True)

    @property
    def x_embedder(self) -> nn.Module:
        return self.all_x_embedder[f"{PATCH}-1"]

    @property
    def final_layer(self) -> FinalLayer:
        layer = self.all_final_layer[f"{PATCH}-1"]
        assert isinstance(layer, FinalLayer)
        return layer

    def blocks(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """The modules that run one after another, in that order, each with the weights that its forward reads.

        Without the weights of the modulations: `modulate` reads those of all blocks before the first step.
        """
        for block in (*self.context_refiner, *self.noise_refiner, *self.layers):
            yield block, [weight for name, weight in block.named_parameters() if "adaLN" not in name]

    def forward(self, latents: Tensor, sigma: Tensor, captions: Sequence[Tensor]) -> Tensor:
        """Velocity (B, C, h, w) fp32 of latents (B, C, h, w) at noise levels σ (B,) and B captions (L, caption width).

        x += (σ′ − σ) · velocity takes x from σ to σ′. The batch runs at once; unequal captions are padded and masked.
        """
        refined, lengths = self._refine_padded(captions)
        h, w = latents.shape[-2:]
        context = context_of(refined, lengths, h, w, self._rotation)
        return self.velocity(latents, self.modulate(sigma), context)

    def modulate(self, sigma: Tensor) -> Modulation:
        """The modulations of all blocks at noise levels σ (B,)."""
        time = self.time(sigma)
        modulation = Modulation(
            modulations(self.noise_refiner, time), modulations(self.layers, time), self.final_layer.modulate(time)
        )
        return self._in_units(modulation) if self.in_half else modulation

    def time(self, sigma: Tensor) -> Tensor:
        """The time embeddings (B, 256) of noise levels σ (B,)."""
        return self.t_embedder(1 - sigma.to(self.x_pad_token.device, torch.float32))

    def _in_units(self, m: Modulation) -> Modulation:
        """The modulation that holds the activations of all blocks in units."""
        refiner, layers, context = map(blocks_of, (self.noise_refiner, self.layers, self.context_refiner))
        image = reach.embedded(self.x_embedder, self._patch_norm(), self.x_pad_token)
        entry = max(image, self._caption_reach() + reach.branches(context, self.x_pad_token.device))
        units = reach.units([*refiner, *layers], [*m.noise_refiner, *m.layers], entry)
        first, then = ([reach.in_units(block, units) for block in part] for part in (m.noise_refiner, m.layers))
        return Modulation(first, then, m.final, units)

    def _patch_norm(self) -> float:
        """The largest norm of an image token's latents."""
        return reach.LATENTS * (PATCH * PATCH * self.config.in_channels) ** 0.5

    def context(self, refined: Sequence[Tensor], h: int, w: int) -> Context:
        """The step-invariant part for images of h × w latents with refined captions (Lp, dim) each."""
        return context_of(*stacked(refined), h, w, self._rotation)

    def context_away(
        self, refined: Sequence[Tensor], negative: Sequence[Tensor], scale: float, h: int, w: int
    ) -> Context:
        """The same with normalised attention guidance (`dit.nag`) away from as many refined negative captions."""
        tokens, lengths = stacked(refined)
        context = context_of(tokens, lengths, h, w, self._rotation)
        return away_from(negative, context, lengths, scale, self._rotation, self.in_half)

    def velocity(
        self,
        latents: Tensor,
        modulation: Modulation,
        context: Context,
        controls: Sequence[Controlled] = (),
        skipped: Collection[int] = (),
    ) -> Tensor:
        """One evaluation: velocity (B, C, h, w) fp32 of latents (B, C, h, w). What `controls` add adds up.

        It goes without those of the `layers` that are `skipped`; hints that belong to their places stay.
        """
        units = modulation.units
        image = units.enter(self.embed(latents))
        streams = self._streams(image, modulation, context, controls)
        hinting = [stream for stream in streams if not stream.is_apart]
        # In place of a function for both loops: its caller would hold the x that it began with, a map more at the peak.
        for place, (block, m) in enumerate(zip(self.noise_refiner, modulation.noise_refiner, strict=True)):
            image = self._pass(place, block, image, context.image_rotation, None, m, units, hinting)
        x = torch.cat((image, units.enter(context.tokens)), dim=1)  # (B, Np + Lp, dim)
        for stream in hinting:
            stream.join(x, context.tokens, context.rotation, context.seen)
        for place, (block, m) in enumerate(zip(self.layers, modulation.layers, strict=True)):
            layer = None if place in skipped else block
            x = self._pass(place, layer, x, context.rotation, context.seen, m, units, streams)
        h, w = latents.shape[-2:]
        patches = self.project(x, modulation, (h // PATCH) * (w // PATCH))
        return -unpatchify(patches, h, w, PATCH).float()  # the model predicts the opposite direction

    def embed(self, latents: Tensor, part: slice = slice(None)) -> Tensor:
        """Image tokens (B, Np, dim) of latents (B, C, h, w), or a part of the Np."""
        return embed_patches(latents, self.config.in_channels, self.x_embedder, self.x_pad_token, part)

    def project(self, x: Tensor, modulation: Modulation, count: int) -> Tensor:
        """Patch values (B, N, 4·C) of a stream (B, Np + Lp, dim), whose first `count` = N tokens are the image's."""
        return self.final_layer(modulation.units.leave(x[:, :count]), modulation.final)

    def _streams(
        self, image: Tensor, modulation: Modulation, context: Context, controls: Sequence[Controlled]
    ) -> list[ControlStream]:
        """The streams of those controls that have a say, begun at embedded image tokens (B, Np, dim).

        Those whose hints in the noise refiner go to a copy have been through that, and have joined the layers.
        """
        streams = [ControlStream(control, image, context.image_rotation) for control in controls if control.scale]
        if streams:
            check_dtype(image.dtype)
        for stream in streams:
            if stream.is_apart:
                copy = image
                for place, (block, m) in enumerate(zip(self.noise_refiner, modulation.noise_refiner, strict=True)):
                    copy = self._pass(place, block, copy, context.image_rotation, None, m, modulation.units, [stream])
                joint = torch.cat((copy, context.tokens), dim=1)
                stream.join(joint, context.tokens, context.rotation, context.seen)
        return streams

    def _pass(
        self,
        place: int,
        block: nn.Module | None,
        x: Tensor,
        turn: Rotation,
        seen: Seen,
        modulation: BlockModulation,
        units: Units,
        streams: Sequence[ControlStream],
    ) -> Tensor:
        """x (B, L, dim) after the block of this place, if it is run, with the hints that belong to it."""
        for stream in streams:
            stream.advance(place)
        x = x if block is None else self._run(block, x, turn, seen, modulation, units)
        for stream in streams:
            x = stream.add_hint(place, x)
        return x


def _blocks(config: ZImageDiTConfig, count: int, modulated: bool) -> nn.ModuleList:
    return nn.ModuleList(Block(config.dim, config.n_heads, config.norm_eps, modulated) for _ in range(count))
