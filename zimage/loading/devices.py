"""Where components run and what they compute in: devices and dtypes by name, checked against the machine."""

import logging
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import torch

from zimage.errors import RequestError, quoted
from zimage.loading import gpus
from zimage.loading.registry import ROWS
from zimage.settings.loading import LoadSettings

log = logging.getLogger("zimage")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16, "fp32": torch.float32}
BF16_CAPABILITY = (8, 0)  # of GPUs with bf16 arithmetic; older ones compute in fp16


class Place(NamedTuple):
    """Where a component runs, and what it computes in."""

    device: torch.device
    dtype: torch.dtype


def choose_places(names: Iterable[str], settings: LoadSettings, dtype: str | torch.dtype | None) -> dict[str, Place]:
    """The place of each component: its own device if one is named, and the dtype that suits it. Raises RequestError."""
    places = {}
    for name in names:
        own = f"{ROWS[name].placed_with or name}_device"
        field = own if getattr(settings, own, None) else "device"
        device = choose_device(getattr(settings, field), field)
        places[name] = Place(device, choose_dtype(dtype, device, ROWS[name].in_half))
    return places


def device_names(places: Mapping[str, Place]) -> str:
    """The device's type, or each component's where they differ."""
    kinds = {name: place.device.type for name, place in places.items()}
    alike = set(kinds.values())
    return alike.pop() if len(alike) == 1 else ", ".join(f"{name} {kind}" for name, kind in kinds.items())


def choose_device(name: str, setting: str = "device") -> torch.device:
    """A device by name; "auto" takes a GPU that can be used. Raises RequestError for a device that cannot."""
    if name == "auto":
        return _automatic()
    try:
        device = torch.device(name)
    except RuntimeError:
        text = f"{setting} {quoted(name)} is not known; use auto, cpu, cuda, cuda:N or mps"
        raise RequestError(text, fields=(setting,)) from None
    if device.type == "cuda" and torch.cuda.is_available() and device.index is None:
        device = torch.device("cuda", gpus.current())
    present = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type):
        why = gpus.why_none() if device.type == "cuda" else ""
        text = f"cannot be used: {why}" if why else "is not on this machine; use auto or cpu"
        raise RequestError(f"{setting} {quoted(name)} {text}", fields=(setting,))
    if device.type == "cuda" and (why := gpus.why_not(device.index)):
        raise RequestError(f"{setting} {quoted(name)} cannot be used: {why}", fields=(setting,))
    return torch.device("cpu") if device.type == "cpu" else device


def _automatic() -> torch.device:
    """The current GPU, else another that can be used, else the CPU; a line says why a GPU that is here is not used."""
    if torch.cuda.is_available():
        first = gpus.current()
        others = [i for i in range(torch.cuda.device_count()) if i != first]
        reasons = {i: gpus.why_not(i) for i in (first, *others)}
        for index, reason in reasons.items():
            if not reason:
                return torch.device("cuda", index)
        _warn(f"no GPU is used: {reasons[first]}")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if why := gpus.why_none():
        _warn(f"the GPU is not used: {why}")
    return torch.device("cpu")


@cache
def _warn(text: str) -> None:
    """Once, and not for each component."""
    log.warning("%s", text)


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device, in_half: bool = False) -> torch.dtype:
    """The dtype in which a component computes: the one that is named, else the device's own.

    A component that does not compute in fp16 (`in_half`) takes fp32 in its place.
    """
    chosen = _native(device) if dtype is None else DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if chosen not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise RequestError(f"dtype {quoted(dtype)} is not known; use {', '.join(DTYPES)}", fields=("dtype",))
    return torch.float32 if chosen is torch.float16 and not in_half else chosen


def _native(device: torch.device) -> torch.dtype:
    """What a device computes in: bf16 where it can, else fp16 on a GPU of NVIDIA's and fp32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= BF16_CAPABILITY else torch.float16
    return torch.bfloat16 if _computes_in_bf16(device) else torch.float32


def _computes_in_bf16(device: torch.device) -> bool:
    """A CPU with the instructions, or a Mac's GPU from macOS 14 on."""
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
