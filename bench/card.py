"""Everything on one GPU, row by row: kernels, the demo in every configuration, DiT steps, encoder and VAE.

Each row is measured by itself, so that a failure is a row and not an end. Full-size models get random weights on the
device; only times, memory and agreement mean anything.
"""

import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import click
import numpy as np
import torch
from torch import nn

import zimage
from bench.formats import decibels
from bench.kernels import measure, milliseconds
from bench.machine import command_line, describe_machine
from bench.options import JSON
from bench.weights import COMPONENTS
from zimage.dit.replay import replay_velocity
from zimage.kernels import specs
from zimage.loading.plan import Workload
from zimage.loading.sizes import dit_bytes, text_encoder_bytes, vae_bytes
from zimage.nn.compile import compile_blocks
from zimage.nn.graphs import CudaGraphs, use_graphs
from zimage.nn.quant import quantise
from zimage.settings.declared import Sampling
from zimage.text.generate import generate

Row = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Row]]]  # (name, what measures it)
PROMPTS = ["a cat face on a blue background", "a red apple and a dog face on a white background"]
TOKENS = 32  # of a caption
SIZES = (512, 1024, 2048)
SECTIONS = ("kernels", "demo", "dit", "encoder", "vae")
CONFIGURATIONS: dict[str, tuple[Row, Row]] = {  # settings of the model and of the request
    "bf16": ({}, {}),
    "fp32": ({"dtype": "fp32"}, {}),
    "int8": ({"precision": "int8"}, {}),
    "fp8": ({"precision": "fp8"}, {}),
    "compiled": ({"compile": True}, {}),
    "compiled int8": ({"compile": True, "precision": "int8"}, {}),
    **{name: ({"attention": name}, {}) for name in ("sdpa-cudnn", "sdpa-flash", "sdpa-math", "flash2", "flash3")},
    "batch with guidance": ({}, {"batch_size": 2, "guidance": 2.0, "negative": "a dog"}),
    "exact strips": ({}, {"tile_mode": "exact", "tile_size": 64}),
    "blended tiles": ({}, {"tile_mode": "blend", "tile_size": 64, "tile_overlap": 16}),
    "two passes": ({}, {"hires": 2.0, "width": 256, "height": 256}),
    "encoder on the CPU": ({"text_encoder_device": "cpu"}, {}),
    "stages in turn": ({"residency": "stage"}, {}),
    "from graphs": ({"cuda_graphs": True}, {}),
}


@click.command()
@JSON
@click.option("--repeats", default=10, show_default=True, help="Timed calls per row, after three that are not timed.")
@click.option("--only", multiple=True, type=click.Choice(SECTIONS), help="Repeat for several sections.")
def card(as_json: bool, repeats: int, only: tuple[str, ...]) -> None:
    """Check and time everything on this machine's GPU, one row each; without a GPU it fails in one line."""
    if not torch.cuda.is_available():
        raise click.ClickException("card needs an NVIDIA GPU, and PyTorch sees none here")
    rows = []
    for section, name, measured in every_row(torch.device("cuda"), repeats, only):
        rows.append({"section": section, "name": name, **attempt(measured)})
        if not as_json:
            print(json.dumps(rows[-1]), flush=True)
    about = {"machine": describe_machine(), "gpu": torch.cuda.get_device_name(), "command": command_line()}
    print(json.dumps({**about, "failed": sum("error" in row for row in rows), "rows": rows}))


def every_row(device: torch.device, repeats: int, only: tuple[str, ...]) -> Iterator[tuple[str, str, Callable]]:
    """Yield (section, name, what measures it)."""
    for section in only or SECTIONS:
        for name, measured in globals()[f"{section}_rows"](device, repeats):
            yield section, name, measured


def attempt(measured: Callable[[], Row]) -> Row:
    """The row, or its error in one line: kernels and packages raise what they please."""
    try:
        with torch.no_grad():
            return measured()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def kernels_rows(device: torch.device, repeats: int) -> Rows:
    """Every kernel against its reference, at the published sizes."""
    for spec in specs():
        yield spec.name, partial(measure, spec, device.type, repeats)


def demo_rows(device: torch.device, repeats: int) -> Rows:
    """The demo's pictures in every configuration, against the same requests on the CPU in fp32."""

    @cache
    def expected(request: str) -> list[np.ndarray]:
        return pictures(zimage.ZImage.load(device="cpu", dtype="fp32"), json.loads(request))

    def measured(load: Row, request: Row) -> Row:
        wanted, pipe = expected(json.dumps(request)), zimage.ZImage.load(device=str(device), **load)
        started, first = time.perf_counter(), pictures(pipe, request)
        loaded, again = time.perf_counter(), pictures(pipe, request)
        times = {"first_s": loaded - started, "again_s": time.perf_counter() - loaded}
        psnr = [round(decibels(a, b), 1) for a, b in zip(first, wanted, strict=True)]
        return {**times, "psnr_db": psnr, "repeats_exactly": all(map(np.array_equal, first, again))}

    for name, settings in CONFIGURATIONS.items():
        yield name, partial(measured, *settings)


