"""The reference's side: FOLDER SIZE STEPS DTYPE PROMPT OUT."""

import statistics
import sys
import time

from bench.sides.clock import Clock


def main(folder: str, size: str, steps: str, dtype: str, prompt: str, out: str) -> None:
    clock = Clock()
    import torch
    from diffusers import ZImagePipeline

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": "auto"}[dtype]
    pipe = ZImagePipeline.from_pretrained(folder, torch_dtype=kind)
    pipe.set_progress_bar_config(disable=True)
    clock.lap("load")
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(prompt, device=torch.device("cpu"), do_classifier_free_guidance=False)
    clock.lap("encode")
    step_seconds = []

    def finished(pipe, step, timestep, tensors):
        clock.lap("step")
        step_seconds.append(clock.figures["step"])
        return tensors

    pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=[],
        width=int(size),
        height=int(size),
        num_inference_steps=int(steps),
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=finished,
    )
    clock.lap("decode")
    clock.figures |= {"first_step": step_seconds[0], "step": statistics.median(step_seconds[1:] or step_seconds)}
    clock.total()
    clock.figures["encode_warm"] = warm_encode(pipe, prompt)
    clock.write(out)


def warm_encode(pipe, prompt: str) -> float:
    """Seconds of a second encode."""
    import torch

    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            pipe.encode_prompt(prompt, device=torch.device("cpu"), do_classifier_free_guidance=False)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
