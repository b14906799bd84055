"""The reference's side: FOLDER SIZE STEPS DTYPE PROMPT OUT."""

import statistics
import sys

from bench.sides.clock import Clock


def main(folder: str, size: str, steps: str, dtype: str, prompt: str, out: str) -> None:
    clock = Clock()
    import torch
    from diffusers import ZImagePipeline

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": "auto"}[dtype]
    pipe = ZImagePipeline.from_pretrained(folder, torch_dtype=kind)
    pipe.set_progress_bar_config(disable=True)
    clock.lap("load")

    def encode():
        return pipe.encode_prompt(prompt, device=torch.device("cpu"), do_classifier_free_guidance=False)[0]

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
    with torch.no_grad():
        clock.warm("encode_warm", encode)
    clock.write(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
