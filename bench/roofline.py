"""The least time of every stage: its arithmetic at the device's peak, or its least traffic at the device's bandwidth.

PyTorch's own counter counts FLOPs on meta tensors (products, convolutions, attention); the least traffic is every
weight read once, and the stage's inputs and outputs.
"""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.options import JSON
from bench.weights import COMPONENTS
from zimage.loading.registry import ROWS, TEXT_ENCODER, VAE
from zimage.loading.weights import on_meta


class Device(NamedTuple):
    """Dense peaks in FLOP/s (or int8 OP/s) and bytes/s, as the makers state them."""

    bf16: float
    int8: float
    fp8: float
    bandwidth: float


DEVICES = {
    "rtx4090": Device(165e12, 660e12, 330e12, 1008e9),
    "h100": Device(989e12, 1979e12, 1979e12, 3350e9),
    "h200": Device(989e12, 1979e12, 1979e12, 4800e9),
}
MEASURED = {"encode": "encode_warm", "step": "step", "decode": "decode"}  # stage → figure of `render`, `step`, `decode`


@click.command()
@JSON
@click.option("--device", type=click.Choice([*DEVICES, "here"]), default="rtx4090", show_default=True)
@click.option("--size", default=1024, show_default=True)
@click.option("--tokens", default=32, show_default=True, help="Caption tokens.")
@click.option("--precision", type=click.Choice(["bf16", "int8", "fp8"]), default="bf16", show_default=True)
@click.option(
    "--measured", type=click.Path(exists=True, path_type=Path), multiple=True, help="A result, whose last line is JSON."
)
def roofline(as_json: bool, device: str, size: int, tokens: int, precision: str, measured: tuple[Path, ...]) -> None:
    """Compute FLOPs, least bytes and least time (floor) of every stage; with --measured, results over the floor."""
    peak = here() if device == "here" else DEVICES[device]
    found: dict[str, float] = {}
    for file in measured:
        found |= json.loads(file.read_text().splitlines()[-1])["median"]["zimage"]
    rows = []
    for name, (flops, traffic) in costs(size, tokens, precision).items():
        speed = getattr(peak, precision) if name == "step" else peak.bf16
        floor = max(flops / speed, traffic / peak.bandwidth)
        row: dict[str, Any] = {"stage": name, "flops": flops, "bytes": traffic, "floor_s": floor}
        row["bound"] = "arithmetic" if flops / speed > traffic / peak.bandwidth else "memory"
        if MEASURED.get(name) in found:
            row |= {"measured_s": found[MEASURED[name]], "measured_over_floor": found[MEASURED[name]] / floor}
        rows.append(row)
    if not as_json:
        print(f"{'stage':10}{'TFLOP':>10}{'GB':>8}{'floor ms':>12}  {'bound by':12}{'measured/floor':>16}")
        for r in rows:
            over = f"{r['measured_over_floor']:.2f}" if "measured_s" in r else ""
            print(
                f"{r['stage']:10}{r['flops'] / 1e12:>10.2f}{r['bytes'] / 1e9:>8.2f}{r['floor_s'] * 1e3:>12.2f}"
                f"  {r['bound']:12}{over:>16}"
            )
    settings = {"device": device, "size": size, "tokens": tokens, "precision": precision, "peaks": peak._asdict()}
    print(json.dumps({**settings, "stages": rows}))


def costs(size: int, tokens: int, precision: str = "bf16") -> dict[str, tuple[int, int]]:
    """Stage → (FLOPs, least bytes) of the published model in bf16, or with the DiT's blocks in int8 or fp8."""
    with on_meta():
        text, dit, vae = (cls.from_config(config).bfloat16() for cls, config, _ in COMPONENTS.values())
        ids = torch.zeros(1, tokens, dtype=torch.long)
        caption = torch.zeros(tokens, dit.config.cap_feat_dim, dtype=torch.bfloat16)
        latents = torch.zeros(1, 16, size // 8, size // 8)
        sigma = torch.zeros(1)
        with torch.no_grad():
            refined, flops_refine = _count(lambda: dit.refine([caption]))
            context, modulation = dit.context(refined, size // 8, size // 8), dit.modulate(sigma)
            _, flops_text = _count(lambda: text(ids))
            _, flops_step = _count(lambda: dit.velocity(latents, modulation, context))
            _, flops_vae = _count(lambda: vae.decode(latents))
    weights = {"text": _bytes(ROWS[TEXT_ENCODER].reads(text)), "refiner": _bytes(dit.context_refiner.parameters())}
    blocks = _bytes(p for n, p in dit.named_parameters() if n.startswith(("layers", "noise")) and "adaLN" not in n)
    blocks = blocks if precision == "bf16" else blocks // 2
    io = 2 * latents.numel() * 4 + refined[0].numel() * 2
    picture = 3 * size * size * 4 + latents.numel() * 4
    return {
        "encode": (flops_text, weights["text"] + caption.numel() * 2),
        "refine": (flops_refine, weights["refiner"] + caption.numel() * 2 + refined[0].numel() * 2),
        "step": (flops_step, blocks + io),
        "decode": (flops_vae, _bytes(ROWS[VAE].reads(vae)) + picture),
    }


def _count(call: Callable[[], Any]) -> tuple[Any, int]:
    counter = FlopCounterMode(display=False)
    with counter:
        result = call()
    return result, counter.get_total_flops()


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def here() -> Device:
    """This processor's peaks: the best of five bf16 and int8 products of 4096 × 4096, and of five copies of 1 GB."""
    n = 4096
    a, b = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16()
    q = torch.randint(-127, 127, (n, n), dtype=torch.int8)
    bf16 = 2 * n**3 / _best(lambda: a @ b.t())
    int8 = 2 * n**3 / _best(lambda: torch._int_mm(q, q.t()))
    source, target = torch.zeros(1 << 28), torch.zeros(1 << 28)
    return Device(bf16, int8, bf16, 2 * source.numel() * 4 / _best(lambda: target.copy_(source)))


def _best(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
