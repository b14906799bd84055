"""Our side, started as SCENARIO ARGUMENTS OUT."""

import statistics
from collections.abc import Iterator
from typing import Any

from bench.sides.clock import Clock, needed_bytes, prompt_of, serve


def render(
    clock: Clock,
    folder: str,
    size: int,
    steps: int,
    dtype: str,
    prompt: str,
    precision: str = "bf16",
    memory: float | None = None,
    device: str = "cpu",
) -> None:
    import zimage

    kind = None if dtype == "auto" else dtype
    # Without the cache of captions, which the other side lacks: a warm encode must be an encode.
    settings = {"precision": precision, "memory": memory, "cache_entries": 0}
    pipe = zimage.ZImage.load(folder, device=device, dtype=kind, **settings)
    clock.on(device)
    request = pipe.prepare(zimage.Request(prompt, width=size, height=size, steps=steps, seed=0, guidance=0.0))
    clock.lap("load")
    step_seconds, image = [], None
    for event in pipe.run(request):
        if event.stage == "encode" and event.step == 1:
            clock.lap("encode")
        if event.stage == "denoise" and event.step:
            clock.lap("step")
            step_seconds.append(clock.figures["step"])
        if event.image is not None:
            clock.lap("decode")
            image = event.image
    clock.figures |= {"first_step": step_seconds[0], "step": statistics.median(step_seconds[1:] or step_seconds)}
    clock.total()
    assert image is not None
    clock.warm("encode_warm", lambda: pipe.encode([prompt]))


def step(
    clock: Clock,
    folder: str,
    size: int,
    tokens: int,
    dtype: str,
    repeats: int,
    precision: str,
    compiled: bool,
    device: str = "cpu",
    controlled: bool = False,
) -> None:
    import torch

    import zimage
    from zimage.dit.control import Controlled
    from zimage.formats.pages import forget_pages
    from zimage.nn.compile import compile_blocks
    from zimage.nn.quant import quantise

    clock.imported()
    clock.on(device)

    def loaded(name: str) -> Any:
        module = zimage.load_component(folder, name, device=device, dtype=None if dtype == "auto" else dtype)
        if precision != "bf16":
            quantise(module, precision, forget_pages)
        if compiled:
            compile_blocks(module)
        return module

    dit, net = loaded("dit"), loaded("control") if controlled else None
    with torch.inference_mode():
        caption = torch.randn(tokens, dit.config.cap_feat_dim, device=device)
        context = dit.context(dit.refine([caption]), size // 8, size // 8)
        latents = torch.randn(1, 16, size // 8, size // 8, device=device)
        sigma, controls = torch.tensor([0.5]), []
        modulation = dit.modulate(sigma)
        if net:
            shown = torch.randn(1, net.config.control_in_dim, size // 8, size // 8, device=device)
            controls = [Controlled(net, net.embed(shown, dit.x_pad_token), net.modulate(dit.time(sigma)), 0.75)]
        clock.repeated("step", lambda: dit.velocity(latents, modulation, context, controls), 2, repeats)
    clock.peak()


def decode(
    clock: Clock,
    folder: str,
    size: int,
    dtype: str,
    repeats: int,
    tile_mode: str,
    tile_size: int | None,
    device: str = "cpu",
) -> None:
    import torch

    import zimage

    clock.imported()
    clock.on(device)
    vae: Any = zimage.load_component(folder, "vae", device=device, dtype=None if dtype == "auto" else dtype)
    latents = torch.randn(1, 16, size // 8, size // 8, device=device)
    with torch.inference_mode():
        clock.repeated("decode", lambda: vae.decode(latents, tile_size=tile_size, tile_mode=tile_mode), 1, repeats)
    clock.peak()


def rewrite(clock: Clock, folder: str, dtype: str, prompt_tokens: int, tokens: int, device: str = "cpu") -> None:
    import torch

    import zimage
    from zimage.text.generate import Sampling, generate

    clock.imported()
    clock.on(device)
    model: Any = zimage.load_component(folder, "text_encoder", device=device, dtype=None if dtype == "auto" else dtype)

    def write(count: int) -> Iterator[int]:
        return generate(model, prompt_of(prompt_tokens), Sampling(temperature=0.0), count, (), torch.Generator())

    assert len(list(write(2))) == 2
    clock.lap("load")
    text = write(tokens)
    next(text)
    clock.lap("prefill")
    rest = len(list(text))
    clock.lap("token")
    clock.figures["token"] /= rest
    clock.peak()
    clock.figures["memory_ratio"] = clock.figures["peak_gb"] * 1e9 / needed_bytes(model, prompt_tokens + tokens)


def picture(clock: Clock, request: dict[str, Any], warmup: int, repeats: int) -> None:
    """From a request to its PNG in a file, with the demo model: what `served` does through a server."""
    import itertools
    import tempfile
    from pathlib import Path

    import zimage
    from zimage.pictures.files import save

    pipe, seeds = zimage.ZImage.load(), itertools.count()
    with tempfile.TemporaryDirectory() as folder:

        def draw() -> None:
            seed = next(seeds)
            job = pipe.prepare(zimage.Request(**request, seed=seed))
            for event in pipe.run(job):
                if event.image is not None:
                    save(event.image, Path(folder, f"{seed}.png"), pipe.metadata(job, 0), replace=True)

        clock.repeated("picture", draw, warmup, repeats)


if __name__ == "__main__":
    serve({"render": render, "step": step, "decode": decode, "rewrite": rewrite, "picture": picture})
