"""Beyond one device: how one picture is divided over several, and many pictures over machines."""

from dataclasses import dataclass

from zimage.errors import RequestError
from zimage.settings.fields import Settings, check_fields, setting

MOST_RANKS = 64
GROUP = "Several devices"
# What a sweep decides by itself, since it draws one picture per cell → what to pass instead.
FIXED = {
    "prompt": "pass prompts as arguments or with --file",
    "seed": "pass --seeds",
    "images": "a cell is one picture; pass --seeds",
    "batch_size": "a cell is one picture",
}


@dataclass(frozen=True)
class ParallelSettings(Settings):
    """How one picture is divided over ranks. Raises RequestError with the fields at fault."""

    gpus: int | None = setting(
        None,
        "GPUs that draw each picture together; with `--device cpu`, processes. Default: as many as torchrun has "
        "started, else 1.",
        group=GROUP,
        minimum=1,
        maximum=MOST_RANKS,
    )
    cfg_parallel: bool = setting(
        False, "With guidance, evaluate the prompt on one half of the GPUs and the negative on the other.", group=GROUP
    )

    def __post_init__(self):
        check_fields(self)
        if self.cfg_parallel and self.gpus is not None and self.gpus % 2:
            text = f"cfg_parallel divides the GPUs into two halves, and gpus is {self.gpus}; pass an even number"
            raise RequestError(text, fields=("cfg_parallel", "gpus"))


@dataclass(frozen=True)
class BatchSettings(Settings):
    """How many pictures are spread over workers of Ray. Raises RequestError with the fields at fault."""

    workers: int | None = setting(
        None,
        "Processes that render, each with a model of its own. Default: one per GPU, else one.",
        group=GROUP,
        minimum=1,
        maximum=10_000,
    )
    encoders: int = setting(
        0,
        "Processes that encode prompts for the workers, which then never load the text encoder; 0: workers encode.",
        group=GROUP,
        minimum=0,
        maximum=10_000,
    )
    address: str | None = setting(
        None,
        "Ray cluster whose machines draw, such as auto or ray://HOST:10001. Default: this computer alone.",
        group=GROUP,
        metavar="ADDRESS",
    )

    def __post_init__(self):
        check_fields(self)
