"""The side of transformers, which writes text, started as SCENARIO ARGUMENTS OUT."""

from bench.sides.clock import Clock, needed_bytes, prompt_of, serve
from bench.sides.diffusers import kind_of


def rewrite(clock: Clock, folder: str, dtype: str, prompt_tokens: int, tokens: int, device: str = "cpu") -> None:
    import torch
    from transformers import AutoModelForCausalLM

    clock.imported()
    clock.on(device)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/text_encoder", dtype=kind_of(dtype)).to(device).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt_of(prompt_tokens)], device=device)

    def write(count: int, streamer: "Laps | None" = None) -> None:
        model.generate(ids, max_new_tokens=count, do_sample=False, streamer=streamer)

    write(2)
    with Laps(clock, tokens) as laps:
        write(tokens, laps)
    clock.peak()
    clock.figures["memory_ratio"] = clock.figures["peak_gb"] * 1e9 / needed_bytes(model, prompt_tokens + tokens)


class Laps:
    """A streamer, which receives the prompt and then every token."""

    def __init__(self, clock: Clock, tokens: int):
        self.clock, self.tokens, self.told = clock, tokens, -1

    def __enter__(self) -> "Laps":
        self.clock.lap("load")
        return self

    def put(self, value: object) -> None:
        self.told += 1
        if self.told == 1:
            self.clock.lap("prefill")

    def end(self) -> None:
        assert self.told == self.tokens, self.told

    def __exit__(self, *_: object) -> None:
        self.clock.lap("token")
        self.clock.figures["token"] /= self.tokens - 1


if __name__ == "__main__":
    serve({"rewrite": rewrite})
