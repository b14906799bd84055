"""What of a model stays in memory and when: decided before anything is loaded, from sizes alone.

The peak of a stage is the weights held meanwhile plus its activations, which each model estimates for itself.
"""

from collections.abc import Iterable

import torch

from zimage.components import Model
from zimage.errors import RequestError
from zimage.nn.quant import quantised_bytes
from zimage.runtime.memory import available_memory
from zimage.settings import BLEND_TILE, SIZE_MULTIPLE, LoadSettings, Request

KEEP_SHARE = 0.5  # all stages stay loaded when their weights fit in this share of the free memory


class MemoryPlan:
    """`keeps_loaded`: all stages' weights stay; otherwise each is loaded in its turn."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, settings: LoadSettings):
        self.model, self.device, self.dtype, self.precision = model, device, dtype, settings.precision
        room = KEEP_SHARE * available_memory(device)
        wide = {name: c.weight_bytes(dtype) for name, c in model.components.items()}
        # A CPU without bf16 arithmetic runs bf16 files in fp32; casting them whole would double their memory.
        self._widened_late = {
            name
            for name, c in model.components.items()
            if device.type == "cpu" and wide[name] > max(room, 1.5 * c.checkpoint.stored_bytes())
        }
        weights = sum(map(self.weight_bytes, model.components))
        self.keeps_loaded = settings.residency == "keep" or (settings.residency == "auto" and weights <= room)

    def widens_late(self, name: str) -> bool:
        """Whether a component's weights stay as stored and are widened when used."""
        return name in self._widened_late

    def weight_bytes(self, name: str) -> int:
        """Bytes that the weights of a component take when loaded."""
        if name == "dit" and self.precision != "bf16":
            return quantised_bytes(self.model.skeleton("dit"), self.precision, self.dtype)
        return self.model.components[name].weight_bytes(self.dtype, self.widens_late(name))

    def stage_bytes(self, request: Request) -> dict[str, int]:
        """Estimated peak of each stage of a resolved request."""
        image_tokens = request.width * request.height // SIZE_MULTIPLE**2
        work = {
            "text_encoder": 0,
            "dit": self.model.skeleton("dit").activation_bytes(image_tokens, self.dtype) * request.batch_size,
            "vae": self._decode_bytes(request.width, request.height, request.tile_mode, request.tile_size),
        }
        return {name: work[name] + sum(map(self.weight_bytes, self._held(name))) for name in work}

    def tile_mode(self, width: int, height: int, loaded: Iterable[str]) -> str:
        """How to decode a picture: "off" (whole) where that fits beside the weights held meanwhile, else "exact"."""
        room = self._free_bytes(loaded) - sum(map(self.weight_bytes, self._held("vae")))
        return "off" if self._decode_bytes(width, height, "off", None) <= room else "exact"

    def check(self, request: Request, loaded: Iterable[str]) -> None:
        """Refuse a size whose peak exceeds the memory, with the figures. Raises RequestError."""
        stage, peak = max(self.stage_bytes(request).items(), key=lambda item: item[1])
        free = self._free_bytes(loaded)
        if peak > free:
            too_large = self.weight_bytes(stage) > free
            raise RequestError(
                f"{request.width}×{request.height} needs about {peak / 1e9:.1f} GB in the {stage} stage; "
                f"{free / 1e9:.1f} GB are free on {self.device}; "
                + ("its weights alone are larger" if too_large else "choose a smaller size")
            )

    def _held(self, stage: str) -> list[str]:
        """Components in memory during a stage."""
        return list(self.model.components) if self.keeps_loaded else [stage]

    def _free_bytes(self, loaded: Iterable[str]) -> int:
        """Free memory if everything loaded were let go."""
        return available_memory(self.device) + sum(map(self.weight_bytes, loaded))

    def _decode_bytes(self, width: int, height: int, mode: str, tile_size: int | None) -> int:
        vae = self.model.skeleton("vae")

        def whole(pixels: int) -> int:
            return vae.activation_bytes(pixels, self.dtype)

        if mode == "exact":
            strip = whole(width * tile_size) if tile_size else 0
            return min(vae.tiled_bytes(width * height, self.dtype) + strip, whole(width * height))
        if mode == "blend":
            return whole(min(width * height, (tile_size or BLEND_TILE) ** 2)) + 16 * width * height  # and the canvas
        return whole(width * height)
