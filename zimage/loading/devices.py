"""Where components run and what they compute in: devices and dtypes by name, checked against the machine."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from zimage.errors import RequestError, quoted
from zimage.settings.declared import LoadSettings

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Place(NamedTuple):
    """Where a component runs, and what it computes in."""

    device: torch.device
    dtype: torch.dtype


def choose_places(names: Iterable[str], settings: LoadSettings, dtype: str | torch.dtype | None) -> dict[str, Place]:
    """The place of each component: its own device if one is named, and the dtype that suits it. Raises RequestError."""
    places = {}
    for name in names:
        own = f"{name}_device"
        field = own if getattr(settings, own, None) else "device"
        device = choose_device(getattr(settings, field), field)
        places[name] = Place(device, choose_dtype(dtype, device))
    return places


def device_names(places: Mapping[str, Place]) -> str:
    """The device's type, or each component's where they differ."""
    kinds = {name: place.device.type for name, place in places.items()}
    alike = set(kinds.values())
    return alike.pop() if len(alike) == 1 else ", ".join(f"{name} {kind}" for name, kind in kinds.items())


def choose_device(name: str, setting: str = "device") -> torch.device:
    """A device by name; "auto" takes a GPU if there is one. Raises RequestError for a device that is not here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        text = f"{setting} {quoted(name)} is not known; use auto, cpu, cuda, cuda:N or mps"
        raise RequestError(text, fields=(setting,)) from None
    present = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type):
        raise RequestError(f"{setting} {quoted(name)} is not on this machine; use auto or cpu", fields=(setting,))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations: bf16 where the device computes in it, unless one is named."""
    if dtype is None:
        native = device.type == "cuda" or (device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return torch.bfloat16 if native else torch.float32
    chosen = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if chosen in (torch.float16, "fp16", "float16"):
        text = "dtype fp16 overflows in this model (activations reach 344,000); use bf16 or fp32"
        raise RequestError(text, fields=("dtype",))
    if chosen not in (torch.bfloat16, torch.float32, torch.float64):
        raise RequestError(f"dtype {quoted(dtype)} is not known; use {' or '.join(DTYPES)}", fields=("dtype",))
    return chosen
