"""Full-size components of random weights, made on the device from a seed, and what one call of them costs."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.card.rows import Row
from bench.timing import timed
from bench.weights import COMPONENTS, random_weight
from zimage.loading.plan import Workload
from zimage.loading.weights import half_matrices, held_as
from zimage.loading.work import dit_bytes
from zimage.nn.quant import quantise

TOKENS = 32  # of a caption


def random_model(name: str, device: torch.device, precision: str = "bf16", config: dict | None = None) -> Any:
    """A component of the published size, or of another config, with random weights; `precision` is of the DiT."""
    free(device)
    cls, published, _ = COMPONENTS[name]
    with torch.device("meta"):
        model: nn.Module = cls.from_config(config or published)
    model = (in_half(model) if precision == "fp16" else model.bfloat16()).to_empty(device=device)
    model.requires_grad_(False).eval()
    fill(model)
    if precision in ("int8", "fp8"):
        quantise(model, precision)
    return model


def in_half(model: Any) -> Any:
    """A DiT on meta that computes in fp16, as one that is loaded so: matrices of blocks in fp16, the rest in fp32."""
    half = half_matrices(model)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(held_as(name, torch.float16, half))
    model.in_half = True
    return model


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give a model on a device random weights from a seed."""
    torch.manual_seed(seed)
    for key, weight in model.named_parameters():
        weight.copy_(random_weight(key, weight.shape, weight.device))


def a_step(dit: Any, size: int, device: torch.device, tokens: int = TOKENS) -> Callable[[], Any]:
    """One evaluation of the DiT for a picture of `size` × `size` pixels, ready to be called."""
    caption = torch.randn(tokens, dit.config.cap_feat_dim, device=device).bfloat16()
    latents = torch.randn(1, 16, size // 8, size // 8, device=device)
    modulation = dit.modulate(torch.tensor([0.7]))
    context = dit.context(dit.refine([caption]), size // 8, size // 8)
    return lambda: dit.velocity(latents, modulation, context)


def step_bytes(dit: Any, size: int) -> int:
    """What the plan counts with for a step, beside the weights."""
    return dit_bytes(dit.config, Workload(size, size, TOKENS), torch.bfloat16)


def costs(call: Callable[[], Any], planned: int, device: torch.device, repeats: int, seconds: float = 1.5) -> Row:
    """Milliseconds of a call, and its peak of memory beside what the plan counts with."""
    row: Row = {"planned_mb": round(planned / 1e6)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        row["peak_mb"] = round((torch.cuda.max_memory_allocated(device) - before) / 1e6)
    timing = timed(call, device, repeats, seconds)
    return {"ms": timing.ms, "range_ms": [timing.least, timing.most], "calls": timing.calls, **row}


def free(device: torch.device) -> None:
    """Hand memory that nothing uses back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
