"""Our side: FOLDER SIZE STEPS DTYPE PROMPT OUT."""

import statistics
import sys

from bench.sides.clock import Clock


def main(folder: str, size: str, steps: str, dtype: str, prompt: str, out: str) -> None:
    clock = Clock()
    import zimage

    pipe = zimage.ZImage.load(folder, device="cpu", dtype=None if dtype == "auto" else dtype)
    request = pipe.resolve(
        zimage.Request(prompt, width=int(size), height=int(size), steps=int(steps), seed=0, guidance=0.0)
    )
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
    clock.write(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
