"""The least time of every stage: its arithmetic at the device's peak, or its least traffic at the device's bandwidth.

PyTorch's own counter counts FLOPs on meta tensors (products, convolutions, attention); the least traffic is every
weight read once, and the stage's inputs and outputs. Attention has bf16's peak whatever the DiT's products are in, and
so have the blocks that are never quantised. With --counted, a step is counted launch by launch (`counted.py`).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.counted import counted_rows
from bench.machine import command_line, describe_machine
from bench.options import JSON
from bench.peaks import DEVICES, Peaks
from bench.timing import timed
from bench.weights import COMPONENTS
from zimage.loading.registry import ROWS, TEXT_ENCODER, VAE
from zimage.loading.weights import on_meta
from zimage.nn.quant import quantisable

MEASURED = {"encode": "encode_warm", "step": "step", "decode": "decode"}  # stage → figure of `render`, `step`, `decode`
PRECISIONS = ("bf16", "fp16", "fp8", "int8")
ATTENTION = ("attention", "bmm")  # in the names of PyTorch's ops


class Cost(NamedTuple):
    """What a stage computes and moves at least."""

    flops: int  # in products that are quantised, or that add up in fp16
    plain: int  # FLOPs at bf16's rate: attention, and products that stay as they are
    bytes: int

    def seconds(self, peaks: Peaks, precision: str) -> float:
        arithmetic = self.flops / speed(peaks, precision) + self.plain / peaks.bf16
        return max(arithmetic, self.bytes / peaks.bandwidth)


def numbers(context: click.Context, option: click.Parameter, value: str | None) -> list[int]:
    """Numbers of ranks, from one up."""
    try:
        found = [int(part) for part in value.split(",")] if value else []
    except ValueError:
        found = [0]
    if any(number < 1 for number in found):
        raise click.BadParameter(f"{value} is not a list of numbers of GPUs, such as 2,4,8")
    return found


@click.command()
@JSON
@click.option("--device", type=click.Choice([*DEVICES, "here"]), default="rtx4090", show_default=True)
@click.option("--size", "sizes", type=int, multiple=True, help="Repeat for several.  [default: 1024]")
@click.option("--tokens", default=32, show_default=True, help="Caption tokens.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="bf16", show_default=True)
@click.option(
    "--measured", type=click.Path(exists=True, path_type=Path), multiple=True, help="A result, whose last line is JSON."
)
@click.option(
    "--ranks", callback=numbers, metavar="N,N…", help="Several GPUs of this kind, on paper: so many, or so many."
)
@click.option("--counted", is_flag=True, help="Count a step on a pretended card, part by part, in every precision.")
def roofline(
    as_json: bool,
    device: str,
    sizes: tuple[int, ...],
    tokens: int,
    precision: str,
    measured: tuple[Path, ...],
    ranks: list[int],
    counted: bool,
) -> None:
    """Compute FLOPs, least bytes and least time (floor) of every stage; with --measured, results over the floor.

    --counted runs the DiT on a GPU that is pretended (tests/cuda; it needs g++, Triton and pytest): every launch of a
    step takes as long as its arithmetic or its bytes at the makers' figures, and the table sums these part by part.

    --ranks counts what a rank of several computes and exchanges in a step and in a decode (`ranks.py`).
    """
    peaks = here() if device == "here" else DEVICES[device]
    if counted:
        rows = counted_rows(peaks, sizes or (1024,), tokens, PRECISIONS)
        return _print_table(rows, device, as_json)
    if ranks:
        return _print_ranks(peaks, device, ranks, sizes or (1024,), tokens, precision, as_json)
    found: dict[str, float] = {}
    for file in measured:
        found |= json.loads(file.read_text().splitlines()[-1])["median"]["zimage"]
    for size in sizes or (1024,):
        rows = [_row(name, cost, peaks, precision, found) for name, cost in costs(size, tokens, precision).items()]
        if not as_json:
            _print_stages(rows)
        settings = {"device": device, "size": size, "tokens": tokens, "precision": precision, "peaks": peaks._asdict()}
        print(json.dumps({**settings, "stages": rows}))


def _row(name: str, cost: Cost, peaks: Peaks, precision: str, found: dict[str, float]) -> dict[str, Any]:
    floor = cost.seconds(peaks, precision)
    bound = "memory" if floor == cost.bytes / peaks.bandwidth else "arithmetic"
    row = {"stage": name, "flops": cost.flops + cost.plain, "bytes": cost.bytes, "floor_s": floor, "bound": bound}
    if MEASURED.get(name) in found:
        row |= {"measured_s": found[MEASURED[name]], "measured_over_floor": found[MEASURED[name]] / floor}
    return row


def _print_stages(rows: list[dict[str, Any]]) -> None:
    print(f"{'stage':10}{'TFLOP':>10}{'GB':>8}{'floor ms':>12}  {'bound by':12}{'measured/floor':>16}")
    for r in rows:
        over = f"{r['measured_over_floor']:.2f}" if "measured_s" in r else ""
        print(
            f"{r['stage']:10}{r['flops'] / 1e12:>10.2f}{r['bytes'] / 1e9:>8.2f}{r['floor_s'] * 1e3:>12.2f}"
            f"  {r['bound']:12}{over:>16}"
        )


def _print_ranks(
    peaks: Peaks, device: str, ranks: list[int], sizes: Sequence[int], tokens: int, precision: str, as_json: bool
) -> None:
    from bench.ranks import LINKS, rank_rows  # which takes its arithmetic from here

    if device not in LINKS:
        raise click.UsageError(f"--ranks needs to know how GPUs are joined; pass --device {', '.join(LINKS)}")
    rows = [row for size in sizes for row in rank_rows(peaks, LINKS[device], ranks, size, tokens, precision)]
    _print_table(rows, f"{device}, {LINKS[device].name}", as_json)


def _print_table(rows: list[dict[str, Any]], device: str, as_json: bool) -> None:
    if not as_json:
        width = max(len(row["part"]) for row in rows) + 2
        print(f"{'':{width}}" + "".join(f"{name:>16}" for name in rows[0] if name != "part"))
        for row in rows:
            print(f"{row['part']:{width}}" + "".join(f"{row[name]:>16}" for name in row if name != "part"))
    print(json.dumps({"machine": describe_machine(), "command": command_line(), "device": device, "rows": rows}))


def speed(peaks: Peaks, precision: str) -> float:
    """FLOP/s of the DiT's products; fp16 means sums in fp16, as far as a card has them."""
    return peaks.fp16_sums if precision == "fp16" else getattr(peaks, precision)


