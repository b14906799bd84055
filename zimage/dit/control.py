"""ControlNets beside the DiT: Z-Image-Turbo-Fun-Controlnet-Union 1.0, 2.0, 2.1, lite and tile (alibaba-pai, 2025).

Shapes: B batch, N image tokens, Np = N padded to a multiple of 32, Lp caption tokens, h × w latents.

A ControlNet has blocks of the DiT's kind, on a stream c of its own, which begins as the embedded control latents. The
DiT has layers at places 0, 1, …; a ControlNet has a block for some of them. With x the DiT's stream:

    c ← before_proj(c) + x          once, where the layers begin
    c ← block(c)                    for each of its places, and there, after the DiT's layer:
    x ← x + scale · after_proj(c)   the hint

So it goes along the joint layers, where c is [image, caption] as x is and its caption part begins as the refined
caption. Before these, along the noise refiner, c has image tokens only, and the forms differ:

    add_control_noise_refiner  form         along the noise refiner
    None                       1.0          two plain blocks refine c; no hints
    "control_layers"           2.0          all blocks of the joint layers, which run again there; hints of the first
    "control_noise_refiner"    2.1 and lite blocks of its own, with hints

Whose x the hints of the noise refiner are added to is the `flow`. In the publisher's they are added to the DiT's own,
so that the joint layers begin with it. In diffusers' they are added to a copy of it, which only c takes in, and the DiT
begins its joint layers without them. The form 1.0 has no such hints, and one flow.

Only c is kept, never all hints. Time embeddings, rotations, captions and pad tokens are the DiT's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from zimage.dit.blocks import Block, BlockModulation, blocks_of, modulations
from zimage.dit.nag import Seen
from zimage.dit.patch import PATCH, embed_patches
from zimage.dit.rope import Rotation
from zimage.errors import ConfigError, RequestError
from zimage.nn.config import (
    Between,
    Channels,
    Epsilon,
    GroupDepth,
    Heads,
    Width,
    check_divides,
    fault,
    read_architecture,
)

Flow = Literal["publisher", "diffusers"]
Places = Annotated[tuple[Annotated[int, Between(0, 255)], ...], Between(1, 256)]
RefinerPlaces = Annotated[tuple[Annotated[int, Between(0, 31)], ...], Between(0, 32)]


class Beside(Protocol):
    """What a ControlNet has to know of the DiT's config."""

    @property
    def dim(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_refiner_layers(self) -> int: ...


@dataclass(frozen=True)
class ControlNetConfig:
    dim: Width
    n_heads: Heads
    n_kv_heads: Heads
    n_refiner_layers: GroupDepth
    norm_eps: Epsilon
    control_in_dim: Channels
    control_layers_places: Places
    control_refiner_layers_places: RefinerPlaces = ()
    add_control_noise_refiner: Literal["control_layers", "control_noise_refiner"] | None = None

    IMPLEMENTED: ClassVar[Mapping[str, tuple]] = {
        "_class_name": ("ZImageControlNetModel",),
        "all_patch_size": ([PATCH], (PATCH,)),
        "all_f_patch_size": ([1], (1,)),
        "qk_norm": (True,),
    }

    def __post_init__(self):
        if self.n_kv_heads != self.n_heads:
            raise fault(type(self), f"n_kv_heads = {self.n_kv_heads} must equal n_heads = {self.n_heads}")
        check_divides(type(self), "n_heads", "dim", self)
        if self.dim // self.n_heads % 2:
            raise fault(type(self), f"dim / n_heads = {self.dim} / {self.n_heads} must be even")
        for key in ("control_layers_places", "control_refiner_layers_places"):
            places = getattr(self, key)
            if list(places) != sorted(set(places)) or places[:1] not in ((), (0,)):
                raise fault(type(self), f"{key} = {list(places)} must begin with 0 and ascend")
        if len(self.control_refiner_layers_places) > self.refiner_depth:
            few = f"names more places than there are blocks ({self.refiner_depth}) along the noise refiner"
            raise fault(type(self), f"control_refiner_layers_places = {list(self.control_refiner_layers_places)} {few}")

    @classmethod
    def read(cls, config: Mapping[str, object]) -> "ControlNetConfig":
        if config.get("control_refiner_layers_places") is None:
            config = {**config, "control_refiner_layers_places": ()}
        return read_architecture(cls, config, cls.IMPLEMENTED)

    @property
    def refiner_depth(self) -> int:
        """How many of its blocks run along the noise refiner."""
        shared = self.add_control_noise_refiner == "control_layers"
        return len(self.control_layers_places) if shared else self.n_refiner_layers

    @property
    def refiner_places(self) -> tuple[int, ...]:
        """The places of hints in the noise refiner."""
        return self.control_refiner_layers_places if self.add_control_noise_refiner else ()

    @property
    def told(self) -> str:
        """What it reads and where it adds, in words."""
        refiner = f", after {len(self.refiner_places)} of the noise refiner" if self.refiner_places else ""
        places = ", ".join(map(str, self.control_layers_places))
        return f"reads {self.control_in_dim} channels, adds after layers {places}{refiner}"

    def check_beside(self, dit: Beside) -> None:
        """Raise ConfigError if a DiT does not have the width, the heads or the layers that this ControlNet is for."""
        for what, wanted, found in (("width", self.dim, dit.dim), ("heads", self.n_heads, dit.n_heads)):
            if wanted != found:
                raise ConfigError(f"the ControlNet is for a DiT of {what} {wanted}; this one has {found}")
        for what, places, found in (
            ("layers", self.control_layers_places, dit.n_layers),
            ("noise refiner layers", self.refiner_places, dit.n_refiner_layers),
        ):
            if places and places[-1] >= found:
                text = f"the ControlNet is for a DiT of at least {places[-1] + 1} {what}; this one has {found}"
                raise ConfigError(text)


class ControlBlock(Block):
    """A block of the DiT, and the projections that take x in (the first block's) and give hints out."""

    def __init__(self, config: ControlNetConfig, is_first: bool):
        super().__init__(config.dim, config.n_heads, config.norm_eps, modulated=True)
        if is_first:
            self.before_proj = nn.Linear(config.dim, config.dim)
        self.after_proj = nn.Linear(config.dim, config.dim)


class ControlModulation(NamedTuple):
    """What the noise level does to a ControlNet's blocks; one row per noise level."""

    refiner: list[BlockModulation]
    layers: list[BlockModulation]

    def step(self, i: int) -> "ControlModulation":
        """The modulation of the i-th noise level alone."""
        return ControlModulation(*([block.level(i) for block in part] for part in self))


class ControlNet(nn.Module):
    """Embeds control latents and holds the blocks; what they do in an evaluation is `ControlStream`'s."""

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        self.config = config
        values = PATCH * PATCH * config.control_in_dim
        self.control_all_x_embedder = nn.ModuleDict({f"{PATCH}-1": nn.Linear(values, config.dim)})
        self.control_layers = _controlled(config, len(config.control_layers_places))
        if config.add_control_noise_refiner == "control_noise_refiner":
            self.control_noise_refiner = _controlled(config, config.n_refiner_layers)
        elif config.add_control_noise_refiner is None:
            self.control_noise_refiner = nn.ModuleList(
                Block(config.dim, config.n_heads, config.norm_eps, True) for _ in range(config.n_refiner_layers)
            )

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Build from the contents of a `config.json`; raises ConfigError."""
        return cls(ControlNetConfig.read(config))

    @property
    def refiner(self) -> nn.ModuleList:
        """The blocks along the noise refiner."""
        return (
            self.control_layers
            if self.config.add_control_noise_refiner == "control_layers"
            else self.control_noise_refiner
        )

    def blocks(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """The modules that run one after another, each with the weights that its forward reads: no projections."""
        refiner = [] if self.refiner is self.control_layers else [*self.refiner]
        for block in (*refiner, *self.control_layers):
            yield (
                block,
                [
                    weight
                    for name, weight in block.named_parameters()
                    if not name.startswith(("adaLN", "before", "after"))
                ],
            )

    def leaves_out(self, key: str) -> bool:
        """Whether a file's tensor is one that this form does not use: 2.0 has a refiner that was never trained."""
        return self.refiner is self.control_layers and key.startswith("control_noise_refiner.")

    def embed(self, latents: Tensor, pad: Tensor) -> Tensor:
        """Tokens (B, Np, dim) of control latents (B, 16 or 33, h, w); `pad` (1, dim) is the DiT's `x_pad_token`.

        33 channels are 16 of the control picture, a mask (1 = keep) and 16 of the masked picture; the last 17 are zeros
        where nothing is masked. They do not change during a run. Raises RequestError.
        """
        return embed_patches(latents, self.config.control_in_dim, self.control_all_x_embedder[f"{PATCH}-1"], pad)

    def modulate(self, time: Tensor) -> ControlModulation:
        """The modulations of all blocks at the DiT's time embeddings (B, 256)."""
        layers = modulations(self.control_layers, time)
        shared = self.refiner is self.control_layers
        return ControlModulation(layers if shared else modulations(self.refiner, time), layers)


def _controlled(config: ControlNetConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(ControlBlock(config, is_first=not i) for i in range(count))


class Controlled(NamedTuple):
    """One control in one evaluation."""

    net: ControlNet
    tokens: Tensor  # (B or 1, Np, dim) from `embed`
    modulation: ControlModulation  # of this noise level
    scale: float = 1.0  # of its hints; with 0 the evaluation is the one without it, to the bit
    flow: Flow = "publisher"

    def step(self, i: int) -> "Controlled":
        """That of the i-th noise level, where `modulation` has those of a whole run."""
        return self._replace(modulation=self.modulation.step(i))


class ControlStream:
    """One control's way through one evaluation: the stream c, and the blocks that it has to pass.

    It begins along the noise refiner, with the DiT's embedded image tokens (B, Np, dim), and goes on along the joint
    layers with `join`.
    """

    def __init__(self, control: Controlled, image: Tensor, rotation: Rotation):
        self.control = control
        net, m = control.net, control.modulation
        if control.tokens.shape[1:] != image.shape[1:] or len(control.tokens) not in (1, len(image)):
            shapes = f"{tuple(control.tokens.shape)} do not fit the image's {tuple(image.shape)}"
            raise RequestError(f"the tokens of a control picture {shapes}; it must be of the same size")
        self._c = control.tokens.expand(len(image), -1, -1)
        self._begin(net.refiner, m.refiner, net.config.refiner_places, image, rotation, None)

    @property
    def is_apart(self) -> bool:
        """Whether its hints in the noise refiner go to a copy of the DiT's stream."""
        return self.control.flow == "diffusers" and bool(self.control.net.config.refiner_places)

    def join(self, x: Tensor, caption: Tensor, rotation: Rotation, seen: Seen) -> None:
        """Go on to the joint layers, where x (B, Np + Lp, dim) begins and `caption` (B, Lp, dim) is refined."""
        net, m = self.control.net, self.control.modulation
        while self._passed < len(self._blocks):
            self._pass()
        self._c = torch.cat((self._c, caption), dim=1)
        self._begin(net.control_layers, m.layers, net.config.control_layers_places, x, rotation, seen)

    def advance(self, place: int) -> None:
        """Pass the block of this place, if there is one; called before the DiT's layer."""
        if place in self._places:
            self._pass()

    def add_hint(self, place: int, x: Tensor) -> Tensor:
        """x with the hint of this place, if there is one; called after the DiT's layer."""
        if place not in self._places:
            return x
        hint = self._blocks[self._places.index(place)].get_submodule("after_proj")(self._c)
        return torch.add(x, hint, alpha=self.control.scale)

    def _begin(
        self,
        blocks: nn.ModuleList,
        modulation: Sequence[BlockModulation],
        places: tuple[int, ...],
        x: Tensor,
        rotation: Rotation,
        seen: Seen,
    ) -> None:
        self._blocks, self._modulation, self._places = blocks_of(blocks), modulation, places
        self._rotation, self._seen, self._passed = rotation, seen, 0
        if isinstance(first := self._blocks[0], ControlBlock):
            self._c = first.before_proj(self._c) + x

    def _pass(self) -> None:
        block, m = self._blocks[self._passed], self._modulation[self._passed]
        self._c = block(self._c, self._rotation, self._seen, m)
        self._passed += 1


def check_dtype(dtype: torch.dtype) -> None:
    """Raise RequestError for fp16: the reach of hints is not bounded, so nothing keeps them within its range."""
    if dtype is torch.float16:
        raise RequestError("a ControlNet does not run in dtype fp16; use bf16 or fp32", fields=("control", "dtype"))
