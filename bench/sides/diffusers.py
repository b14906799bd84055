"""The side of diffusers, started as SCENARIO ARGUMENTS OUT."""

import statistics
from typing import Any

from bench.sides.clock import Clock, serve


def kind_of(dtype: str) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": "auto"}[dtype]


def render(clock: Clock, folder: str, size: int, steps: int, dtype: str, prompt: str, device: str = "cpu") -> None:
    import torch
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, torch_dtype=kind_of(dtype)).to(device)
    clock.on(device)
    pipe.set_progress_bar_config(disable=True)
    clock.lap("load")

    def encode():
        return pipe.encode_prompt(prompt, device=torch.device(device), do_classifier_free_guidance=False)[0]

    with torch.no_grad():
        embeds = encode()
    clock.lap("encode")
    step_seconds = []

    def finished(pipe, step, timestep, tensors):
        clock.lap("step")
        step_seconds.append(clock.figures["step"])
        return tensors

    pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=[],
        width=size,
        height=size,
        num_inference_steps=steps,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=finished,
    )
    clock.lap("decode")
    clock.figures |= {"first_step": step_seconds[0], "step": statistics.median(step_seconds[1:] or step_seconds)}
    clock.total()
    with torch.no_grad():
        clock.warm("encode_warm", encode)


def step(clock: Clock, folder: str, size: int, tokens: int, dtype: str, repeats: int, device: str = "cpu") -> None:
    import torch
    from diffusers import ZImageTransformer2DModel

    clock.imported()
    clock.on(device)
    dit = ZImageTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=kind_of(dtype))
    dit = dit.to(device).eval()
    with torch.inference_mode():
        caption = torch.randn(tokens, dit.config.cap_feat_dim, dtype=dit.dtype, device=device)
        latents = torch.randn(16, 1, size // 8, size // 8, dtype=dit.dtype, device=device)
        time = torch.tensor([0.5], device=device)
        clock.repeated("step", lambda: dit([latents], time, [caption]), 2, repeats)
    clock.peak()


def decode(clock: Clock, folder: str, size: int, dtype: str, repeats: int, device: str = "cpu") -> None:
    import torch
    from diffusers import AutoencoderKL

    clock.imported()
    clock.on(device)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=kind_of(dtype)).to(device).eval()
    latents = torch.randn(1, 16, size // 8, size // 8, dtype=vae.dtype, device=device)
    with torch.inference_mode():
        clock.repeated("decode", lambda: vae.decode(latents).sample, 1, repeats)
    clock.peak()


if __name__ == "__main__":
    serve({"render": render, "step": step, "decode": decode})
