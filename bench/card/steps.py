"""One evaluation of the DiT: every precision at every size, compiled, with every attention; diffusers' beside it."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any
from unittest import mock

import torch

from bench.card.models import TOKENS, a_step, costs, fill, free, random_model, step_bytes
from bench.card.operations import with_fp16_sums
from bench.card.rows import Absent, Bench, Row, Task, as_planned, needs
from bench.roofline import Cost
from bench.roofline import costs as least
from bench.weights import SMALL, TRANSFORMER
from zimage.errors import RequestError
from zimage.kernels import half_product
from zimage.loading.graphs import give_graphs
from zimage.nn.attention import choose_attention, use_attention
from zimage.nn.compile import compile_blocks
from zimage.nn.quant import check_precision

PRECISIONS = ("bf16", "fp16", "int8", "fp8")
COMPILED = ("bf16", "int8", "fp16", "fp8")  # the last are not run where compiling takes long
LITTLE = 256  # pixels
ATTENTIONS = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flash2", "flash3", "xformers", "sage")


def steps(bench: Bench) -> Iterator[Task]:
    """A step per precision and size beside its floor and the plan's memory; diffusers on weights of the same kind."""
    for precision in PRECISIONS:
        dit = cache(partial(made, bench, precision))
        for size in bench.sizes:
            yield Task(f"{precision} {size}", partial(_step, bench, dit, precision, size))
        if precision == "fp16":
            yield Task(f"fp16 {middle(bench)} by cuBLAS", partial(_by_cublas, bench, dit))
            yield Task(f"fp16 {middle(bench)} by cuBLAS, fp16 sums", partial(_switched, bench, dit))
    dit = cache(partial(made, bench, "bf16"))
    for graphs in (False, True):
        yield Task(f"bf16 {LITTLE}{', CUDA graphs' * graphs}", partial(_little, bench, dit, graphs))
    del dit  # two models of 12 GB do not fit on a card of 24
    yield Task(f"diffusers bf16 {middle(bench)}", partial(_diffusers, bench))
    for precision in COMPILED:
        yield Task(f"{precision} {middle(bench)} compiled", partial(_compiled, bench, precision))


def middle(bench: Bench) -> int:
    """The size at which variants are measured: the middle one."""
    return bench.sizes[len(bench.sizes) // 2]


def made(bench: Bench, precision: str) -> Any:
    try:
        check_precision("bf16" if precision == "fp16" else precision, bench.device, torch.bfloat16)
    except RequestError as error:
        raise Absent(str(error)) from error
    return random_model("transformer", bench.device, precision, dit_config(bench))


def dit_config(bench: Bench) -> dict[str, Any]:
    return SMALL["transformer"] if bench.small else TRANSFORMER


@cache
def _least(size: int, precision: str) -> Cost:
    return least(size, TOKENS, precision)["step"]


def _step(bench: Bench, make: Callable[[], Any], precision: str, size: int) -> Row:
    return as_planned(_measured(bench, make(), precision, size))


def _measured(bench: Bench, dit: Any, precision: str, size: int) -> Row:
    row = costs(a_step(dit, size, bench.device), step_bytes(dit, size), bench.device, bench.repeats)
    if not bench.small:
        row |= over_floor(bench, row["ms"], precision, size)
    return row


def over_floor(bench: Bench, ms: float, precision: str, size: int) -> Row:
    """TFLOP/s of a step of the published model, and its time over the least time on this card."""
    cost = _least(size, precision)
    row: Row = {"tflops": (cost.flops + cost.plain) / ms / 1e9}
    return row | ({"over_floor": ms / 1e3 / cost.seconds(bench.peaks, precision)} if bench.peaks else {})


def _little(bench: Bench, make: Callable[[], Any], graphs: bool) -> Row:
    """A step that is quicker to compute than to launch, unless a graph launches it."""
    dit = make()
    if graphs:
        give_graphs("dit", dit, bench.device, "sdpa", streamed=False)
    return _measured(bench, dit, "bf16", LITTLE)  # without a peak: a graph keeps its memory


def _by_cublas(bench: Bench, make: Callable[[], Any]) -> Row:
    """PyTorch's product instead of ours, as on cards where ours is not quicker."""
    with mock.patch.object(half_product, "DOUBLE_RATE", ()):
        return _step(bench, make, "fp16", middle(bench))


def _switched(bench: Bench, make: Callable[[], Any]) -> Row:
    """With PyTorch's own switch: every sum is fp16 from end to end."""
    return with_fp16_sums(partial(_by_cublas, bench, make))


def _compiled(bench: Bench, precision: str) -> Row:
    dit = made(bench, precision)
    compile_blocks(dit)
    return _step(bench, lambda: dit, precision, middle(bench))


def _diffusers(bench: Bench) -> Row:
    needs("diffusers")
    from diffusers import ZImageTransformer2DModel

    free(bench.device)
    with torch.device("meta"):
        dit = ZImageTransformer2DModel.from_config(dit_config(bench))
    dit = dit.bfloat16().to_empty(device=bench.device).requires_grad_(False).eval()
    fill(dit)
    size, device = middle(bench), bench.device
    caption = torch.randn(TOKENS, dit.config.cap_feat_dim, device=device).bfloat16()
    latents = torch.randn(16, 1, size // 8, size // 8, device=device).bfloat16()
    time = torch.tensor([0.5], device=device)
    row = costs(lambda: dit([latents], time, [caption]), 0, device, bench.repeats)
    return {name: value for name, value in row.items() if name != "planned_mb"}


def attention(bench: Bench) -> Iterator[Task]:
    """A step in bf16 with every way to compute attention."""
    dit = cache(partial(made, bench, "bf16"))
    for name in ATTENTIONS:
        yield Task(name, partial(_attention, bench, dit, name))


def _attention(bench: Bench, make: Callable[[], Any], name: str) -> Row:
    try:
        _, attend = choose_attention(name, bench.device, torch.bfloat16)
    except RequestError as error:
        if any(words in str(error) for words in ("is not installed", "does not run on")):
            raise Absent(str(error)) from error
        raise
    dit = make()
    use_attention(dit, attend)
    return _step(bench, lambda: dit, "bf16", middle(bench))