def pictures(pipe: zimage.ZImage, request: Row) -> list[np.ndarray]:
    return [np.asarray(image, dtype=float) for image in pipe.generate(PROMPTS, seed=1, **request).images]


def dit_rows(device: torch.device, repeats: int) -> Rows:
    """One evaluation of the DiT per precision and size, last compiled; its peak beside the plan's figure."""

    def step(make: Callable[[], Any], size: int, compiled: bool = False, graphs: bool = False) -> Row:
        dit = make()
        if compiled:
            compile_blocks(dit)
        if graphs:
            replay_velocity(dit, CudaGraphs(device))
        caption = torch.randn(TOKENS, dit.config.cap_feat_dim, device=device).bfloat16()
        latents = torch.randn(1, 16, size // 8, size // 8, device=device)
        modulation = dit.modulate(torch.tensor([0.7]))
        context = dit.context(dit.refine([caption]), size // 8, size // 8)
        planned = dit_bytes(dit.config, Workload(size, size, TOKENS), torch.bfloat16)
        return costs(lambda: dit.velocity(latents, modulation, context), planned, device, repeats)

    for precision in ("bf16", "int8", "fp8"):
        dit = cache(partial(random_model, "transformer", device, precision))
        for size in SIZES:
            yield f"{precision} {size}", partial(step, dit, size)
        yield f"{precision} {SIZES[1]} compiled", partial(step, dit, SIZES[1], compiled=True)
    dit = cache(partial(random_model, "transformer", device))
    yield "bf16 256", partial(step, dit, 256)
    yield "bf16 256 from graphs", partial(step, dit, 256, graphs=True)


def encoder_rows(device: torch.device, repeats: int) -> Rows:
    """Encoding short and long prompts, and writing."""
    encoder = cache(lambda: random_model("text_encoder", device))

    def encode(tokens: int) -> Row:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        planned = text_encoder_bytes(encoder().config, Workload(16, 16, tokens), torch.bfloat16)
        return costs(lambda: encoder()(ids), planned, device, repeats)

    def write(graphs: bool = False) -> Row:
        if graphs:
            use_graphs(encoder(), CudaGraphs(device))
        text = generate(encoder(), list(range(100)), Sampling(temperature=0.0), 33, (), torch.Generator())
        next(text)
        started, written = time.perf_counter(), len(list(text))
        return {"ms_per_token": (time.perf_counter() - started) * 1e3 / written}

    yield "encode a short prompt", partial(encode, TOKENS)
    yield "encode 512 tokens", partial(encode, 512)
    yield "write 32 tokens", write
    if device.type == "cuda":
        yield "write 32 tokens from graphs", partial(write, graphs=True)


def vae_rows(device: torch.device, repeats: int) -> Rows:
    """Decoding whole, in exact strips and in blended tiles."""
    vae = cache(lambda: random_model("vae", device))

    def decode(size: int, mode: str) -> Row:
        latents = torch.randn(1, 16, size // 8, size // 8, device=device)
        planned = vae_bytes(vae().config, Workload(size, size, 0, tile_mode=mode), torch.bfloat16, device)
        return costs(lambda: vae().decode(latents, None, 64, mode), planned, device, repeats)

    for size, mode in itertools.product(SIZES[-2:], ("off", "exact", "blend")):
        yield f"{mode} {size}", partial(decode, size, mode)


def random_model(name: str, device: torch.device, precision: str = "bf16") -> Any:
    """A component of the published size with random weights, made on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    cls, config, _ = COMPONENTS[name]
    with torch.device("meta"):
        model: nn.Module = cls.from_config(config)
    model = model.bfloat16().to_empty(device=device).requires_grad_(False).eval()
    for key, weight in model.named_parameters():
        fan_in = 1 if "embed_tokens" in key else weight[0].numel()
        weight.fill_(key.endswith("weight")) if weight.ndim == 1 else weight.normal_(std=0.5 * fan_in**-0.5)
    if precision != "bf16":
        quantise(model, precision)
    return model


def costs(call: Callable[[], Any], planned: int, device: torch.device, repeats: int) -> Row:
    """Milliseconds of a call, and its peak of memory beside what the plan counts with."""
    row: Row = {"planned_mb": round(planned / 1e6)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        row["peak_mb"] = round((torch.cuda.max_memory_allocated(device) - before) / 1e6)
    return {"ms": milliseconds(call, device.type, repeats), **row}
