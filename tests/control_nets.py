"""Tiny ControlNets of every published form, and a tiny DiT that they go with."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import DIT as SMALL
from tiny import randomised
from torch import Tensor

from zimage.dit import ControlNet, ZImageDiT
from zimage.dit.control import Controlled, ControlStream
from zimage.dit.rope import Rotation

DIT = {**SMALL, "n_layers": 5, "n_refiner_layers": 2}
_SHARED = {"_class_name": "ZImageControlNetModel", "qk_norm": True, "all_patch_size": [2], "all_f_patch_size": [1]}
_SIZES = {key: DIT[key] for key in ("dim", "n_heads", "n_kv_heads", "n_refiner_layers", "norm_eps")}


def _form(places: list[int], channels: int, refiner: str | None, refiner_places: list[int] | None) -> dict[str, Any]:
    return {
        **_SHARED,
        **_SIZES,
        "control_layers_places": places,
        "control_in_dim": channels,
        "add_control_noise_refiner": refiner,
        "control_refiner_layers_places": refiner_places,
    }


FORMS = {
    "1.0": _form([0, 3], 16, None, None),
    "2.0": _form([0, 2, 4], 33, "control_layers", [0, 1]),
    "2.1": _form([0, 2, 4], 33, "control_noise_refiner", [0, 1]),
    "lite": _form([0, 2], 33, "control_noise_refiner", [0, 1]),
}
BESIDE_TINY = {"n_refiner_layers": 1, "control_layers_places": [0, 1], "control_refiner_layers_places": [0]}
PUBLISHED = {
    form: {**config, "dim": 3840, "n_heads": 30, "n_kv_heads": 30, "control_layers_places": places}
    for (form, config), places in zip(
        FORMS.items(), ([0, 5, 10, 15, 20, 25], list(range(0, 30, 2)), list(range(0, 30, 2)), [0, 10, 20]), strict=True
    )
}


def dit(seed: int = 1, **changes: Any) -> ZImageDiT:
    return randomised(ZImageDiT.from_config({**DIT, **changes}), seed).eval().requires_grad_(False)


def net(form: str, seed: int = 2, **changes: Any) -> ControlNet:
    return randomised(ControlNet.from_config({**FORMS[form], **changes}), seed).eval().requires_grad_(False)


def write(folder: Path, form: str, seed: int = 2, **changes: Any) -> Path:
    """A component folder of a net; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**FORMS[form], **changes}))
    save_file(net(form, seed, **changes).state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


def control_latents(config: dict[str, Any], batch: int, h: int, w: int, seed: int = 5) -> Tensor:
    return torch.randn(batch, config["control_in_dim"], h, w, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def hints(net: ControlNet) -> list[Tensor]:
    """All hints of an evaluation beside a DiT whose tokens are random: in the noise refiner, then in its layers."""
    generator, config = torch.Generator().manual_seed(9), net.config
    image, x, caption = (torch.randn(1, n, config.dim, generator=generator) for n in (32, 64, 32))
    angle = 6 * torch.rand(1, 64, config.dim // config.n_heads // 2, generator=generator)
    turn, image_turn = Rotation(angle.cos(), angle.sin()), Rotation(angle[:, :32].cos(), angle[:, :32].sin())
    time, pad = torch.randn(1, min(config.dim, 256), generator=generator), torch.zeros(1, config.dim)
    latents = torch.randn(1, config.control_in_dim, 6, 10, generator=generator)
    stream = ControlStream(Controlled(net, net.embed(latents, pad), net.modulate(time), 0.8), image, image_turn)
    found = [_hint(stream, place, image) for place in config.refiner_places]
    stream.join(x, caption, turn, None)
    return found + [_hint(stream, place, x) for place in config.control_layers_places]


def _hint(stream: ControlStream, place: int, x: Tensor) -> Tensor:
    stream.advance(place)
    return stream.add_hint(place, torch.zeros_like(x))