def costs(size: int, tokens: int, precision: str = "bf16") -> dict[str, Cost]:
    """The stages of the published model in bf16, or with the DiT's products in another precision."""
    dit, counted = _published(size, tokens)
    share = quicker_share(dit, precision)
    stages = {name: Cost(0, flops.total, moved) for name, (flops, moved) in counted.items()}
    flops, moved = counted["step"]
    products, blocks = round(share * flops.products), _bytes(_block_weights(dit))
    moved -= round(share * blocks / 2) if precision in ("int8", "fp8") else 0
    return stages | {"step": Cost(products, flops.total - products, moved)}


@cache
def _published(size: int, tokens: int) -> tuple[Any, dict[str, tuple["Flops", int]]]:
    """The published DiT, and the FLOPs and least bytes of every stage in bf16."""
    with on_meta():
        text, dit, vae = (cls.from_config(config).bfloat16() for cls, config, _ in COMPONENTS.values())
        ids = torch.zeros(1, tokens, dtype=torch.long)
        caption = torch.zeros(tokens, dit.config.cap_feat_dim, dtype=torch.bfloat16)
        latents = torch.zeros(1, 16, size // 8, size // 8)
        with torch.no_grad():
            refined, refine = count(lambda: dit.refine([caption]))
            context, modulation = dit.context(refined, size // 8, size // 8), dit.modulate(torch.zeros(1))
            _, encode = count(lambda: text(ids))
            _, step = count(lambda: dit.velocity(latents, modulation, context))
            _, decode = count(lambda: vae.decode(latents))
    io = 2 * latents.numel() * 4 + refined[0].numel() * 2
    picture = 3 * size * size * 4 + latents.numel() * 4
    refiner = _bytes(dit.context_refiner.parameters()) + caption.numel() * 2 + refined[0].numel() * 2
    return dit, {
        "encode": (encode, _bytes(ROWS[TEXT_ENCODER].reads(text)) + caption.numel() * 2),
        "refine": (refine, refiner),
        "step": (step, _bytes(_block_weights(dit)) + io),
        "decode": (decode, _bytes(ROWS[VAE].reads(vae)) + picture),
    }


def _block_weights(dit: nn.Module) -> Iterator[Tensor]:
    names = ("layers", "noise")
    return (p for name, p in dit.named_parameters() if name.startswith(names) and "adaLN" not in name)


def quicker_share(dit: Any, precision: str) -> float:
    """The share of a step's products that `precision` makes quicker: not the blocks that fp8 leaves as they are."""
    if precision in ("bf16", "fp16"):
        return float(precision == "fp16")
    names = ("noise_refiner", "layers")
    chosen = {id(linear) for _, _, linear in quantisable(dit, precision)}
    linears = [m for name in names for n, m in dit.get_submodule(name).named_modules() if _is_product(n, m)]
    return _bytes(m.weight for m in linears if id(m) in chosen) / _bytes(m.weight for m in linears)


def _is_product(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "adaLN" not in name


class Flops(NamedTuple):
    """FLOPs of products and convolutions, and with attention's."""

    products: int
    total: int


def count(call: Callable[[], Any]) -> tuple[Any, Flops]:
    """What a call returns, and its FLOPs."""
    counter = FlopCounterMode(display=False)
    with counter:
        result = call()
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in by_op.items() if any(word in op for word in ATTENTION))
    return result, Flops(sum(by_op.values()) - attention, sum(by_op.values()))


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def here() -> Peaks:
    """This processor's peaks: the best of five products of 4096 × 4096, and of five copies of 1 GB."""
    n = 4096
    a, b = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16()
    q = torch.randint(-127, 127, (n, n), dtype=torch.int8)
    bf16, int8 = 2 * n**3 / _best(lambda: a @ b.t()), 2 * n**3 / _best(lambda: torch._int_mm(q, q.t()))
    fp32 = 2 * n**3 / _best(lambda: a.float() @ b.float().t())
    source, target = torch.zeros(1 << 28), torch.zeros(1 << 28)
    copied = 2 * source.numel() * 4 / _best(lambda: target.copy_(source))
    return Peaks(bf16=bf16, int8=int8, fp8=bf16, fp16_sums=bf16, fp32=fp32, bandwidth=copied)


def _best(call: Callable[[], Any]) -> float:
    return timed(call, "cpu", 5).least / 1e3
