"""Which components run from CUDA graphs, and why others do not."""

import logging

import torch
from torch import nn

from zimage.dit.model import ZImageDiT
from zimage.dit.replay import replay_velocity
from zimage.loading.registry import DIT, ROWS
from zimage.nn.graphs import CudaGraphs, use_graphs
from zimage.text.qwen3 import Qwen3

log = logging.getLogger("zimage")

WAITING = ("xformers", "sage")  # attention that may wait for the GPU or allocate by what it finds


def give_graphs(name: str, module: nn.Module, device: torch.device, attention: str, streamed: bool) -> None:
    """Let a loaded component run from graphs; one line says why one cannot. The VAE's work is never launch-bound."""
    if not isinstance(module, ZImageDiT | Qwen3):
        return
    if obstacle := _obstacle(name, device, attention, streamed):
        log.warning("%s runs without CUDA graphs, since %s", ROWS[name].title, obstacle)
    elif isinstance(module, ZImageDiT):
        replay_velocity(module, CudaGraphs(device))
    else:
        use_graphs(module, CudaGraphs(device))


def _obstacle(name: str, device: torch.device, attention: str, streamed: bool) -> str | None:
    if device.type != "cuda":
        return f"its device is {device.type}"
    if streamed:
        return "its blocks are streamed, so that their weights move"
    if name == DIT and attention in WAITING:
        return f"attention {attention!r} may wait for the GPU"
    return None
